"""BERT and RoBERTa encoders with a head for each row, or for each token.

Parameter names follow Hugging Face's, so that conversion is mere renaming (`jpeft.models.pretrained`):

    embeddings/{word,position,token_type}_embeddings, embeddings/LayerNorm
    encoder/layer_{i}/attention/{query,key,value,output}, encoder/layer_{i}/attention_add_norm/LayerNorm
    encoder/layer_{i}/ffn/{intermediate,output},          encoder/layer_{i}/ffn_add_norm/LayerNorm
    pooler (BERT), classifier (RoBERTa: classifier/{dense,out_proj}); with a head for each token, classifier alone

Every name above is a site that a transform can wrap (see `jpeft.core.transform`). Besides the Dense layers, five
attachment points exist for that purpose; their signatures are part of the public API:

    embeddings/inputs                (word_vectors, token_types, positions, mask) -> the same four
    encoder/layer_{i}/attention/core (hidden, query, key, value, mask) -> context
    encoder/layer_{i}/ffn            (x) -> x
    encoder/layer_{i}/*_add_norm     (hidden, residual) -> LayerNorm(hidden + residual)
    encoder                          (hidden, mask) -> (hidden, all_states)

Shapes: b rows, t tokens, d hidden size, h heads, k = d / h. `hidden` is [b, t, d]; query, key and value are
[b, h, t, k] (heads before time is two to three times faster on CPU); the mask is [b, t] integers at `inputs` and
`encoder` (0 is padding, n is segment n of a packed row) and [b, 1, t_query, t_key] booleans at `core`.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.quantised import is_quantised

__all__ = ["ACTIVATIONS", "Bert", "BertConfig", "Intermediates", "attends", "attention_scores", "narrowed"]

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder and its head, with the field names of Hugging Face's `config.json`.

    Attributes:
      model_type: "bert" or "roberta". RoBERTa counts positions from `pad_token_id` + 1 and has a two-layer head.
      num_labels: width of the head; 1 means regression.
      classifier_dropout: dropout before the head; None means `hidden_dropout_prob`.
      dtype: dtype of the computation, "float32" or "bfloat16". Parameters, softmax, the statistics of LayerNorm and
        the logits are always float32; with "float64" under x64, for checks, everything is double.
      remat: recompute each layer in the backward pass instead of storing its activations.
      by_token: whether the head, a single layer then, answers at every token.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    classifier_dropout: float | None = None
    num_labels: int = 2
    dtype: str = "float32"
    remat: bool = False
    by_token: bool = False

    @property
    def max_length(self) -> int:
        """The longest input in tokens: RoBERTa reserves its first `pad_token_id` + 1 positions for padding."""
        offset = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - offset


class Intermediates(NamedTuple):
    """Intermediate results of the forward pass.

    Attributes:
      hidden_states: `num_hidden_layers` + 1 arrays [b, t, d]: the embeddings, then each layer's output; fewer where
        the call begins with a later layer.
      pooled: [b, d], the input of the head: BERT's pooler output, RoBERTa's first token. With a head for each token,
        the first token.
    """

    hidden_states: tuple[Array, ...]
    pooled: Array


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _dense(config: BertConfig, features: int, name: str, dtype: Any = None) -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=jnp.dtype(dtype or config.dtype), kernel_init=init, name=name)


def _layer_norm(config: BertConfig, name: str | None = None) -> nn.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels badly where a few dimensions are large, as they are in BERT.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=jnp.dtype(config.dtype), use_fast_variance=False, name=name
    )


class Inputs(nn.Module):
    """Attachment point before the sum of the embeddings: everything with a time axis passes through once."""

    @nn.compact
    def __call__(
        self, word_vectors: Array, token_types: Array, positions: Array, mask: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Returns its arguments: [b, t, d] vectors and three [b, t] integer arrays."""
        return word_vectors, token_types, positions, mask


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, their sum, LayerNorm and dropout."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids: Array, token_types: Array, positions: Array, mask: Array, train: bool
    ) -> tuple[Array, Array]:
        """Returns the embedded tokens [b, t, d] and the mask [b, t], including any tokens that `inputs` added."""
        c = self.config

        def embed(num: int, name: str) -> nn.Embed:
            init = nn.initializers.normal(c.initializer_range)
            return nn.Embed(num, c.hidden_size, dtype=jnp.dtype(c.dtype), embedding_init=init, name=name)

        words = embed(c.vocab_size, "word_embeddings")(input_ids)
        words, token_types, positions, mask = Inputs(name="inputs")(words, token_types, positions, mask)
        if words.shape[1] > max(c.max_length, input_ids.shape[1]):  # extended beyond the position table
            raise _too_long(words.shape[1], c)
        x = (
            words
            + embed(c.type_vocab_size, "token_type_embeddings")(token_types)
            + embed(c.max_position_embeddings, "position_embeddings")(positions)
        )
        x = _layer_norm(c, "LayerNorm")(x)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic=not train), mask


