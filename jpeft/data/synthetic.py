"""A built-in task: natural-language inference over a small grammar, with labels that follow from a tiny semantics.

    Every dog slept.               Some dog slept.                      entailment
    No animal ran outside.         Exactly two hungry dogs ran.         neutral
    Anna was hugged by Paul.       Paul touched nobody.                 contradiction
    Emma chased Jack.              Jack chased Emma.                    neutral

A sentence is a conjunction of bounds, each "at least m and at most n members of a region", where a region is given by
its properties: a hungry dog that slept is {hungry, dog, animal} and {napped, slept}, less {slept} for those that did
not. More properties mean a smaller region, and what follows from what is then a comparison of sets and numbers.

Quantifiers bring the old question whether "every dog slept" is true where there are no dogs. Here a sentence implies
that what its own subject names exists. Pairs whose label would change if the hypothesis' subject were known to exist
too ("every animal slept", "some dog slept") are not generated.

Every hypothesis occurs three times, once with each label, so that the hypothesis alone says nothing. The combinations
of a subject with a verb are split between train and test: no sentence of one occurs in the other, every word does.
"""

import math
import random
from typing import Any, NamedTuple

__all__ = ["LABELS", "Sentence", "generate", "label"]

LABELS = ("entailment", "neutral", "contradiction")

# The more general noun or verb follows the more specific one. No word stands twice in a table, which is what lets the
# split by combinations keep the sentences of train and test apart.
PEOPLE = (
    ("girl", "child"), ("woman", "adult"), ("painter", "artist"), ("drummer", "musician"), ("surgeon", "doctor"),
    ("boxer", "athlete"), ("chemist", "scientist"), ("plumber", "worker"), ("poet", "writer"), ("clown", "performer"),
)  # fmt: skip
ANIMALS = (("dog", "animal"), ("parrot", "bird"), ("rat", "rodent"), ("bee", "insect"), ("lizard", "reptile"))
VERBS = (
    ("sprinted", "ran"), ("napped", "slept"), ("crawled", "moved"), ("strolled", "walked"), ("feasted", "ate"),
    ("whispered", "spoke"), ("giggled", "laughed"), ("sobbed", "cried"), ("waltzed", "danced"), ("yelled", "called"),
)  # fmt: skip
ANIMAL_VERBS = 5  # only the first of them are what animals do
PLURALS = {"child": "children", "woman": "women"}
ADJECTIVES = ("hungry", "tired", "wet", "blind")  # a wet dog is a wet animal; a small elephant is not a small animal
PLACES = ("outside", "upstairs", "nearby", "abroad")
NUMBERS = ("two", "three", "four", "five")
NAMES = (
    "Anna", "Ben", "Carl", "Diana", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack",
    "Kate", "Leo", "Maria", "Nick", "Olivia", "Paul", "Rose", "Sam", "Tom", "Victor",
)  # fmt: skip
# The base form is for "did not".
RELATIONS = (
    (("hugged", "hug"), ("touched", "touch")), (("chased", "chase"), ("followed", "follow")),
    (("shoved", "shove"), ("pushed", "push")), (("tutored", "tutor"), ("taught", "teach")),
    (("phoned", "phone"), ("contacted", "contact")), (("defeated", "defeat"), ("fought", "fight")),
    (("guided", "guide"), ("helped", "help")), (("mocked", "mock"), ("insulted", "insult")),
)  # fmt: skip
TEST_SHARE = 5  # one of so many combinations goes to test


class Region(NamedTuple):
    """Those who have all properties in `who` and, if `holds`, did all of `what`; otherwise, did not do all of it."""

    who: frozenset[str]
    what: frozenset[str]
    holds: bool = True


class Bound(NamedTuple):
    """A region has at least `least` and at most `most` members."""

    region: Region
    least: int = 0
    most: float = math.inf


class Sentence(NamedTuple):
    """A sentence and what it says.

    Attributes:
      text: the sentence.
      form: its pattern without the nouns and verbs, such as "every".
      bounds: what it says, all of which must hold.
    """

    text: str
    form: str
    bounds: tuple[Bound, ...]


