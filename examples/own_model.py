"""LoRA on a model of your own, Flax's attention in a scan over layers: python examples/own_model.py"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jpeft


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x))), None


class Model(nn.Module):
    HEAD = ("head",)  # new for every task: it trains under its own name, and methods leave it alone

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(4, 32, name="words")(tokens) + nn.Embed(8, 32, name="places")(jnp.arange(8))[None]
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(4, name="head")(layers(name="layers")(x, None)[0].mean(1))


def train(model, method, parts, target, steps):
    optimizer = optax.chain(optax.adamw(3e-3, mask=parts.decays), parts.scale)

    def loss(trainable, tokens):
        logits = jpeft.apply(model, method, jpeft.union(parts.frozen, trainable), tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target(tokens)).mean()

    def step(carry, key):
        grads = jax.grad(loss)(carry[0], jax.random.randint(key, (64, 8), 0, 4))
        updates, state = optimizer.update(grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    start = parts.trainable, optimizer.init(parts.trainable)
    return jpeft.union(parts.frozen, jax.lax.scan(step, start, jax.random.split(jax.random.key(1), steps))[0][0])


def main(path="modules.safetensors"):
    model, none, tokens = Model(), jpeft.chain(), jax.random.randint(jax.random.key(0), (512, 8), 0, 4)
    params = jax.jit(model.init)(jax.random.key(2), tokens)["params"]
    # Pretrained to name the first token of a row; LoRA then teaches it whether the first two sum to an odd number.
    params = train(model, none, jpeft.partition(none, params, {}, trains=params), lambda t: t[:, 0], 300)["params"]
    method, odd = jpeft.lora(rank=4, targets="query|value|up"), lambda t: (t[:, 0] + t[:, 1]) % 2
    leaves = jpeft.init(method, jax.random.key(3), jpeft.sites(model, tokens), params)
    trained = train(model, method, jpeft.partition(method, params, leaves, trains=model.HEAD), odd, 600)
    jpeft.write_leaves(path, {"peft": trained["peft"], "params": {"head": trained["params"]["head"]}})
    loaded = jpeft.union({"params": params}, jpeft.read_leaves(path))
    merged = jpeft.merge(method, loaded["peft"], loaded["params"]).params  # a plain model again
    return float((jax.jit(model.apply)({"params": merged}, tokens).argmax(-1) == odd(tokens)).mean())


if __name__ == "__main__":
    print(f"accuracy of the loaded and merged model: {main():.3f}")