class Core(nn.Module):
    """Attachment point around scaled dot-product attention. It has no parameters."""

    dropout: float

    @nn.compact
    def __call__(self, hidden: Array, query: Array, key: Array, value: Array, mask: Array, *, train: bool) -> Array:
        """Attends; scores and softmax are float32.

        Args:
          hidden: the layer's input [b, t, d]; unused here, for transforms that gate on it.
          query: [b, h, t_query, k].
          key: [b, h, t_key, k].
          value: [b, h, t_key, k].
          mask: booleans that broadcast to [b, h, t_query, t_key]; False is not attended to.
          train: whether dropout applies to the attention probabilities.

        Returns:
          The context [b, h, t_query, k].
        """
        del hidden
        scores = attention_scores(query, key) * (query.shape[-1] ** -0.5)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        probs = nn.Dropout(self.dropout)(probs, deterministic=not train)
        return jnp.einsum("bhqk,bhkd->bhqd", probs, value)


def attention_scores(query: Array, key: Array) -> Array:
    """query [b, h, q, k] times key [b, h, t, k] over the last axis, [b, h, q, t], at least float32."""
    return _products(query, key) if query.dtype.itemsize == 2 else jnp.einsum("bhqd,bhkd->bhqk", query, key)


@jax.custom_vjp
def _products(query: Array, key: Array) -> Array:
    """Float32 scores [b, h, q, k] of bfloat16 queries and keys, with a backward pass in bfloat16.

    JAX's own would multiply the float32 cotangent by queries and keys in float32, at a fraction of the speed.
    """
    return jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)


