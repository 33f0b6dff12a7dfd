"""The labels are checked against finite models: a reader of the sentences' text, and all small worlds.

Nothing here uses the bounds from which the labels were derived, only the words and which of them is the more general.
"""

import collections
import itertools
import re

import numpy as np
import pytest

from jpeft.data import synthetic

NOUNS = dict(synthetic.PEOPLE + synthetic.ANIMALS)
VERBS = dict(synthetic.VERBS) | {specific: general for (specific, _), (general, _) in synthetic.RELATIONS}
PAST = {base: past for pair in synthetic.RELATIONS for past, base in pair}
SINGULAR = {plural: word for word, plural in synthetic.PLURALS.items()}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
QUANTIFIED = re.compile(r"(every|not every|some|no|at least|at most|exactly)(?: (two|three|four|five))? (.*)")


def meaning(text):
    """Parses a sentence to (kind, number, restriction, scope): sets of words a counted thing must have."""
    text = text.removesuffix(".").lower()
    if m := QUANTIFIED.fullmatch(text):
        *nouns, last = m[3].split()
        places = {last} & set(synthetic.PLACES)
        if places:
            *nouns, last = nouns
        *adjectives, noun = nouns
        if m[2]:
            noun = SINGULAR.get(noun, noun.removesuffix("s"))
        return m[1], NUMBERS.get(m[2]), frozenset({*adjectives, noun}), frozenset({last, *places})
    words = text.split()
    places = frozenset(words[-1:]) & set(synthetic.PLACES)
    match words[:-1] if places else words:
        case [a, "and", p, verb, "each", "other"]:
            return "both", None, frozenset({f"by {a}", f"to {p}"}), (frozenset({f"by {p}", f"to {a}"}), places | {verb})
        case [p, "was", "not", verb, "by", a]:
            kind = "no"
        case [p, "was", verb, "by", a]:
            kind = "some"
        case [a, "did", "not", base, p]:
            kind, verb = "no", PAST[base]
        case ["nobody", verb, p]:
            kind, a = "no", "someone"
        case [a, verb, "nobody"]:
            kind, p = "no", "someone"
        case [a, verb, p]:
            kind = "some"
        case _:
            raise AssertionError(text)
    roles = {f"by {a}", f"to {p}"} - {"by someone", "to someone"}
    return kind, None, frozenset(roles), places | {verb}


def worlds(cells, most, populated):
    """All worlds with a few populated cells: counts [worlds, cells]."""
    rows = [np.zeros((1, cells), np.int16)]
    for k in range(1, populated + 1):
        counts = np.array(list(itertools.product(range(1, most + 1), repeat=k)), np.int16)
        for chosen in itertools.combinations(range(cells), k):
            block = np.zeros((len(counts), cells), np.int16)
            block[:, chosen] = counts
            rows.append(block)
    return np.concatenate(rows)


def powerset(words):
    return [frozenset(c) for k in range(len(words) + 1) for c in itertools.combinations(words, k)]


# A pair is brought to these stand-ins, so that each pattern is looked at once. A world says how many hungry dogs, other
# dogs, hungry animals ... did each of the deeds, or which of three people did what to whom.
SUBJECTS = [{"general"} | extra for extra in powerset(["specific", "adjective"])]
DEEDS = [frozenset()] + [{"GENERAL"} | extra for extra in powerset(["SPECIFIC", "place"])]
ROLES = [frozenset({f"by {a}", f"to {p}"}) for a in "abc" for p in "abc"]
PEOPLE_CELLS = [(s, d) for s in SUBJECTS for d in DEEDS]
EVENT_CELLS = [(r, d) for r in ROLES for d in DEEDS[1:]]
PEOPLE_WORLDS = np.concatenate([worlds(len(PEOPLE_CELLS), 6, 2), worlds(len(PEOPLE_CELLS), 1, 4)])
EVENT_WORLDS = worlds(len(EVENT_CELLS), 1, 3)


