"""Quantised kernels against loops over blocks in NumPy, and what a step on them computes, differentiates and keeps."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.partition import split
from jpeft.core.quantised import BOOKS, DYNAMIC, KINDS, Quantised, dense
from jpeft.core.site import Site
from jpeft.models import Bert, BertConfig
from jpeft.models.bert import narrowed
from jpeft.models.conversion import fingerprint
from jpeft.transforms.registry import METHODS, MODULES

KERNEL = "encoder/layer_0/ffn/intermediate/kernel"
CONFIG = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64, num_labels=2,
)  # fmt: skip
MODEL, IDS = Bert(CONFIG), jnp.ones((2, 8), int)
SITES = jpeft.sites(MODEL, IDS)


def shapes(model, *args):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *args)["params"])


PARAMS = randomised(shapes(MODEL, IDS))


def doubled(arrays):
    return jax.tree.map(lambda x: x.astype(jnp.float64), arrays)


def rounded(value, book):
    """The nearest entry of a book."""
    return book[np.argmin(np.abs(book.astype(np.float64) - value))]


def by_blocks(kernel, kind):
    """A kernel there and back in float64, block after block."""
    flat = np.asarray(kernel, np.float64).T.reshape(-1)
    blocks = [flat[i : i + 64] for i in range(0, flat.size, 64)]
    absmax = np.array([np.abs(block).max() for block in blocks])
    rest = absmax - absmax.mean()
    for i in range(0, rest.size, 256):
        largest = np.abs(rest[i : i + 256]).max() or 1.0
        rest[i : i + 256] = [rounded(x / largest, DYNAMIC) * largest for x in rest[i : i + 256]]
    back = [
        [rounded(x / own, BOOKS[kind]) * scale for x in block]
        for block, own, scale in zip(blocks, absmax, rest + absmax.mean(), strict=True)
    ]
    return np.concatenate(back).reshape(kernel.T.shape).T


def by_outputs(kernel):
    columns = np.asarray(kernel, np.float64).T
    return np.array([np.rint(127 * x / np.abs(x).max()) / 127 * np.abs(x).max() for x in columns]).T


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_loops_over_blocks(toy, kind):
    kernel = tree.at(toy.params, KERNEL)  # 384 entries; the query's 256 are whole blocks, too
    made = tree.get(jpeft.quantise(toy.params, toy.sites, kind), KERNEL)
    assert isinstance(made, Quantised)
    assert (made.shape, made.ndim, made.size, made.dtype) == (kernel.shape, 2, kernel.size, kernel.dtype)
    expected = by_outputs(kernel) if kind == "int8" else by_blocks(kernel, kind)
    np.testing.assert_allclose(dense(made), expected, rtol=0, atol=1e-6)
    assert 0 < np.abs(dense(made) - kernel).max() < {"nf4": 0.2, "fp4": 0.2, "int8": 0.005}[kind] * np.abs(kernel).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_of_zeros_and_one_of_half_precision(kind):
    kernels = {"a": jnp.zeros((5, 7)), "b": jnp.ones((5, 7), jnp.bfloat16)}
    params = {f"layer_{name}": {"kernel": x} for name, x in kernels.items()}
    where = {name: Site(name, 0, "Dense", {"kernel": jax.ShapeDtypeStruct((5, 7), "float32")}, ()) for name in params}
    back = dense(jpeft.quantise(params, where, kind))
    chex.assert_trees_all_equal(back, params)
    chex.assert_trees_all_equal_dtypes(back, params)


def test_only_the_kernels_of_layers_are_quantised_less_the_exceptions(toy):
    def quantised(**options):
        params = jpeft.quantise(toy.params, toy.sites, "nf4", **options)
        found = {path for path, x in tree.flatten(params).items() if isinstance(x, Quantised)}
        others = [path for path in tree.flatten(params) if path not in found]
        assert all(tree.flatten(params)[path] is tree.flatten(toy.params)[path] for path in others)
        return {"/".join(path) for path in found}

    every = {"/".join(p) for p in tree.flatten(toy.params) if p[0] == "encoder" and p[-1] == "kernel"}
    assert quantised() == every
    assert len(every) == 12
    assert quantised(exceptions="layer_0/.*|query") == {p for p in every if "layer_1" in p and "query" not in p}
    assert quantised(targets="pooler") == {"pooler/kernel"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "nf3"}, "cannot quantise as 'nf3': did you mean 'nf4'"),
        ({"targets": "qeury"}, "pattern 'qeury' matches no site of the model: did you mean 'query'"),
        ({"exceptions": "qeury"}, "exceptions 'qeury' match none of the layers to quantise: did you mean 'query'"),
        ({"targets": "LayerNorm"}, "is not one of the layers with a kernel"),
    ],
)
def test_what_cannot_be_quantised_is_one_line(toy, options, message):
    with pytest.raises(UserError, match=message):
        jpeft.quantise(toy.params, toy.sites, **options)


def test_a_kernel_that_is_quantised_or_not_finite_is_one_line(toy):
    once = jpeft.quantise(toy.params, toy.sites)
    with pytest.raises(UserError, match="is quantised already, as nf4"):
        jpeft.quantise(once, toy.sites)
    with pytest.raises(UserError, match="the kernel of site 'encoder/layer_0/ffn/intermediate' is not finite"):
        jpeft.quantise(tree.replace(toy.params, KERNEL, lambda x: x.at[0, 0].set(jnp.nan)), toy.sites)


def test_counts_are_of_parameters_and_hashes_of_codes(toy):
    made = {kind: jpeft.quantise(toy.params, toy.sites, kind) for kind in KINDS}
    assert {tree.count(params) for params in made.values()} == {tree.count(toy.params)}
    assert len({fingerprint(params) for params in (toy.params, *made.values())}) == 4
    chex.assert_trees_all_equal(narrowed(made["nf4"], "bfloat16")["encoder"]["layer_0"]["ffn"]["output"]["kernel"],
                                made["nf4"]["encoder"]["layer_0"]["ffn"]["output"]["kernel"])  # fmt: skip
    method = jpeft.lora()
    leaves = jpeft.init(method, jax.random.key(0), toy.sites, made["nf4"])
    assert jpeft.summary(method, leaves, made["nf4"]) == jpeft.summary(method, leaves, toy.params)


def test_gradients_are_those_of_the_dense_kernels():
    """DoRA reads its site's parameters; BitFit trains what lies beside a quantised kernel. Computed in float64."""
    method = jpeft.chain(jpeft.lora(), jpeft.dora(targets="ffn/output"), jpeft.bitfit(targets="intermediate"))
    with jax.enable_x64(True):
        model, params = Bert(dataclasses.replace(MODEL.config, dtype="float64")), doubled(PARAMS)
        coded = jpeft.quantise(params, SITES)
        leaves = doubled(randomised(jpeft.init(method, jax.random.key(0), SITES, coded)))

        def loss(leaves, params):
            return (jpeft.apply(model, method, {"params": params, "peft": leaves}, IDS)[0] ** 2).sum()

        grads = jax.jit(jax.grad(loss))
        got, wanted = (jax.tree.leaves(grads(leaves, base)) for base in (coded, dense(coded)))
        for a, b in zip(got, wanted, strict=True):
            assert jnp.linalg.norm(a - b) <= 1e-6 * jnp.linalg.norm(b)


