"""LLaMA in Flax NNX: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

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
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import galore_jax
from examples.losses import chunked_losses, token_losses
from examples.watching import watched


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and number formats of a model. `kv_heads=None` gives every query head its own."""

    vocab_size: int = 32000
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    layers: int = 8
    kv_heads: int | None = None
    tied: bool = False  # The head is the transposed embedding.
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_scale: float = 0.02
    param_dtype: str = "float32"
    dtype: str = "float32"  # Of activations; statistics and the softmax are float32 always.
    remat: bool = False  # Recompute each block's activations in the backward pass.
    loss_chunk: int = 2**25  # Most logits at once in `Llama.losses`: 128 MiB.
    # Of a batch on a mesh. Left to itself, XLA cuts activations as the weights rather.
    batch_sharding: jax.sharding.NamedSharding | None = None

    def __post_init__(self):
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"hidden={self.hidden} must be heads={self.heads} times an even head size."
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads, given or not."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a size is pre-trained with GaLore. A step sees batch_size * seq_len tokens."""

    rank: int
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
    "60m": LlamaConfig(32000, 512, 1376, heads=8, layers=8),
    "130m": LlamaConfig(32000, 768, 2048, heads=12, layers=12),
    "350m": LlamaConfig(32000, 1024, 2736, heads=16, layers=24),
    "1b": LlamaConfig(32000, 2048, 5461, heads=32, layers=24),
    "7b": LlamaConfig(32000, 4096, 11008, heads=32, layers=32),
}

# Table 2 and the scripts of the paper. For 1b they differ (512 and 1024): this is the table.
# `tiny` is ours: it learns in two minutes on two CPU cores.
RECIPES = {
    "tiny": Recipe(32, 600, 60, 1, update_proj_gap=50, clip=1.0, batch_size=8, seq_len=128),
    "60m": Recipe(128, 10_000, 1_000, 2),
    "130m": Recipe(256, 20_000, 2_000, 2),
    "350m": Recipe(256, 60_000, 6_000, 4),
    "1b": Recipe(512, 100_000, 10_000, 32),
    "7b": Recipe(1024, 150_000, 15_000, 64, learning_rate=0.005, update_proj_gap=500, clip=1.0),
}


def rotary(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles, float32 (T, C/2), for positions (T,)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channel pairs (c, c + C/2) of x (B, T, H, C) by their position's angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def linear(config: LlamaConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A kernel (inputs, outputs) without a bias, whose gradient can stay in the subspace."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(config.init_scale),
        dot_general=galore_jax.dot_general,
        promote_dtype=galore_jax.promote_dtype,
        rngs=rngs,
    )


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Divides by the root mean square of the hidden axis, times a learned scale."""
    # nnx.RMSNorm takes the mean of squares in float32 whatever the dtype.
    return nnx.RMSNorm(
        config.hidden,
        epsilon=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


# Above this many positions attention goes by blocks of queries.
_QUERIES = 256


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention for q (B, T, H, C) and k, v (B, T, K, C), without T x T scores at once.

    A long sequence's queries are taken in blocks, whose scores the backward pass computes again.
    """
    time = q.shape[1]
    if time <= _QUERIES:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    count = -(-time // _QUERIES)
    size = -(-time // count)
    padded = jnp.pad(q, [(0, 0), (0, count * size - time), (0, 0), (0, 0)])
    blocks = padded.reshape(q.shape[0], count, size, *q.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend(first, q):
        seen = first + jnp.arange(size)[:, None] >= jnp.arange(time)
        return jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])

    out = jax.lax.map(lambda block: attend(*block), (jnp.arange(count) * size, blocks))
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :time]


class Attention(nnx.Module):
    """Causal self-attention; K key-value heads serve H query heads."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, kv_width = config.hidden, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q = linear(config, width, width, rngs)
        self.k = linear(config, width, kv_width, rngs)
        self.v = linear(config, width, kv_width, rngs)
        self.o = linear(config, width, width, rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Mixes x (B, T, D) over time; cos and sin are (T, C/2)."""
        by_head = (*x.shape[:2], -1, self.head_dim)  # (B, T, H or K, C)
        q, k, v = (project(x).reshape(by_head) for project in (self.q, self.k, self.v))
        out = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o(out.reshape(x.shape))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.gate = linear(config, config.hidden, config.intermediate, rngs)
        self.up = linear(config, config.hidden, config.intermediate, rngs)
        self.down = linear(config, config.intermediate, config.hidden, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, T, D) position by position."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """The residual stream (B, T, D) after this layer."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Token ids (B, T) to next-token logits (B, T, V), or to losses (B, T)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(config.init_scale),
            rngs=rngs,
        )
        one_per_layer = nnx.split_rngs(splits=config.layers)
        self.blocks = one_per_layer(nnx.vmap(lambda layer_rngs: Block(config, layer_rngs)))(rngs)
        self.final_norm = rms_norm(config, rngs)
        if not config.tied:
            self.lm_head = linear(config, config.hidden, config.vocab_size, rngs)

    def hidden(self, tokens: jax.Array, watch: jax.Array | None = None) -> jax.Array:
        """What the head sees of tokens (B, T): normalised hidden states (B, T, D).

        With a `watch` (L,) each layer's weights are `watched`.
        """
        config = self.config
        cos, sin = rotary(jnp.arange(tokens.shape[1]), config.head_dim, config.rope_theta)
        block_def, stacked = nnx.split(self.blocks)
        x = self.placed(self.embed(tokens))

        def block(layer, x):
            return self.placed(nnx.merge(block_def, layer)(x, cos, sin))

        def watched_block(both, x):
            return block(watched(*both), x)

        if watch is not None:
            x = galore_jax.layerwise(watched_block, (stacked, watch), x)
        elif config.remat:
            x = galore_jax.layerwise(block, stacked, x)
        else:
            x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, stacked)
        return self.final_norm(x)

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


def from_graph(graph: nnx.GraphDef) -> Callable[[dict], Llama]:
    """From parameters to the model that they belong to."""
    return functools.partial(nnx.merge, graph)


def create(config: LlamaConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    """A new model as its static part and a pure tree of parameters.

    The tree is nested dicts of arrays: what `jax.grad`, optax and orbax like best, with clean
    paths (`blocks/attention/q/kernel`). Call the model with `nnx.merge(graph, params)(tokens)`.
    """
    graph, init = initializer(config, seed)
    return graph, init()


def initializer(config: LlamaConfig, seed: int) -> tuple[nnx.GraphDef, Callable[[], dict]]:
    """What `create` gives, its parameters still to be made.

    Under one `jit`, so that a stack is born stacked, on the device; or cut, inside another one.
    """

    @jax.jit
    def init():
        return nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(seed)), nnx.Param))

    return nnx.graphdef(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(seed)))), init
