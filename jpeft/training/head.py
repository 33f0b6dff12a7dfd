"""The head fitted on frozen features, before anything else trains.

With a random head, nearly all that gradients say is which class is the larger one (Kumar et al. 2022, arXiv:2202.10054,
on what a random head does to the features). With the best head for the features as they are, they say what the
features lack.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.hook import apply
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Params, Transform
from jpeft.data.batching import Batch

__all__ = ["LEAST", "features", "fit_head", "last_dense"]

STRENGTHS = np.logspace(-3, 1, 5)  # of the regularisation; cross-validation chooses
LEAST = 3  # examples of a class: one for each part of the cross-validation


def last_dense(sites: Sites) -> Site:
    """The layer that makes the logits: the last Dense layer of the head.

    Raises:
      UserError: if there is none.
    """
    found = [site for site in sites.values() if site.head and "kernel" in site.params]
    if not found:
        raise UserError("the model's head has no Dense layer, so it cannot be fitted on frozen features")
    return found[-1]


def features(model: nn.Module, site: Site) -> Callable[[Params, Batch], Array]:
    """The function (params, batch) -> [b, d], or [b, t, d]: what a layer of the head reads. Jit it."""

    def of(params: Params, batch: Batch) -> Array:
        seen: list[Array] = []

        def wrap(leaves: Any, site: Site, call: Callable[..., Any], args: tuple[Any, ...], ctx: Any) -> Any:
            seen.append(args[0])
            return call(*args)

        spy = Transform("spy", lambda key, sites, params: {}, wrap)
        leaves = {"spy_0": {site.path: {"none": jnp.zeros(())}}}
        apply(model, spy, {"params": params, "peft": leaves}, batch.input_ids, batch.attention_mask,
              batch.token_type_ids, mask=batch.attention_mask)  # fmt: skip
        return seen[0].astype(jnp.float32)

    return of


def fit_head(params: Params, site: Site, read: np.ndarray, labels: np.ndarray) -> Params:
    """Parameters with the best linear head for these features: logistic regression, or ridge for values.

    The strength of the regularisation is chosen by cross-validation.

    Args:
      params: of the model; not edited.
      site: from `last_dense`.
      read: [n, d], its inputs.
      labels: [n] class ids, or values; [n, C] of 0 and 1 for any number of classes.

    Raises:
      UserError: if there are fewer than three examples of a class, or the head has no bias.
    """
    from sklearn.linear_model import RidgeCV

    own = tree.at(params, site.path)
    if "bias" not in own:
        raise UserError(
            f"the head {site.path!r} has no bias, and cannot be fitted without: set config.fishpal.criterion=race"
        )
    kernel, bias = (np.zeros(own[name].shape, np.float64) for name in ("kernel", "bias"))
    if np.issubdtype(labels.dtype, np.integer):
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < 2 or counts.min() < LEAST:
            least = 0 if len(classes) < 2 else counts.min()
            raise UserError(
                f"a head cannot be fitted on {len(labels)} examples with {least} of a class: expected {LEAST} or "
                "more; give more training data, or set config.fishpal.criterion=race, which needs no fitted head"
            )
        model = _logistic(read, labels)
        if len(classes) == 2:  # one direction, which tells the second class from the first
            first, second = classes
            kernel[:, first], kernel[:, second] = -model.coef_[0] / 2, model.coef_[0] / 2
            bias[first], bias[second] = -model.intercept_[0] / 2, model.intercept_[0] / 2
        else:
            kernel[:, classes], bias[classes] = model.coef_.T, model.intercept_
        absent = np.setdiff1d(np.arange(len(bias)), classes)
        bias[absent] = bias.min() - 5
    elif labels.ndim == 2:
        for i, has in enumerate(labels.T.astype(np.int32)):
            if min(has.sum(), len(has) - has.sum()) < LEAST:  # hardly any, or hardly any without: how often it occurs
                bias[i] = np.log((has.sum() + 0.5) / (len(has) - has.sum() + 0.5))
            else:
                model = _logistic(read, has)
                kernel[:, i], bias[i] = model.coef_[0], model.intercept_[0]
    else:
        model = RidgeCV(1 / STRENGTHS).fit(read, labels)
        kernel[:, 0], bias[0] = model.coef_, model.intercept_
    fitted = {"kernel": jnp.asarray(kernel, own["kernel"].dtype), "bias": jnp.asarray(bias, own["bias"].dtype)}
    return tree.replace(params, site.path, lambda old: {**old, **fitted})


def _logistic(read: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    plain = LogisticRegression(max_iter=1000)
    search = GridSearchCV(plain, {"C": STRENGTHS}, scoring="neg_log_loss", cv=LEAST)
    return search.fit(read, labels).best_estimator_
