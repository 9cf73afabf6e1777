"""LLaMA in Flax NNX: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

And what its descendants changed: biases, norms of queries and keys, windows, layers without
positions (`examples.hf` reads their checkpoints).

The blocks are one module whose every leaf carries a leading layer axis, so a kernel is an
array of shape (layers, in, out), and the forward pass is one `lax.scan` over that axis:
compile time does not grow with depth, and GaLore keeps one projector per layer slice
(`weight_dimension_numbers=galore_jax.matrix_axes`).

Names of axes in shapes: B batch, T time, V vocabulary, D hidden, H query heads, K key-value
heads, C channels of a head, L layers.

Reference: Touvron et al., `LLaMA <https://arxiv.org/abs/2302.13971>`_, 2023. Sizes and
recipes: Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples import rope
from examples.attention import Cache, causal_attention
from examples.llama_config import ACTIVATIONS, LlamaConfig
from examples.losses import chunked_losses, token_losses
from examples.modules import embedding, from_graph, initializer_of, linear, stacked, through

__all__ = ["CONFIGS", "RECIPES", "Llama", "LlamaConfig", "create", "from_graph", "initializer"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a size is trained with GaLore. A step sees batch_size * seq_len tokens."""

    rank: int | float
    steps: int
    warmup: int
    accumulate: int  # Microbatches a step on one accelerator, from the paper's scripts.
    learning_rate: float = 0.01
    scale: float = 0.25
    update_proj_gap: int = 200
    clip: float | None = None
    batch_size: int = 512
    seq_len: int = 256


# The paper's sizes: untied heads, the T5 vocabulary rounded to 32000.
CONFIGS = {
    "tiny": LlamaConfig(1024, 128, 352, heads=4, layers=4),
    "small": LlamaConfig(1024, 256, 704, heads=4, layers=8),
    "60m": LlamaConfig(32000, 512, 1376, heads=8, layers=8),
    "130m": LlamaConfig(32000, 768, 2048, heads=12, layers=12),
    "350m": LlamaConfig(32000, 1024, 2736, heads=16, layers=24),
    "1b": LlamaConfig(32000, 2048, 5461, heads=32, layers=24),
    "7b": LlamaConfig(32000, 4096, 11008, heads=32, layers=32),
}

# Table 2 and the scripts of the paper. For 1b they differ (512 and 1024): this is the table.
# `tiny` and `small` are ours: the first learns in two minutes on two CPU cores. `checkpoint` is for
# weights that were trained before, of any size, by steps a fiftieth as long.
RECIPES = {
    "tiny": Recipe(32, 600, 60, 1, update_proj_gap=50, clip=1.0, batch_size=8, seq_len=128),
    "small": Recipe(64, 600, 60, 1, update_proj_gap=50, clip=1.0, batch_size=8, seq_len=128),
    "60m": Recipe(128, 10_000, 1_000, 2),
    "130m": Recipe(256, 20_000, 2_000, 2),
    "350m": Recipe(256, 60_000, 6_000, 4),
    "1b": Recipe(512, 100_000, 10_000, 32),
    "7b": Recipe(1024, 150_000, 15_000, 64, learning_rate=0.005, update_proj_gap=500, clip=1.0),
    "checkpoint": Recipe(
        0.25, 1_000, 100, 1, learning_rate=2e-4, clip=1.0, batch_size=8, seq_len=512
    ),
}