def stand_ins(premise, hypothesis):
    """Renames the words of a pair to stand-ins."""
    words = set()
    for _, _, who, what in (premise, hypothesis):
        words |= who | (what if isinstance(what, frozenset) else what[0] | what[1])
    names = {}
    for people, word in zip("ab", sorted({w[3:] for w in words if w[:3] in ("by ", "to ")}), strict=False):
        names |= {f"by {word}": f"by {people}", f"to {word}": f"to {people}"}
    for w in words - names.keys():
        if w in synthetic.PLACES:
            names[w] = "place"
        elif w in synthetic.ADJECTIVES:
            names[w] = "adjective"
        elif w in VERBS or w in VERBS.values():
            names[w] = "SPECIFIC" if w in VERBS else "GENERAL"
        else:
            names[w] = "specific" if w in NOUNS else "general"
    rename = lambda x: tuple(map(rename, x)) if isinstance(x, tuple) else frozenset(names[w] for w in x)
    return tuple((kind, n, rename(who), rename(what)) for kind, n, who, what in (premise, hypothesis))


def counter(cells, population):
    select = lambda who, what: np.array([who <= s and what <= d for s, d in cells])
    return lambda who, what=frozenset(): population @ select(who, what)


def truth(sentence, count):
    """In which worlds a sentence is true, taking for granted nothing, and in which its subject exists."""
    kind, n, who, what = sentence
    everyone = count(who)
    if kind == "both":
        back, what = what
        return (count(who, what) > 0) & (count(back, what) > 0), everyone >= 0
    did = count(who, what)
    says = {
        "every": did == everyone,
        "not every": did < everyone,
        "some": did > 0,
        "no": did == 0,
        "at least": n is not None and did >= n,
        "at most": n is not None and did <= n,
        "exactly": n is not None and did == n,
    }[kind]
    return says, everyone > 0


def judge(premise, hypothesis, count, events):
    """The label by two readings: only the premise's subject exists for sure, or both subjects do."""
    p, p_exists = truth(premise, count)
    h, h_exists = truth(hypothesis, count)
    if events:
        p_exists = h_exists = np.ones_like(p)
    found = set()
    for given in (p & p_exists, p & p_exists & h_exists):
        assert given.any()
        if h[given].all():
            found.add("entailment")
        elif not (h & h_exists)[given].any():
            found.add("contradiction")
        else:
            found.add("neutral")
    return found


@pytest.fixture(scope="module")
def data():
    return synthetic.generate(seed=0)


def sentences(rows):
    return {row[k] for row in rows for k in ("premise", "hypothesis")}


@pytest.fixture(scope="module")
def patterns(data):
    """Every pattern of pairs that the data holds, with its labels and one pair to show."""
    found = collections.defaultdict(dict)
    for row in data["train"] + data["test"]:
        pattern = stand_ins(meaning(row["premise"]), meaning(row["hypothesis"]))
        found[pattern][row["label"]] = (row["premise"], row["hypothesis"])
    return found


def test_labels_hold_in_finite_models(patterns):
    people, events = counter(PEOPLE_CELLS, PEOPLE_WORLDS), counter(EVENT_CELLS, EVENT_WORLDS)
    assert len(patterns) > 1000
    for (premise, hypothesis), labels in patterns.items():
        counted = premise[2] & {"specific", "general"}
        readings = judge(premise, hypothesis, people if counted else events, not counted)
        assert {synthetic.LABELS[i] for i in labels} == readings, labels


