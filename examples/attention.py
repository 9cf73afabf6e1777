"""Attention, causal or not, over all positions or some, in blocks of queries."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from examples.dropout import dropped, folded

# Above this many positions attention goes by blocks of queries.
_QUERIES = 256


class Cache(NamedTuple):
    """Keys and values of a text so far, and room for what follows; keys are turned already."""

    keys: jax.Array  # (L, B, T, K, C); in a layer (B, T, K, C).
    values: jax.Array
    length: jax.Array  # Positions that are filled.

    def extended(self, keys: jax.Array, values: jax.Array) -> "Cache":
        """With those of the positions that follow."""

        def filled(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis=-3)

        length = self.length + keys.shape[-3]
        return Cache(filled(self.keys, keys), filled(self.values, values), length)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | jax.Array | None = None,
    first: jax.Array | None = None,
) -> jax.Array:
    """Causal attention for q (B, T, H, C) and k, v (B, T, K, C), without T x T scores at once.

    A long sequence's queries are taken in blocks, whose scores the backward pass computes again.
    With a `window` a query sees that many positions, its own the last; it may be a tracer. Keys may
    be more than queries, of which the `first` then says its position.
    """
    time = q.shape[1]

    def seen(queries: jax.Array) -> jax.Array:
        queries = queries if first is None else first + queries
        past, keys = queries[:, None] >= jnp.arange(k.shape[1]), jnp.arange(k.shape[1])
        return past if window is None else past & (queries[:, None] - keys < window)

    def attend(queries: jax.Array, q: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=seen(queries)[None, None])

    if time <= _QUERIES and window is None and first is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return _by_queries(attend, q)


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Attention for q, k, v (B, T, H, C) to the positions of a mask (B, T), before and behind.

    With a `key` weights are dropped. Where the mask has no position all count alike.
    """
    mask = mask[:, None, None]

    def attend(queries: jax.Array, q: jax.Array) -> jax.Array:
        if key is None or dropout == 0:
            return jax.nn.dot_product_attention(q, k, v, mask=mask)
        scores = jnp.einsum("bthc,bshc->bhts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        weights = dropped(jax.nn.softmax(scores), dropout, folded(key, queries[0]))
        return jnp.einsum("bhts,bshc->bthc", weights.astype(v.dtype), v)

    return _by_queries(attend, q)


def _by_queries(attend: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array) -> jax.Array:
    """`attend(numbers, queries)` of all queries (B, T, H, C), or a block of them at a time."""
    time = q.shape[1]
    if time <= _QUERIES:
        return attend(jnp.arange(time), q)
    count = -(-time // _QUERIES)
    size = -(-time // count)
    padded = jnp.pad(q, [(0, 0), (0, count * size - time), (0, 0), (0, 0)])
    blocks = padded.reshape(q.shape[0], count, size, *q.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend_block(first, q):
        return attend(first + jnp.arange(size), q)

    out = jax.lax.map(lambda block: attend_block(*block), (jnp.arange(count) * size, blocks))
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :time]