def rms_norm(config: LlamaConfig, features: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Divides by the root mean square of the last axis, times a learned scale."""
    # nnx.RMSNorm takes the mean of squares in float32 whatever the dtype.
    return nnx.RMSNorm(
        features,
        epsilon=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention; K key-value heads serve H query heads."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, kv_width = config.heads * config.head_size, config.num_kv_heads * config.head_size
        self.head_dim = config.head_size
        self.q = linear(config, config.hidden, width, rngs, config.qkv_bias)
        self.k = linear(config, config.hidden, kv_width, rngs, config.qkv_bias)
        self.v = linear(config, config.hidden, kv_width, rngs, config.qkv_bias)
        self.o = linear(config, width, config.hidden, rngs, config.out_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (rms_norm(config, self.head_dim, rngs) for _ in range(2))

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        window: int | jax.Array | None = None,
    ) -> jax.Array:
        """Mixes x (B, T, D) over time; cos and sin are (T, C/2)."""
        return self.extend(x, cos, sin, window)[0]

    def extend(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        window: int | jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The same, and x's keys and values (B, T, K, C); x may follow what is in a cache."""
        by_head = (*x.shape[:2], -1, self.head_dim)  # (B, T, H or K, C)
        q, k, v = (project(x).reshape(by_head) for project in (self.q, self.k, self.v))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        new, first = (k, v), None
        if cache is not None:
            (k, v, _), first = cache.extended(k, v), cache.length
        out = causal_attention(q, k, v, window, first)
        return self.o(out.reshape(*x.shape[:2], -1)), new


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), or another activation."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate = linear(config, config.hidden, config.intermediate, rngs, config.mlp_bias)
        self.up = linear(config, config.hidden, config.intermediate, rngs, config.mlp_bias)
        self.down = linear(config, config.intermediate, config.hidden, rngs, config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, T, D) position by position."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, config.hidden, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = rms_norm(config, config.hidden, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        window: int | jax.Array | None = None,
    ) -> jax.Array:
        """The residual stream (B, T, D) after this layer."""
        return self.extend(x, cos, sin, window)[0]

    def extend(self, x: jax.Array, *seen: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The same, and what `Attention.extend` gives beside."""
        mixed, new = self.attention.extend(self.attention_norm(x), *seen)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), new


def seen_by(
    config: LlamaConfig, turns: tuple[jax.Array, jax.Array], index: jax.Array | None
) -> tuple[jax.Array, jax.Array, int | jax.Array | None]:
    """What the layer of this number is told of positions: cosines, sines, its window.

    Of layers that are alike the number is None.
    """
    (cos, sin), window = turns, config.sliding_window

    def flag(given: tuple[bool, ...] | None) -> bool | jax.Array:
        if given is None or index is None:
            return given is None or given[0]
        return jnp.asarray(given)[index.astype(jnp.int32)]

    if (rotated := flag(config.rope_layers)) is not True:
        cos, sin = jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0)
    if window is not None and (sliding := flag(config.sliding_layers)) is not True:
        window = jnp.where(sliding, window, 2**30)  # Of a query all positions are nearer.
    return cos, sin, window


class Llama(nnx.Module):
    """Token ids (B, T) to next-token logits (B, T, V), or to losses (B, T)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = embedding(config, config.vocab_size, rngs)
        self.blocks = stacked(config.layers, lambda own: Block(config, own), rngs)
        self.final_norm = rms_norm(config, config.hidden, rngs)
        if not config.tied:
            self.lm_head = linear(config, config.hidden, config.vocab_size, rngs)

    def hidden(self, tokens: jax.Array, watch: jax.Array | None = None) -> jax.Array:
        """What the head sees of tokens (B, T): normalised hidden states (B, T, D).

        With a `watch` (L,) each layer's weights are `watched`.
        """
        config, turns = self.config, self.turns(jnp.arange(tokens.shape[1]))

        def run(block: Block, state):
            x, index = state
            x = block(x, *seen_by(config, turns, index))
            return self.placed(x), None if index is None else index + 1

        # Layers are given no more than their weights where they are updated one by one, so one
        # that differs from others goes by its number: a float, which has a gradient, zero.
        index = None if config.layers_alike else jnp.zeros([])
        state = self.placed(self.embed(tokens)), index
        return self.final_norm(through(self.blocks, run, state, remat=config.remat, watch=watch)[0])

    def turns(self, positions: jax.Array, time: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines (T, C/2) of positions (T,), see `rope.rotary`."""
        config = self.config
        return rope.rotary(
            positions,
            config.head_size,
            config.rope_theta,
            config.rope_scaling,
            config.max_positions,
            time,
        )

    def empty_cache(self, batch: int, time: int) -> Cache:
        """Room for `batch` texts of `time` tokens."""
        config = self.config
        shape = (config.layers, batch, time, config.num_kv_heads, config.head_size)
        keys, values = (jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in range(2))
        return Cache(keys, values, jnp.zeros([], jnp.int32))

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """What `hidden` is of tokens (B, T) that follow those in the cache, and all in a cache.

        A `rope.Dynamic` goes by the length that the cache has room for: keys that each had been
        turned by the length at their time would not be at their distances from each other.
        """
        config, first = self.config, cache.length
        turns = self.turns(first + jnp.arange(tokens.shape[1]), cache.keys.shape[2])
        block_def, weights = nnx.split(self.blocks)

        def block(x, of_layer):
            layer, keys, values, index = of_layer
            here = Cache(keys, values, first)
            return nnx.merge(block_def, layer).extend(x, *seen_by(config, turns, index), here)

        # Of a layer's cache the loop gives back no more than what is new: the rest stays in place.
        layers = weights, cache.keys, cache.values, jnp.arange(config.layers)
        x, new = jax.lax.scan(block, self.placed(self.embed(tokens)), layers)
        return self.final_norm(x), cache.extended(*new)

    def placed(self, x: jax.Array) -> jax.Array:
        """The residual stream (B, T, D), cut as its batch is, where that can be cut."""
        where = self.config.batch_sharding
        if where is None or x.shape[0] % where.num_devices:
            return x
        return jax.lax.with_sharding_constraint(x, where)

    def logits(self, x: jax.Array) -> jax.Array:
        """The head: hidden states (B, T, D) to logits (B, T, V)."""
        return self.embed.attend(x) if self.config.tied else self.lm_head(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V), in the activations' dtype."""
        return self.logits(self.hidden(tokens))

    def losses(
        self, tokens: jax.Array, targets: jax.Array, watch: jax.Array | None = None
    ) -> jax.Array:
        """Cross-entropy of each target (B, T), float32 (B, T), after the tokens up to it.

        Where all logits would be more than `config.loss_chunk` they never exist together, which
        takes a fourth matrix product with the head, beside the usual three.
        """
        config, x = self.config, self.hidden(tokens, watch)
        chunk = max(1, config.loss_chunk // targets.size)
        if config.vocab_size <= chunk:
            return token_losses(self.logits(x), targets)
        head, axis = (self.embed.embedding, 0) if config.tied else (self.lm_head.kernel, 1)
        return chunked_losses(x, head[...], targets, chunk=chunk, axis=axis)


def create(config: LlamaConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    """A new model as its static part and its tree of parameters.

    Call the model with `nnx.merge(graph, params)(tokens)`.
    """
    graph, init = initializer(config, seed)
    return graph, init()


def initializer(config: LlamaConfig, seed: int) -> tuple[nnx.GraphDef, Callable[[], dict]]:
    """What `create` gives, its parameters still to be made: see `modules`."""
    return initializer_of(lambda rngs: Llama(config, rngs), seed)