def test_the_checker_sees_wrong_labels():
    """The checker itself on pairs whose labels we know."""
    count = counter(PEOPLE_CELLS, PEOPLE_WORLDS)
    known = {
        ("Every animal slept.", "Every dog slept."): {"entailment"},
        ("Every dog slept.", "Some dog slept."): {"entailment"},
        ("No dog slept.", "Not every animal slept."): {"entailment"},
        ("No dog slept.", "No dog napped outside."): {"entailment"},
        ("Every dog slept.", "Every animal slept."): {"neutral"},
        ("Every animal slept.", "Some dog slept."): {"neutral", "entailment"},
        ("Exactly three dogs slept.", "At most two hungry dogs slept."): {"neutral"},
        ("At least three dogs slept.", "At most two animals slept."): {"contradiction"},
        ("Some dog napped.", "No animal slept."): {"contradiction"},
    }
    for pair, expected in known.items():
        assert judge(*stand_ins(*map(meaning, pair)), count, False) == expected, pair


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        ("Emma chased Jack.", "Jack chased Emma.", "neutral"),
        ("Emma chased Jack outside.", "Jack was followed by Emma.", "entailment"),
        ("Nobody followed Jack.", "Emma did not chase Jack.", "entailment"),
        ("Emma and Jack chased each other.", "Emma followed nobody.", "contradiction"),
        ("Emma and Jack chased each other.", "Jack was not chased by Emma upstairs.", "neutral"),
        ("Someone chased Jack.", "Emma chased Jack.", "neutral"),
    ],
)
def test_relations_in_finite_models(premise, hypothesis, expected):
    count = counter(EVENT_CELLS, EVENT_WORLDS)
    assert judge(*stand_ins(meaning(premise), meaning(hypothesis)), count, True) == {expected}


def test_a_label_that_turns_on_existence_is_not_given():
    def quantified(noun, form):
        who = frozenset({"animal"} | ({"dog"} if noun == "dog" else set()))
        region = synthetic.Region(who, frozenset({"slept"}))
        return next(s for s in synthetic._quantifiers(region, noun, "slept") if s.form == form)

    assert synthetic.label(quantified("animal", "every"), quantified("dog", "some")) is None
    assert synthetic.label(quantified("animal", "every"), quantified("dog", "every")) == "entailment"
    assert synthetic.label(quantified("animal", "every"), quantified("dog", "no")) == "contradiction"


def test_no_word_stands_twice_in_the_tables():
    words = [*NOUNS, *NOUNS.values(), *VERBS, *VERBS.values(), *synthetic.NAMES]
    assert len(words) == len(set(words))


def test_rows_are_reproducible_and_numbered(data):
    assert synthetic.generate(40, 20, seed=3) == synthetic.generate(40, 20, seed=3)
    assert synthetic.generate(40, 20, seed=3) != synthetic.generate(40, 20, seed=4)
    assert {k: len(v) for k, v in data.items()} == {"train": 4000, "test": 1000}
    assert [r["idx"] for r in data["test"]] == list(range(1000))
    assert set(data["train"][0]) == {"premise", "hypothesis", "label", "idx"}


def test_labels_are_balanced(data):
    for rows in data.values():
        counts = collections.Counter(r["label"] for r in rows).values()
        assert len(counts) == 3
        assert max(counts) - min(counts) <= 1


def test_test_sentences_are_new_and_their_words_are_not(data):
    train, test = sentences(data["train"]), sentences(data["test"])
    assert not train & test
    assert {w for s in test for w in s.split()} <= {w for s in train for w in s.split()}


def test_few_pairs_are_repeated(data):
    for rows in data.values():
        assert len({(r["premise"], r["hypothesis"]) for r in rows}) > 0.99 * len(rows)
        assert all(r["premise"] != r["hypothesis"] for r in rows)


def test_sentences_are_short_and_well_formed(data):
    for text in sentences(data["train"]):
        assert re.fullmatch(r"[A-Z][a-z]*( [A-Za-z]+)+\.", text), text
        assert len(text.split()) <= 7


@pytest.mark.parametrize(
    ("view", "limit"),
    [
        (lambda p, h: h, 0.4),
        (lambda p, h: p, 0.55),
        (lambda p, h: p + h, 0.5),
        (lambda p, h: [f"premise {w}" for w in p] + [f"hypothesis {w}" for w in h], 0.55),
    ],
    ids=["hypothesis", "premise", "both", "both, told apart"],
)
def test_single_words_do_not_give_the_label_away(data, view, limit):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(analyzer=lambda r: view(r["premise"].split(), r["hypothesis"].split()))
    train, test = words.fit_transform(data["train"]), words.transform(data["test"])
    model = LogisticRegression(max_iter=1000).fit(train, [r["label"] for r in data["train"]])
    assert model.score(test, [r["label"] for r in data["test"]]) < limit
