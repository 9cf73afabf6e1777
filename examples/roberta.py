"""RoBERTa in Flax NNX, with a head that classifies a text, or gives it a number.

The encoder is BERT's: learned positions, attention both ways, a norm behind each sum. The blocks
are stacked as `examples.llama`'s are, so GaLore projects their kernels, and nothing else where
`weight_dimension_numbers=galore_jax.matrix_axes`: not the tables, and not the head, which begins
anew for each task. `examples.hf_roberta` reads and writes checkpoints.

Names of axes in shapes: B batch, T time, D hidden, H heads, C channels of a head, L layers.

Reference: Liu et al., `RoBERTa <https://arxiv.org/abs/1907.11692>`_, 2019.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from examples.attention import masked_attention
from examples.dropout import dropped, folded
from examples.llama_config import ACTIVATIONS
from examples.modules import embedding, from_graph, initializer_of, linear, stacked, through
from examples.roberta_config import RobertaConfig

__all__ = ["Roberta", "RobertaConfig", "from_graph", "initializer"]


def layer_norm(config: RobertaConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Mean 0 and variance 1 along the last axis, then a learned scale and bias."""
    return nnx.LayerNorm(
        config.hidden,
        epsilon=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        use_fast_variance=False,  # It loses digits where the mean is large.
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Self-attention of each token to all that are no padding."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config
        self.q, self.k, self.v, self.o = (
            linear(config, config.hidden, config.hidden, rngs, bias=True) for _ in range(4)
        )

    def __call__(self, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        """Mixes x (B, T, D) over time; mask is (B, T)."""
        by_head = (*x.shape[:2], self.config.heads, -1)  # (B, T, H, C)
        q, k, v = (project(x).reshape(by_head) for project in (self.q, self.k, self.v))
        out = masked_attention(q, k, v, mask, self.config.attention_dropout, key)
        return self.o(out.reshape(x.shape))


class MLP(nnx.Module):
    """down(gelu(up(x))), or another activation."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = linear(config, config.hidden, config.intermediate, rngs, bias=True)
        self.down = linear(config, config.intermediate, config.hidden, rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, T, D) position by position."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each added to its input, and a norm behind."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.attention = Attention(config, rngs)
        self.attention_norm = layer_norm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.mlp_norm = layer_norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        """Hidden states (B, T, D) after this layer."""
        mixed = self.attention(x, mask, folded(key, 0))
        x = self.attention_norm(x + dropped(mixed, self.dropout, folded(key, 1)))
        return self.mlp_norm(x + dropped(self.mlp(x), self.dropout, folded(key, 2)))


class Classifier(nnx.Module):
    """The head: hidden states of first tokens (B, D) to logits (B, labels)."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.dropout = config.head_dropout
        self.dense = linear(config, config.hidden, config.hidden, rngs, bias=True)
        self.out = linear(config, config.hidden, config.labels, rngs, bias=True)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Logits in the activations' dtype."""
        x = jnp.tanh(self.dense(dropped(x, self.dropout, folded(key, 0))))
        return self.out(dropped(x, self.dropout, folded(key, 1)))


class Roberta(nnx.Module):
    """Token ids (B, T) to the logits of a text's labels, or to its one number (B, 1)."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = embedding(config, config.vocab_size, rngs)
        self.position_embed = embedding(config, config.max_positions, rngs)
        self.type_embed = embedding(config, config.type_vocab, rngs)
        self.embed_norm = layer_norm(config, rngs)
        self.blocks = stacked(config.layers, lambda own: Block(config, own), rngs)
        self.classifier = Classifier(config, rngs)

    def hidden(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        key: jax.Array | None = None,
        watch: jax.Array | None = None,
    ) -> jax.Array:
        """What the head sees, of all tokens: hidden states (B, T, D). Arguments as of a call."""
        config = self.config
        if tokens.shape[1] > config.max_length:
            raise ValueError(
                f"{tokens.shape[1]} tokens, and the model has positions for {config.max_length}:"
                " cut the texts off."
            )
        x = self.embed(tokens) + self.type_embed(jnp.zeros(1, jnp.int32))
        x = self.embed_norm(x + self.position_embed(positions(tokens, config.pad_id)))
        x = dropped(x, config.dropout, folded(key, 0))
        of_blocks = folded(key, 1)

        def run(block: Block, state):
            x, index = state
            if index is None:
                return block(x, mask, None), None
            return block(x, mask, folded(of_blocks, index.astype(jnp.int32))), index + 1

        # Layers are given no more than their weights where they are updated one by one, so one
        # whose dropout is its own goes by its number: a float, which has a gradient, zero.
        index = None if key is None else jnp.zeros([])
        return through(self.blocks, run, (x, index), remat=config.remat, watch=watch)[0]

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        key: jax.Array | None = None,
        watch: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, labels), float32, which the head reads off the first position.

        Args:
          tokens: int32 (B, T).
          mask: bool (B, T), True where a token is no padding.
          key: of dropout, another for each step; None is no dropout.
          watch: (L,), with which each layer's weights are `watched`.
        """
        first = self.hidden(tokens, mask, key, watch)[:, 0]
        return self.classifier(first, folded(key, 2)).astype(jnp.float32)


def positions(tokens: jax.Array, pad_id: int) -> jax.Array:
    """Rows of the table of positions (B, T): padding has its own, the first token that behind."""
    real = (tokens != pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + pad_id


def initializer(config: RobertaConfig, seed: int) -> tuple[nnx.GraphDef, Callable[[], dict]]:
    """A new model's static part, and what makes its parameters: see `modules`."""
    return initializer_of(lambda rngs: Roberta(config, rngs), seed)