def test_merged_weights_are_dense_and_give_the_same_logits():
    method, coded = jpeft.chain(jpeft.lora(), jpeft.pissa(targets="ffn/output")), jpeft.quantise(PARAMS, SITES)
    leaves = randomised(jpeft.init(method, jax.random.key(0), SITES, coded))
    merged = jpeft.merge(method, leaves, coded)
    assert not merged.transform.members

    @jax.jit
    def both(leaves, coded, merged):
        plain = MODEL.apply({"params": merged}, IDS)[0]  # without jpeft, which needs arrays
        return jpeft.apply(MODEL, method, {"params": coded, "peft": leaves}, IDS)[0], plain

    logits, plain = both(leaves, coded, merged.params)
    np.testing.assert_allclose(plain, logits, rtol=0, atol=2e-5)


def test_names_that_train_cannot_be_quantised(toy):
    coded = jpeft.quantise(toy.params, toy.sites)
    with pytest.raises(UserError, match="trains names 'encoder', which has quantised kernels"):
        jpeft.partition(jpeft.chain(), coded, {}, trains=["encoder", "classifier"])


@pytest.mark.parametrize("name", MODULES)
def test_every_method_has_a_step(name):
    """Traced alone: what it computes, other tests compare."""
    options = {"reduction_factor": 2} if name == "ladder_side" else {"ratio": 0.5} if "mask" in name else {}
    options |= {"ratio": 0.5} if name == "fish" else {"num_layers": 1} if name == "top_k_layers" else {}
    method, coded = METHODS[name].make(**options), jpeft.quantise(PARAMS, SITES)

    def loss(leaves, fixed):
        variables = {"params": coded, "peft": tree.union(leaves, fixed)}
        key = jax.random.key(0)
        return jpeft.apply(MODEL, method, variables, IDS, IDS, mask=IDS, train=True, rngs={"dropout": key})[0].sum()

    leaves, fixed = split(jpeft.init(method, jax.random.key(0), SITES, coded))
    grads = jax.eval_shape(jax.grad(loss), leaves, fixed)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, leaves)
    assert tree.count(grads)


def test_masks_are_of_dense_kernels():
    method, coded = jpeft.magnitude_mask(ratio=0.1, targets="query"), jpeft.quantise(PARAMS, SITES)
    got, wanted = (jpeft.init(method, jax.random.key(0), SITES, params) for params in (coded, dense(coded)))
    chex.assert_trees_all_equal(got, wanted)


