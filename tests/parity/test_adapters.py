"""Our methods compute what AdapterHub's adapters computes, gradients included; where the two differ, both show.

The goldens come from third_party/parity/make_adapters_goldens.py.
"""

import numpy as np
import peers
import pytest
from peers import ARCHITECTURES, check, golden, linear, load_base, paths

from jpeft.transforms.houlsby import houlsby
from jpeft.transforms.ia3 import ia3
from jpeft.transforms.lora import lora
from jpeft.transforms.mam import mam
from jpeft.transforms.parallel import parallel
from jpeft.transforms.pfeiffer import pfeiffer
from jpeft.transforms.prefix import prefix
from jpeft.transforms.prompt import prompt
from jpeft.transforms.unipelt import unipelt

HEAD = "classifier"
P = 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory):
    return load_base(tmp_path_factory.mktemp(request.param), request.param)


def bottlenecks(base, tensors, places, to=lambda path: path):
    """The adapters beside the LayerNorms at `places`, as leaves at the sites `to(place)`."""

    def own(path):
        name = f"{peers.module(base, path + '/LayerNorm').removesuffix('LayerNorm')}adapters.peer"
        leaves = {"up": linear(tensors, f"{name}.adapter_up")}
        leaves["down"] = linear(tensors, f"{name}.adapter_down.{int(f'{name}.adapter_norm_before.bias' in tensors)}")
        if f"{name}.gate.bias" in tensors:
            leaves["gate"] = linear(tensors, f"{name}.gate")
        if f"{name}.scaling" in tensors:
            leaves["scale"] = tensors[f"{name}.scaling"]
        for end in ("before", "after"):
            norm = f"{name}.adapter_norm_{end}"
            if f"{norm}.bias" in tensors:
                leaves[f"ln_{end}"] = {"scale": tensors[f"{norm}.weight"], "bias": tensors[f"{norm}.bias"]}
        return leaves

    return {to(path): own(path) for path in places}


def factors(base, tensors, path):
    name = f"{peers.module(base, path)}.loras.peer"
    gate = {"gate": linear(tensors, f"{name}.gate")} if f"{name}.gate.bias" in tensors else {}
    return {own: tensors[f"{name}.lora_{own.upper()}"].T for own in "ab"} | gate


def attention(base, layer):
    return f"{base.architecture}.encoder.layer.{layer}.attention.self.prefix_tuning"


def prefix_leaves(base, tensors):
    name = f"{attention(base, 0)}.pool.prefix_tunings.peer.self_prefix"
    shared = {"embedding": tensors[f"{name}.wte.weight"], "mlp": linear(tensors, f"{name}.control_trans.0")}
    return {"shared": shared, **peers.prefix_parts(linear(tensors, f"{name}.control_trans.2"))}


def test_seq_bn_is_pfeiffer(base):
    def leaves(tensors):
        return {"pfeiffer_0": bottlenecks(base, tensors, paths("ffn_add_norm"))}

    check(base, pfeiffer(reduction_factor=4), leaves, HEAD, golden("adapters", base.architecture, "seq_bn"))


def test_double_seq_bn_is_houlsby(base):
    def leaves(tensors):
        return {"houlsby_0": bottlenecks(base, tensors, paths("attention_add_norm", "ffn_add_norm"))}

    check(base, houlsby(reduction_factor=4), leaves, HEAD, golden("adapters", base.architecture, "double_seq_bn"))


def beside(path):
    return path.removesuffix("_add_norm")


def test_par_bn_is_parallel(base):
    def leaves(tensors):
        return {"parallel_0": bottlenecks(base, tensors, paths("ffn_add_norm"), beside)}

    check(base, parallel(reduction_factor=4), leaves, HEAD, golden("adapters", base.architecture, "par_bn"))


def test_scaled_par_bn_has_a_learned_scale(base):
    def leaves(tensors):
        return {"parallel_0": bottlenecks(base, tensors, paths("ffn_add_norm"), beside)}

    method = parallel(reduction_factor=4, learned_scale=True)
    check(base, method, leaves, HEAD, golden("adapters", base.architecture, "scaled_par_bn"))


def test_norms_and_a_constant_scale(base):
    def leaves(tensors):
        return {"pfeiffer_0": bottlenecks(base, tensors, paths("ffn_add_norm"))}

    method = pfeiffer(reduction_factor=4, scale=2.0, ln_before=True, ln_after=True)
    check(base, method, leaves, HEAD, golden("adapters", base.architecture, "seq_bn_norms"))