def label(premise: Sentence, hypothesis: Sentence) -> str | None:
    """Says what the premise means for the hypothesis.

    Args:
      premise: taken as true.
      hypothesis: the sentence to judge.

    Returns:
      One of `LABELS`, or None where it depends on whether what the hypothesis speaks of exists.
    """
    given = premise.bounds + _existing(premise.bounds, premise)
    more = _existing(given, hypothesis)
    found = _relation(given, hypothesis)
    return found if not more or _relation(given + more, hypothesis) == found else None


def generate(num_train: int = 4000, num_test: int = 1000, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Generates the task.

    Args:
      num_train: rows of the train split.
      num_test: rows of the test split.
      seed: a seed gives the same rows always.

    Returns:
      {"train": rows, "test": rows}; a row has `premise`, `hypothesis`, `label` (an index of `LABELS`) and `idx`. The
      numbers of rows by label differ by one at most.
    """
    return {"train": _split(num_train, seed, False), "test": _split(num_test, seed, True)}


def _split(size: int, seed: int, test: bool) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed} {test}")  # a string seeds by its digest, the same in every process
    rows: list[dict[str, Any]] = []
    while len(rows) < size:
        sentences = _quantified(rng, test) if rng.random() < 0.5 else _relational(rng, test)
        hypothesis = _pick(rng, sentences)
        by_label: dict[str | None, list[Sentence]] = {}
        for sentence in sentences:
            if sentence.text != hypothesis.text:
                by_label.setdefault(label(sentence, hypothesis), []).append(sentence)
        if not by_label.keys() >= set(LABELS):
            continue  # the strongest sentences follow from nothing but themselves
        for i, name in enumerate(LABELS):
            rows.append({"premise": _pick(rng, by_label[name]).text, "hypothesis": hypothesis.text, "label": i})
    rows = rows[:size]
    rng.shuffle(rows)
    return [row | {"idx": i} for i, row in enumerate(rows)]


def _pick(rng: random.Random, sentences: list[Sentence]) -> Sentence:
    # By form first: there are many more sentences with numbers than with "every".
    form = rng.choice(sorted({s.form for s in sentences}))
    return rng.choice([s for s in sentences if s.form == form])


def _existing(bounds: tuple[Bound, ...], of: Sentence) -> tuple[Bound, ...]:
    """What `bounds` say about the subject of a sentence if it exists: where nobody did it, someone did not."""
    who = of.bounds[0].region.who
    return tuple(
        Bound(Region(who, b.region.what, not b.region.holds), least=1)
        for b in bounds
        if b.most == 0 and who >= b.region.who
    )


def _relation(given: tuple[Bound, ...], hypothesis: Sentence) -> str:
    if all(_follows(given, bound) for bound in hypothesis.bounds):
        return "entailment"
    claimed = hypothesis.bounds + _existing(hypothesis.bounds, hypothesis)
    if any(_excludes(a, b) or _excludes(b, a) for a in given for b in claimed):
        return "contradiction"
    return "neutral"


def _inside(a: Region, b: Region) -> bool:
    """Whether region `a` is part of region `b` in every world."""
    narrower = a.what >= b.what if a.holds else a.what <= b.what
    return a.holds == b.holds and a.who >= b.who and narrower


def _follows(given: tuple[Bound, ...], bound: Bound) -> bool:
    least = bound.least == 0 or any(_inside(g.region, bound.region) and g.least >= bound.least for g in given)
    most = bound.most == math.inf or any(_inside(bound.region, g.region) and g.most <= bound.most for g in given)
    return least and most


def _excludes(a: Bound, b: Bound) -> bool:
    return _inside(a.region, b.region) and a.least > b.most


def _held_out(subject: int, verb: int) -> bool:
    return (subject + verb) % TEST_SHARE == 0


def _quantified(rng: random.Random, test: bool) -> list[Sentence]:
    """All sentences about one noun and its hypernym, an adjective, one verb and its hypernym, and a place."""
    nouns = PEOPLE + ANIMALS
    combinations = [
        (noun, verb)
        for i, noun in enumerate(nouns)
        for j, verb in enumerate(VERBS if i < len(PEOPLE) else VERBS[:ANIMAL_VERBS])
        if _held_out(i, j) == test
    ]
    (noun, general_noun), (verb, general_verb) = rng.choice(combinations)
    adjective, place = rng.choice(ADJECTIVES), rng.choice(PLACES)
    sentences = []
    for name, kinds in ((noun, {noun, general_noun}), (general_noun, {general_noun})):
        for did, deeds in ((verb, {verb, general_verb}), (general_verb, {general_verb})):
            for adjectives in ((), (adjective,)):
                for places in ((), (place,)):
                    region = Region(frozenset({*kinds, *adjectives}), frozenset({*deeds, *places}))
                    words = (" ".join((*adjectives, name)), " ".join((did, *places)))
                    sentences += _quantifiers(region, *words)
    return sentences


def _quantifiers(region: Region, noun: str, verb: str) -> list[Sentence]:
    rest = region._replace(holds=False)
    *adjectives, head = noun.split()
    nouns = " ".join((*adjectives, PLURALS.get(head, head + "s")))
    sentences = [
        Sentence(f"Every {noun} {verb}.", "every", (Bound(rest, most=0),)),
        Sentence(f"Not every {noun} {verb}.", "not every", (Bound(rest, least=1),)),
        Sentence(f"Some {noun} {verb}.", "some", (Bound(region, least=1),)),
        Sentence(f"No {noun} {verb}.", "no", (Bound(region, most=0),)),
    ]
    for n, number in enumerate(NUMBERS, start=2):
        sentences += [
            Sentence(f"At least {number} {nouns} {verb}.", "at least", (Bound(region, least=n),)),
            Sentence(f"At most {number} {nouns} {verb}.", "at most", (Bound(region, most=n),)),
            Sentence(f"Exactly {number} {nouns} {verb}.", "exactly", (Bound(region, n, n),)),
        ]
    return sentences


def _relational(rng: random.Random, test: bool) -> list[Sentence]:
    """All sentences about two named people, one verb and its hypernym, and a place."""
    j = rng.randrange(len(RELATIONS))
    first, second = rng.sample([name for i, name in enumerate(NAMES) if _held_out(i, j) == test], 2)
    place = rng.choice(PLACES)
    (verb, base), (general_verb, general_base) = RELATIONS[j]
    sentences = []
    for did, do, deeds in ((verb, base, {verb, general_verb}), (general_verb, general_base, {general_verb})):
        for places in ((), (place,)):
            what, where = frozenset({*deeds, *places}), "".join(f" {p}" for p in places)
            for agent, patient in ((first, second), (second, first)):
                sentences += _roles(agent, patient, did, do, what, where)
    return sentences


def _roles(a: str, p: str, did: str, do: str, what: frozenset[str], where: str) -> list[Sentence]:
    both = Region(frozenset({f"by {a}", f"to {p}"}), what)
    back = Region(frozenset({f"by {p}", f"to {a}"}), what)
    by, to = Region(frozenset({f"by {a}"}), what), Region(frozenset({f"to {p}"}), what)
    return [
        Sentence(f"{a} {did} {p}{where}.", "active", (Bound(both, least=1),)),
        Sentence(f"{p} was {did} by {a}{where}.", "passive", (Bound(both, least=1),)),
        Sentence(f"{a} did not {do} {p}{where}.", "not active", (Bound(both, most=0),)),
        Sentence(f"{p} was not {did} by {a}{where}.", "not passive", (Bound(both, most=0),)),
        Sentence(f"{a} {did} someone{where}.", "someone", (Bound(by, least=1),)),
        Sentence(f"Someone {did} {p}{where}.", "someone", (Bound(to, least=1),)),
        Sentence(f"{a} {did} nobody{where}.", "nobody", (Bound(by, most=0),)),
        Sentence(f"Nobody {did} {p}{where}.", "nobody", (Bound(to, most=0),)),
        Sentence(f"{a} and {p} {did} each other{where}.", "each other", (Bound(both, least=1), Bound(back, least=1))),
    ]
