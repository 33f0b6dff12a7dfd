"""Models as users write them: calls within calls, names that leaves need, boxes, parameters that come back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import site
from jpeft.core.errors import UserError
from jpeft.core.transform import FIXED, SHARED, STACKED

X = jax.random.normal(jax.random.key(0), (3, 8))


class Thin(nn.Dense):
    def __call__(self, inputs):
        return super().__call__(inputs)


class Halved(nn.Dense):
    def __call__(self, inputs):
        return 0.5 * super().__call__(inputs)


class Around(nn.Module):
    def setup(self):
        self.inner = nn.Dense(6)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


class Net(nn.Module):
    """One module of a kind, under a name."""

    kind: type
    name_: str = "proj"
    options: dict | None = None

    @nn.compact
    def __call__(self, x):
        return self.kind(**(self.options or {}), name=self.name_)(x)


def started(model, method, x=X):
    params = model.init(jax.random.key(1), x)["params"]
    leaves = jpeft.init(method, jax.random.key(2), jpeft.sites(model, x), nn.unbox(params))
    return params, jax.tree.map(lambda leaf: leaf + 0.3, leaves)


@pytest.mark.parametrize("kind", [Thin, Halved, Around])
def test_a_call_within_a_call_of_one_path_is_wrapped_once(kind):
    model = Net(kind, options={} if kind is Around else {"features": 6})
    method = jpeft.lora(2, alpha=2, targets="proj")
    params, leaves = started(model, method)
    own = leaves["lora_0"]["proj"]
    added = jpeft.apply(model, method, {"params": params, "peft": leaves}, X) - model.apply({"params": params}, X)
    np.testing.assert_allclose(added, X @ own["a"] @ own["b"], rtol=1e-5, atol=1e-5)


def test_a_call_within_a_call_merges_and_is_the_same_on_a_quantised_base():
    model, method = Net(Thin, options={"features": 6}), jpeft.lora(2, targets="proj")
    params, leaves = started(model, method)
    whole = jpeft.apply(model, method, {"params": params, "peft": leaves}, X)
    merged = model.apply({"params": jpeft.merge(method, leaves, params).params}, X)
    np.testing.assert_allclose(whole, merged, rtol=1e-5, atol=1e-5)
    coded = jpeft.quantise(params, jpeft.sites(model, X), "int8", targets="proj")
    np.testing.assert_allclose(jpeft.apply(model, method, {"params": coded, "peft": leaves}, X), whole, atol=0.1)


@pytest.mark.parametrize("name", site.RESERVED)
def test_a_name_that_leaves_need_is_refused(name):
    model = Net(nn.Dense, name, {"features": 6})
    with pytest.raises(UserError, match=f"site '{name}' has a name that leaves need for themselves"):
        jpeft.init(jpeft.lora(2, targets=".*"), jax.random.key(0), jpeft.sites(model, X))


def test_the_names_that_leaves_need():
    assert set(site.RESERVED) == {SHARED, STACKED, FIXED}


def test_a_gate_opens_for_its_own_row_in_an_attention_with_heads():
    x = jax.random.normal(jax.random.key(3), (5, 5, 8))  # as many rows as tokens
    model, method = nn.MultiHeadDotProductAttention(2), jpeft.lora(2, targets="query", gate=True)
    params = model.init(jax.random.key(1), x)["params"]
    leaves = jpeft.init(method, jax.random.key(2), jpeft.sites(model, x))
    leaves = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(4), leaf.shape), leaves)
    variables = {"params": params, "peft": leaves}
    together = jpeft.apply(model, method, variables, x)
    alone = [jpeft.apply(model, method, variables, x[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(together, jnp.concatenate(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"a gate needs a mask \[rows, tokens\], got \(5, 1, 5, 5\)"):
        jpeft.apply(model, method, variables, x, mask=jnp.ones((5, 1, 5, 5)))


def test_parameters_in_boxes():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = Net(nn.Dense, options={"features": 6, "kernel_init": boxed})
    method = jpeft.lora(2, targets=".*")
    params, leaves = started(model, method)
    with pytest.raises(UserError, match=r"in boxes.*nn\.unbox"):
        jpeft.apply(model, method, {"params": params, "peft": leaves}, X)
    with pytest.raises(UserError, match=r"in boxes.*nn\.unbox"):
        jpeft.init(jpeft.pissa(2), jax.random.key(0), jpeft.sites(model, X), params)
    plain = nn.unbox(params)
    whole = jpeft.apply(model, method, {"params": plain, "peft": leaves}, X)
    merged = model.apply({"params": jpeft.merge(method, leaves, plain).params}, X)
    np.testing.assert_allclose(whole, merged, rtol=1e-5, atol=1e-5)


class Named(nn.Module):
    HEAD = "lm_head"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="lm_head")(nn.Dense(8, name="lm")(x))


def test_a_head_named_by_one_string():
    assert {path: s.head for path, s in jpeft.sites(Named(), X).items()} == {"lm": False, "lm_head": True}


EDITS = [jpeft.bitfit(), jpeft.said(16, targets=".*"), jpeft.magnitude_mask(count=40)]  # of parameters, not of sites


@pytest.mark.parametrize("method", [*EDITS, jpeft.lora(2, targets="lm")])
def test_mutable_parameters_come_back_as_they_were_given(method):
    params = Named().init(jax.random.key(1), X)["params"]
    leaves = jpeft.init(method, jax.random.key(2), jpeft.sites(Named(), X), params)
    leaves = jax.tree.map(lambda leaf: leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, leaves)
    _, updated = jpeft.apply(Named(), method, {"params": params, "peft": leaves}, X, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, updated["params"], params)


@pytest.mark.parametrize("method", [*EDITS, jpeft.top_k_layers(1)])
def test_methods_without_a_wrap_keep_a_base_in_bfloat16(method):
    model = nn.Sequential([nn.Dense(8, param_dtype=jnp.bfloat16), nn.Dense(8, param_dtype=jnp.bfloat16)])
    x = X.astype(jnp.bfloat16)
    params = model.init(jax.random.key(1), x)["params"]
    leaves = jpeft.init(method, jax.random.key(2), jpeft.sites(model, x), params)
    assert jpeft.apply(model, method, {"params": params, "peft": leaves}, x).dtype == jnp.bfloat16


class Flagged(nn.Module):
    features: int = 6

    @nn.compact
    def __call__(self, x, deterministic=True):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return x @ kernel * (1.0 if deterministic else 0.5)


class FlaggedNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Flagged(name="proj")(x, True)


LAYERS = [jpeft.lora(2, targets="proj"), jpeft.dora(2, targets="proj"), jpeft.pissa(2, targets="proj"),
          jpeft.krona(targets="proj"), jpeft.ia3(targets="proj")]  # fmt: skip


@pytest.mark.parametrize("method", LAYERS)
def test_a_dense_layer_with_a_further_argument(method):
    model = FlaggedNet()
    params = model.init(jax.random.key(1), X)["params"]
    leaves = jpeft.init(method, jax.random.key(2), jpeft.sites(model, X), params)
    whole = jpeft.apply(model, method, {"params": params, "peft": leaves}, X)
    np.testing.assert_allclose(whole, model.apply({"params": params}, X), rtol=1e-4, atol=1e-5)


class Auxiliary(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="body")(x)
        return (x, nn.Dense(3, name="aux")(x)) if train else x


def test_a_head_that_only_training_reaches():
    model, method = Auxiliary(), jpeft.lora(2, targets=".*")
    params = model.init(jax.random.key(1), X, train=True)["params"]
    leaves = jpeft.init(method, jax.random.key(2), jpeft.sites(model, X, train=True))
    variables = {"params": params, "peft": leaves}
    np.testing.assert_array_equal(
        jpeft.apply(model, method, variables, X), jpeft.apply(model, method, variables, X, train=True)[0]
    )
    wrong = {"lora_0": {"axu": leaves["lora_0"]["aux"]}}
    with pytest.raises(UserError, match="leaves for site 'axu', which the model does not have"):
        jpeft.apply(model, method, {"params": params, "peft": wrong}, X)


KEY, SITES = jax.random.key(0), jpeft.sites(Named(), X)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jpeft.init(jpeft.lora(targets=["a", "b"]), KEY, SITES), "a pattern is one string"),
        (lambda: jpeft.init(jpeft.lora(targets=".*", layers=0), KEY, SITES), "layers must be a list"),
        (lambda: jpeft.lora(dropout="0.1"), "dropout must be at least 0 and below 1, got '0.1'"),
        (lambda: jpeft.init(jpeft.lora, KEY, SITES), r"expected a transform, such as jpeft.lora\(\)"),
        (lambda: jpeft.init(jpeft.lora(), KEY, Named()), "expected the sites of the model"),
        (lambda: jpeft.init(jpeft.lora(targets="lm"), 0, SITES), "expected a PRNG key.*got 0"),
        (lambda: jpeft.partition(jpeft.chain(), {}, {}, trains=None), "trains must be names"),
    ],
)
def test_slips_are_told_in_one_line(call, said):
    with pytest.raises(UserError, match=said):
        call()


@pytest.mark.parametrize("order", ["io", "oi"])
def test_an_einsum_is_no_dense_layer(order):
    """Its kernel may be turned, and a square one does not show it."""
    model = nn.Sequential([nn.Dense(8), nn.Einsum((8, 8), f"...i,{order}->...o")])
    sites = jpeft.sites(model, jnp.ones((2, 8)))
    with pytest.raises(UserError, match="layers_1"):
        jpeft.init(jpeft.lora(targets="layers_1"), jax.random.key(0), sites)
    assert set(jpeft.init(jpeft.lora(targets=".*"), jax.random.key(0), sites)["lora_0"]) == {"layers_0"}


def test_steps_of_a_loop_are_traced_once():
    steps = []

    class Cell(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry, x):
            steps.append(x)
            return (carry := nn.Dense(4, name="step")(carry) + x), carry

        def initialize_carry(self, rng, input_shape):
            return jnp.zeros((input_shape[0], 4))

        @property
        def num_feature_axes(self):
            return 1

    sites = jpeft.sites(nn.RNN(Cell()), jnp.ones((2, 50, 4)))
    assert [path for path in sites if path.endswith("step")]
    assert len(steps) < 10


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(x)


class Row(nn.Module):
    kind: type[nn.Module]

    def setup(self):
        self.blocks = [self.kind() for _ in range(3)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_equal_blocks_under_nn_jit_are_all_listed():
    """They are traced once, so that the hook sees the first alone."""
    x = jnp.ones((2, 4))
    assert list(jpeft.sites(Row(nn.jit(Inner)), x)) == list(jpeft.sites(Row(Inner), x))