def _products_forward(query: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
    return _products(query, key), (query, key)


def _products_backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    query, key = operands
    cotangent = cotangent.astype(query.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", cotangent, key), jnp.einsum("bhqk,bhqd->bhkd", cotangent, query)


_products.defvjp(_products_forward, _products_backward)


class Attention(nn.Module):
    """Multi-head self-attention and its output projection."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Array, mask: Array, *, train: bool) -> Array:
        """Maps [b, t, d] to [b, t, d]; the mask is as in `Core`."""
        c = self.config

        def heads(x: Array) -> Array:
            x = x.reshape(*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
            return x.swapaxes(-2, -3)

        query, key, value = (heads(_dense(c, c.hidden_size, name)(hidden)) for name in ("query", "key", "value"))
        context = Core(c.attention_probs_dropout_prob, name="core")(hidden, query, key, value, mask, train=train)
        context = context.swapaxes(-2, -3).reshape(hidden.shape)
        return _dense(c, c.hidden_size, "output")(context)


class FeedForward(nn.Module):
    """Attachment point around the two dense layers of a block, before dropout and residual."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, t, d] to [b, t, d] through [b, t, intermediate_size]."""
        c = self.config
        x = ACTIVATIONS[c.hidden_act](_dense(c, c.intermediate_size, "intermediate")(x))
        return _dense(c, c.hidden_size, "output")(x)


class AddNorm(nn.Module):
    """Attachment point around residual and LayerNorm. The norm is created in `setup`, so a wrap may call it twice."""

    config: BertConfig

    def setup(self) -> None:
        """Creates the norm."""
        self.LayerNorm = _layer_norm(self.config)

    def __call__(self, hidden: Array, residual: Array) -> Array:
        """Returns LayerNorm(hidden + residual), all [b, t, d]."""
        return self.LayerNorm(hidden + residual)


class Layer(nn.Module):
    """One block: attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, train: bool) -> Array:
        """Maps [b, t, d] to [b, t, d]; the mask is as in `Core`."""
        c = self.config
        a = Attention(c, name="attention")(x, mask, train=train)
        a = nn.Dropout(c.hidden_dropout_prob)(a, deterministic=not train)
        x = AddNorm(c, name="attention_add_norm")(a, x)
        f = FeedForward(c, name="ffn")(x)
        f = nn.Dropout(c.hidden_dropout_prob)(f, deterministic=not train)
        return AddNorm(c, name="ffn_add_norm")(f, x)


class Encoder(nn.Module):
    """The stack of layers. Unrolled, so that each layer can have a different module."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Array, mask: Array, *, train: bool, first: int = 0) -> tuple[Array, tuple[Array, ...]]:
        """Runs the layers from `first` on; the mask is [b, t] segment numbers.

        Returns:
          The last hidden state [b, t, d], and all of them, from the one that enters the layer `first`.
        """
        layer = nn.remat(Layer, static_argnums=(3,)) if self.config.remat else Layer
        visible = attends(mask)
        states = [hidden]
        for i in range(first, self.config.num_hidden_layers):
            states.append(layer(self.config, name=f"layer_{i}")(states[-1], visible, train))
        return states[-1], tuple(states)


def attends(segments: Array) -> Array:
    """[b, t] segment numbers to [b, 1, t, t]: tokens see their own segment. Padding sees all, as in Hugging Face."""
    q, k = segments[:, None, :, None], segments[:, None, None, :]
    return ((q == k) | (q == 0)) & (k > 0)


class ClassificationHead(nn.Module):
    """RoBERTa's head: dropout, dense, tanh, dropout, out_proj."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps [b, d] to float32 [b, num_labels]."""
        c = self.config
        drop = nn.Dropout(_head_dropout(c), deterministic=not train)
        x = jnp.tanh(_dense(c, c.hidden_size, "dense")(drop(x)))
        return _dense(c, c.num_labels, "out_proj", _wide(c.dtype))(drop(x))


def _head_dropout(config: BertConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _too_long(tokens: int, config: BertConfig) -> UserError:
    return UserError(f"input of {tokens} tokens; this model takes {config.max_length} at most")


class Bert(nn.Module):
    """A BERT or RoBERTa encoder with a head.

    >>> import jax
    >>> from jpeft.models.bert import Bert, BertConfig
    >>> model = Bert(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    >>> ids = jax.numpy.ones((2, 7), int)
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> logits, intermediates = model.apply({"params": params}, ids)
    >>> logits.shape, len(intermediates.hidden_states)
    ((2, 2), 3)
    """

    config: BertConfig
    HEAD = ("classifier",)  # the submodules that are new for every task; without a type, so not a field

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        positions: Array | None = None,
        *,
        train: bool = False,
        hidden: Array | None = None,
        layer: int = 0,
    ) -> tuple[Array, Intermediates]:
        """Classifies rows of tokens.

        Args:
          input_ids: [b, t] integers.
          attention_mask: [b, t] integers: 0 is padding, n > 0 is segment n. None means no padding.
          token_type_ids: [b, t] integers below `type_vocab_size`; None means 0.
          positions: [b, t] positions from 0; None means that every row is one segment starting at its first token.
          train: whether dropout is on, which needs `rngs={"dropout": key}`.
          hidden: [b, t, d], what enters a layer; nothing below that layer is computed then. Above all layers, where
            the head alone is left, the first token is enough: [b, 1, d]. None begins with the tokens.
          layer: which layer.

        Returns:
          Float32 logits [b, num_labels], or [b, t, num_labels] `by_token`, and the `Intermediates`.

        Raises:
          UserError: the rows are longer than the position table, and no `positions` are given.
        """
        c = self.config
        input_ids = jnp.asarray(input_ids, jnp.int32)  # tokenizers return int64, which JAX would warn about later
        mask = jnp.ones_like(input_ids) if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        token_types = jnp.zeros_like(input_ids) if token_type_ids is None else jnp.asarray(token_type_ids, jnp.int32)
        if positions is None:
            if input_ids.shape[1] > c.max_length:  # the embedding of a position beyond the table would be NaN
                raise _too_long(input_ids.shape[1], c)
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        if c.model_type == "roberta":  # padding has its own position, real tokens start after it
            positions = jnp.where(mask > 0, positions + c.pad_token_id + 1, c.pad_token_id)
        if hidden is None:
            hidden, mask = Embeddings(c, name="embeddings")(input_ids, token_types, positions, mask, train)
        hidden, states = Encoder(c, name="encoder")(hidden, mask, train=train, first=layer)
        first = hidden[:, 0]
        if c.by_token:
            own = hidden[:, -input_ids.shape[1] :]  # prompts come before the text
            dropped = nn.Dropout(_head_dropout(c))(own, deterministic=not train)
            return _dense(c, c.num_labels, "classifier", _wide(c.dtype))(dropped), Intermediates(states, first)
        if c.model_type == "roberta":
            logits = ClassificationHead(c, name="classifier")(first, train)
            return logits, Intermediates(states, first)
        pooled = jnp.tanh(_dense(c, c.hidden_size, "pooler")(first))
        dropped = nn.Dropout(_head_dropout(c))(pooled, deterministic=not train)
        logits = _dense(c, c.num_labels, "classifier", _wide(c.dtype))(dropped)
        return logits, Intermediates(states, pooled)


def narrowed(params: Any, dtype: str) -> Any:
    """Parameters in the dtype that the encoder computes in, with the same results.

    All but those of LayerNorm and of the head, which compute in float32 whatever the dtype is, and quantised kernels,
    which become dense in float32 and are then cast.
    """

    def cast(keys: Any, x: Any) -> Any:
        names = [key.key for key in keys]
        wide = "LayerNorm" in names or names[0] in Bert.HEAD or is_quantised(x)
        return x if wide else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_quantised)