def test_prefix_tuning(base):
    def leaves(tensors):
        return {"prefix_0": prefix_leaves(base, tensors)}

    check(base, prefix(P, 6), leaves, HEAD, golden("adapters", base.architecture, "prefix_tuning"))


def test_flat_prefix_tuning(base):
    def leaves(tensors):
        name = f"{attention(base, 0)}.pool.prefix_tunings.peer.self_prefix"
        return {"prefix_0": peers.prefix_flat(tensors[f"{name}.control_trans"].reshape(P, -1))}

    check(base, prefix(P, None), leaves, HEAD, golden("adapters", base.architecture, "prefix_tuning_flat"))


def test_lora(base):
    places = paths("attention/query", "attention/value", "ffn/intermediate", "ffn/output")

    def leaves(tensors):
        return {"lora_0": {path: factors(base, tensors, path) for path in places}}

    method = lora(3, 5.0, targets="query|value|intermediate|ffn/output")
    check(base, method, leaves, HEAD, golden("adapters", base.architecture, "lora"))


def test_mam_is_a_prefix_and_parallel_adapters(base):
    def leaves(tensors):
        adapters = bottlenecks(base, tensors, paths("ffn_add_norm"), beside)
        return {"prefix_0": prefix_leaves(base, tensors), "parallel_0": adapters}

    method = mam(P, 6, bottleneck=4)
    check(base, method, leaves, HEAD, golden("adapters", base.architecture, "mam"))


def unipelt_leaves(base, tensors):
    prefixes = prefix_leaves(base, tensors)
    for i in peers.LAYERS:
        prefixes[f"encoder/layer_{i}/attention/core"]["gate"] = linear(
            tensors, f"{attention(base, i)}.prefix_gates.peer"
        )
    return {
        "prefix_0": prefixes,
        "pfeiffer_0": bottlenecks(base, tensors, paths("ffn_add_norm")),
        "lora_0": {path: factors(base, tensors, path) for path in paths("attention/query", "attention/value")},
    }


def gated():
    return unipelt(num_virtual_tokens=P, mlp_hidden=6, reduction_factor=4, rank=3)


def test_unipelt(base):
    peer = golden("adapters", base.architecture, "unipelt")
    mask = peer.inputs["attention_mask"]
    assert mask.all()
    check(base, gated(), lambda tensors: unipelt_leaves(base, tensors), HEAD, peer, mask=mask)


def test_unipelt_gates_without_padding(base):
    """The peer's gates are means over padding, too, as ours are without a mask. With it, a row is what it is alone."""
    peer = golden("adapters", base.architecture, "unipelt_padded")

    def leaves(tensors):
        return unipelt_leaves(base, tensors)

    check(base, gated(), leaves, HEAD, peer, mask=None)
    given, mask = peers.mapped(leaves, HEAD, peer), peer.inputs["attention_mask"]
    ours = peers.logits(base, gated(), *given, peer.inputs, mask)
    assert np.abs(ours - peer.logits).max() > 1e-2
    for row, length in enumerate(mask.sum(1)):
        alone = {name: x[row : row + 1, :length] for name, x in peer.inputs.items()}
        np.testing.assert_allclose(
            ours[row : row + 1], peers.logits(base, gated(), *given, alone, alone["attention_mask"]), atol=peers.LOGITS
        )


def test_ia3(base):
    places = ("attention/key", "attention/value", "ffn/intermediate")

    def scale(tensors, path):
        return {"scale": tensors[f"{peers.module(base, path)}.loras.peer.lora_B"].reshape(-1)}

    def leaves(tensors):
        return {"ia3_0": {path: scale(tensors, path) for path in paths(*places)}}

    check(base, ia3(placement="before"), leaves, HEAD, golden("adapters", base.architecture, "ia3"))


def test_prompt_tuning(base):
    """The peer's prompts join the tokens after LayerNorm; they have no positions."""
    name = f"{base.architecture}.prompt_tuning.prompt_tunings.peer.prompt_embedding.weight"

    def leaves(tensors):
        return {"prompt_0": {"encoder": {"embedding": tensors[name]}}}

    peer = golden("adapters", base.architecture, "prompt_tuning")
    check(base, prompt(P, placement="states"), leaves, HEAD, peer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_method_of_the_golden_is_compared(architecture):
    bottlenecks = {"seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "seq_bn_norms"}
    others = {"prefix_tuning", "prefix_tuning_flat", "prompt_tuning", "lora", "ia3", "mam", "unipelt", "unipelt_padded"}
    assert peers.methods("adapters", architecture) == bottlenecks | others