class Stack(nn.Module):
    """A scan over three layers whose kernels are stacked."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(8, name="proj")(x)), None

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


def test_stacked_kernels_are_quantised_copy_by_copy():
    model, x = Stack(), jnp.ones((2, 8))
    params = randomised(shapes(model, x))
    coded = jpeft.quantise(params, jpeft.sites(model, x))
    stacked = tree.get(coded, "layers/proj/kernel")
    assert (stacked.shape, stacked.codes.shape) == ((3, 8, 8), (3, 32))
    expected = np.stack([by_blocks(kernel, "nf4") for kernel in params["layers"]["proj"]["kernel"]])
    np.testing.assert_allclose(dense(stacked), expected, rtol=0, atol=1e-6)
    method = jpeft.lora(targets="proj", rank=2)
    leaves = randomised(jpeft.init(method, jax.random.key(0), jpeft.sites(model, x), coded))

    @jax.jit
    def grad(params):
        return jax.grad(lambda leaves: jpeft.apply(model, method, {"params": params, "peft": leaves}, x).sum())(leaves)

    got, wanted = grad(coded), grad(dense(coded))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)


def test_memory(optimised):
    """Neither pass holds more than a few dense kernels at once, however many layers there are."""
    layers, size = 12, 256
    model, x = nn.Sequential([nn.Dense(size) for _ in range(layers)]), jnp.ones((2, size))
    params = randomised(shapes(model, x), scale=0.02)
    sites, method = jpeft.sites(model, x), jpeft.lora(rank=2, targets=".*")
    leaves = jpeft.init(method, jax.random.key(0), sites, params)

    def kernels(params):
        return tree.num_bytes([x for path, x in tree.flatten(params).items() if path[-1] == "kernel"])

    def needed(params, before=lambda params: params):
        def loss(leaves, params):
            return jpeft.apply(model, method, {"params": before(params), "peft": leaves}, x).sum()

        return jax.jit(jax.grad(loss)).lower(leaves, params).compile().memory_analysis().temp_size_in_bytes

    coded = {kind: jpeft.quantise(params, sites, kind) for kind in KINDS}
    assert kernels(coded["nf4"]) == kernels(coded["fp4"]) <= 0.14 * kernels(params)
    assert kernels(coded["int8"]) <= 0.26 * kernels(params)
    assert needed(coded["nf4"]) - needed(params) <= 3 * kernels(params) / layers
    assert needed(coded["nf4"], before=dense) - needed(params) >= 0.9 * kernels(params)  # if they were kept


class Above(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (4, 4))
        return nn.Dense(4, name="proj")(x @ kernel)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Above(name="block")(x)


def test_a_kernel_above_other_modules_is_not_quantised():
    """What is below it would not be reached by the hook."""
    x = jnp.ones((2, 4))
    params = Nested().init(jax.random.key(0), x)["params"]
    with pytest.raises(UserError, match=r"'block' .* is not one of the layers with a kernel"):
        jpeft.quantise(params, jpeft.sites(Nested(), x), "int8", targets="block")
    assert jpeft.quantise(params, jpeft.sites(Nested(), x), "int8", targets="proj")


def test_int8_has_a_scale_for_each_output_of_a_dense_general():
    """Heads of very different sizes are as precise as in a Dense layer with as many outputs."""
    x = jnp.ones((2, 32))
    model = nn.Sequential([nn.DenseGeneral((4, 8))])
    kernel = np.random.default_rng(0).normal(size=(32, 4, 8)) * 10.0 ** np.arange(4)[:, None]
    params = {"layers_0": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros((4, 8))}}
    coded = jpeft.quantise(params, jpeft.sites(model, x), "int8", targets="layers_0")["layers_0"]["kernel"]
    assert coded.scales[0].shape == (32,)
    errors = np.abs(dense(coded) - kernel).max((0, 2)) / np.abs(kernel).max((0, 2))
    assert errors.max() < 0.005


class Noisy(nn.Module):
    """Keeps the mean of its squares, and drops what it gives."""

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.lecun_normal(), (64, 64))
        self.sow("losses", "squares", jnp.square(y).mean())
        return y * jax.random.bernoulli(self.make_rng("dropout"), 0.5, y.shape) if self.has_rng("dropout") else y


def test_layers_of_ones_own_draw_and_keep_nothing_silently():
    model, x = nn.Sequential([Noisy()]), jnp.ones((4, 64))
    params = model.init(jax.random.key(0), x)["params"]
    coded = jpeft.quantise(params, jpeft.sites(model, x), "nf4", targets="layers_0")
    variables = {"params": coded, "peft": {}}
    assert (
        0.3 < (jpeft.apply(model, jpeft.chain(), variables, x, rngs={"dropout": jax.random.key(1)}) == 0).mean() < 0.7
    )
    with pytest.raises(UserError, match="layers_0 keeps losses, which a quantised layer cannot hand on"):
        jpeft.apply(model, jpeft.chain(), variables, x, mutable=["losses"])
    _, kept = jpeft.apply(model, jpeft.chain(), {"params": params, "peft": {}}, x, mutable=["losses"])
    assert jax.tree.leaves(kept)
