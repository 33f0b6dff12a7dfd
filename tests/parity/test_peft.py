"""Our methods compute what Hugging Face peft computes, gradients included; where the two differ on purpose, both show.

The goldens come from third_party/parity/make_peft_goldens.py.
"""

import jax
import numpy as np
import peers
import pytest
from peers import ARCHITECTURES, check, golden, linear, load_base, paths

import jpeft
from jpeft.transforms.dora import dora
from jpeft.transforms.ia3 import ia3
from jpeft.transforms.lora import lora, rslora
from jpeft.transforms.p_tuning import p_tuning
from jpeft.transforms.pissa import pissa
from jpeft.transforms.prefix import prefix
from jpeft.transforms.prompt import prompt

HEAD = "base_model.model.classifier.modules_to_save.default"
PROMPT_HEAD = "base_model.classifier.modules_to_save.default"
WIDE = paths("attention/query", "attention/value", "attention/output", "ffn/intermediate", "ffn/output")
TARGETS = "query|value|output|intermediate"
P = 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory):
    return load_base(tmp_path_factory.mktemp(request.param), request.param)


def factors(base, tensors, path):
    name = f"base_model.model.{peers.module(base, path)}"
    return {own: tensors[f"{name}.lora_{own.upper()}.default.weight"].T for own in "ab"}


@pytest.mark.parametrize(("name", "make"), [("lora", lora), ("rslora", rslora)])
def test_lora_and_rslora(base, name, make):
    def leaves(tensors):
        return {f"{name}_0": {path: factors(base, tensors, path) for path in WIDE}}

    check(base, make(3, 5.0, targets=TARGETS), leaves, HEAD, golden("peft", base.architecture, name))


def test_dora(base):
    def own(tensors, path):
        magnitude = tensors[f"base_model.model.{peers.module(base, path)}.lora_magnitude_vector.default.weight"]
        return {**factors(base, tensors, path), "magnitude": magnitude}

    def leaves(tensors):
        return {"dora_0": {path: own(tensors, path) for path in WIDE}}

    check(base, dora(3, 5.0, targets=TARGETS), leaves, HEAD, golden("peft", base.architecture, "dora"))


def test_pissa(base):
    """peft puts what is left of W in the place of W; ours keeps W and takes the start away."""
    peer, method = golden("peft", base.architecture, "pissa"), pissa(3, 5.0, targets=TARGETS)
    start = {path: factors(base, peer.start, path) for path in WIDE}

    def leaves(tensors):
        return {"pissa_0": {path: {**factors(base, tensors, path), "fixed": start[path]} for path in WIDE}}

    check(base, method, leaves, HEAD, peer)
    for path, own in jpeft.init(method, jax.random.key(0), base.sites, base.params)["pissa_0"].items():
        np.testing.assert_allclose(own["a"] @ own["b"], start[path]["a"] @ start[path]["b"], atol=1e-5)


def prefix_leaves(tensors):
    encoder = "prompt_encoder.default"
    parts = peers.prefix_parts(linear(tensors, f"{encoder}.transform.2"))
    mlp = linear(tensors, f"{encoder}.transform.0")
    return {"prefix_0": {"shared": {"embedding": tensors[f"{encoder}.embedding.weight"], "mlp": mlp}, **parts}}


def flat_leaves(tensors):
    return {"prefix_0": peers.prefix_flat(tensors["prompt_encoder.default.embedding.weight"])}


@pytest.mark.parametrize(
    ("name", "hidden", "leaves"), [("prefix", 6, prefix_leaves), ("prefix_flat", None, flat_leaves)]
)
def test_prefix_at_the_positions_that_peft_shifts(base, name, hidden, leaves):
    """Past keys make peft count positions from P. Ours count from 0, as AdapterHub's do, unless told otherwise."""
    method, peer = prefix(P, hidden), golden("peft", base.architecture, name)
    shape = peer.inputs["input_ids"].shape
    told = {**peer.inputs, "positions": np.broadcast_to(P + np.arange(shape[1]), shape)}
    check(base, method, leaves, PROMPT_HEAD, peer, inputs=told)

    def shifted(tensors):
        return {"prefix_0": {**leaves(tensors)["prefix_0"], "embeddings/inputs": {}}}

    check(base, prefix(P, hidden, shift_positions=True), shifted, PROMPT_HEAD, peer)
    unshifted = peers.logits(base, method, *peers.mapped(leaves, PROMPT_HEAD, peer), peer.inputs)
    assert np.abs(unshifted - peer.logits).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("ia3", ("attention/key", "attention/value", "attention/output", "ffn/output")),
        ("ia3_inner", ("attention/key", "attention/value", "ffn/intermediate")),
    ],
)
def test_ia3(base, name, places):
    """peft's own targets scale what goes into the two output layers; the inner activations can be scaled instead."""

    def scale(tensors, path):
        return {"scale": tensors[f"base_model.model.{peers.module(base, path)}.ia3_l.default"].reshape(-1)}

    def leaves(tensors):
        return {"ia3_0": {path: scale(tensors, path) for path in paths(*places)}}

    check(base, ia3(targets="|".join(places)), leaves, HEAD, golden("peft", base.architecture, name))


def test_prompt(base):
    """On RoBERTa peft numbers the padding like text, where ours stays at its own position; no token sees either."""

    def leaves(tensors):
        return {"prompt_0": {"embeddings/inputs": {"embedding": tensors["prompt_encoder.default.embedding.weight"]}}}

    check(base, prompt(P), leaves, PROMPT_HEAD, golden("peft", base.architecture, "prompt"))


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_p_tuning(base, encoder):
    name = "prompt_encoder.default"

    def direction(tensors, layer, suffix):
        def part(kind):
            kernel, bias = (tensors[f"{name}.lstm_head.{x}_{kind}_l{layer}{suffix}"] for x in ("weight", "bias"))
            return {"kernel": kernel.T, "bias": bias}

        return {"input": part("ih"), "recurrent": part("hh")}

    def leaves(tensors):
        mlp = ("mlp_head.0", "mlp_head.2") if encoder == "lstm" else ("mlp_head.0", "mlp_head.2", "mlp_head.4")
        own = {
            "embedding": tensors[f"{name}.embedding.weight"],
            "mlp": {str(i): linear(tensors, f"{name}.{at}") for i, at in enumerate(mlp)},
        }
        if encoder == "lstm":
            ways = (("forward", ""), ("backward", "_reverse"))
            own["lstm"] = {str(i): {way: direction(tensors, i, end) for way, end in ways} for i in range(2)}
        return {"p_tuning_0": {"embeddings/inputs": own}}

    method = p_tuning(P, encoder, hidden=6)
    check(base, method, leaves, PROMPT_HEAD, golden("peft", base.architecture, f"p_tuning_{encoder}"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_method_of_the_golden_is_compared(architecture):
    low_rank, text = (
        {"lora", "rslora", "dora", "pissa", "ia3", "ia3_inner"},
        {"prompt", "p_tuning_lstm", "p_tuning_mlp"},
    )
    assert peers.methods("peft", architecture) == low_rank | text | {"prefix", "prefix_flat"}
