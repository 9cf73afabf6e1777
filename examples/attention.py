"""Causal attention, over all positions before or those of a window, in blocks of queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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

    if time <= _QUERIES:
        if window is None and first is None:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jax.nn.dot_product_attention(q, k, v, mask=seen(jnp.arange(time))[None, None])
    count = -(-time // _QUERIES)
    size = -(-time // count)
    padded = jnp.pad(q, [(0, 0), (0, count * size - time), (0, 0), (0, 0)])
    blocks = padded.reshape(q.shape[0], count, size, *q.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend(start, q):
        mask = seen(start + jnp.arange(size))[None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    out = jax.lax.map(lambda block: attend(*block), (jnp.arange(count) * size, blocks))
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :time]
