"""The head fitted on frozen features, against scikit-learn on features that are read by hand."""

import jax
import numpy as np
import optax
import pytest

import jpeft
from jpeft import UserError
from jpeft.core import tree
from jpeft.data.batching import Batch
from jpeft.models import Bert, BertConfig
from jpeft.training.head import features, fit_head, last_dense


@pytest.fixture(scope="module", params=["bert", "roberta"])
def model(request):
    config = BertConfig(
        model_type=request.param, vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16, initializer_range=0.5, num_labels=3,
    )  # fmt: skip
    model = Bert(config)
    ids = np.random.default_rng(0).integers(2, 30, (120, 6)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    batch = Batch(ids, np.ones_like(ids), np.zeros_like(ids), ids[:, 1] % 3, np.ones(len(ids), np.float32))
    return model, params, batch, jpeft.sites(model, ids)


def test_a_head_for_several_classes_is_a_logistic_regression_for_each(model):
    _, params, _, sites = model
    site, rng = last_dense(sites), np.random.default_rng(1)
    read = rng.normal(size=(120, 8)).astype(np.float32)
    labels = np.stack([read[:, 0] > 0, read[:, 1] + 0.5 * rng.normal(size=120) > 1, np.arange(120) == 0], 1)
    fitted = tree.at(fit_head(params, site, read, labels.astype(np.float32)), site.path)
    logits = read @ np.asarray(fitted["kernel"]) + np.asarray(fitted["bias"])
    assert ((logits > 0) == labels).mean(0)[:2].min() > 0.85
    np.testing.assert_allclose(logits[:, 2], np.log(1.5 / 119.5), rtol=1e-5)  # too few to fit: how often it occurs


def test_the_fitted_head_lowers_the_loss_and_leaves_the_rest_alone(model):
    model, params, batch, sites = model
    site = last_dense(sites)
    assert site.path == ("classifier" if model.config.model_type == "bert" else "classifier/out_proj")
    read = np.asarray(jax.jit(features(model, site))(params, batch))
    fitted = fit_head(params, site, read, batch.labels)

    def loss(params):
        logits = model.apply({"params": params}, batch.input_ids, batch.attention_mask, batch.token_type_ids)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    before, after = jax.jit(loss)(params), jax.jit(loss)(fitted)
    assert after < before - 0.05
    # Only the last layer of the head is new.
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool((a == b).all()), params, fitted)
        )
        if not same
    ]
    assert changed == [f"{site.path}/bias", f"{site.path}/kernel"]


def test_two_classes_and_absent_ones(model):
    _, params, _, sites = model
    site, rng = last_dense(sites), np.random.default_rng(1)
    read, labels = rng.normal(size=(90, 8)).astype(np.float32), rng.integers(0, 2, 90)
    read[:, 0] += 2 * labels
    own = jpeft.core.tree.at(fit_head(params, site, read, labels), site.path)
    logits = read @ np.asarray(own["kernel"]) + np.asarray(own["bias"])
    assert (logits.argmax(1) == labels).mean() > 0.8
    from sklearn.linear_model import LogisticRegression

    timid = LogisticRegression(C=1e-3).fit(read, labels).predict_proba(read)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert loss < -np.log(timid[np.arange(90), labels]).mean()


def test_values_are_fitted_by_ridge(model):
    _, params, _, sites = model
    site = last_dense(sites)
    params = jpeft.core.tree.replace(
        params, site.path, lambda own: {"kernel": own["kernel"][:, :1], "bias": own["bias"][:1]}
    )
    read = np.random.default_rng(0).normal(size=(80, 8)).astype(np.float32)
    weights = np.arange(8.0)
    own = jpeft.core.tree.at(fit_head(params, site, read, (read @ weights + 3).astype(np.float32)), site.path)
    np.testing.assert_allclose(own["kernel"][:, 0], weights, atol=0.05)
    np.testing.assert_allclose(own["bias"], 3, atol=0.05)


def test_too_few_classes(model):
    _, params, _, sites = model
    with pytest.raises(UserError, match="a head cannot be fitted on 9 examples with 0 of a class"):
        fit_head(params, last_dense(sites), np.ones((9, 8), np.float32), np.zeros(9, np.int32))
