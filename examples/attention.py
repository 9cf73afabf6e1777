"""Causal attention, over all positions before or those of a window, in blocks of queries."""

import jax
import jax.numpy as jnp

# Above this many positions attention goes by blocks of queries.
_QUERIES = 256


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | jax.Array | None = None
) -> jax.Array:
    """Causal attention for q (B, T, H, C) and k, v (B, T, K, C), without T x T scores at once.

    A long sequence's queries are taken in blocks, whose scores the backward pass computes again.
    With a `window` a query sees that many positions, its own the last; it may be a tracer.
    """
    time = q.shape[1]

    def seen(queries: jax.Array) -> jax.Array:
        past, keys = queries[:, None] >= jnp.arange(time), jnp.arange(time)
        return past if window is None else past & (queries[:, None] - keys < window)

    if time <= _QUERIES:
        if window is None:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jax.nn.dot_product_attention(q, k, v, mask=seen(jnp.arange(time))[None, None])
    count = -(-time // _QUERIES)
    size = -(-time // count)
    padded = jnp.pad(q, [(0, 0), (0, count * size - time), (0, 0), (0, 0)])
    blocks = padded.reshape(q.shape[0], count, size, *q.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend(first, q):
        mask = seen(first + jnp.arange(size))[None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    out = jax.lax.map(lambda block: attend(*block), (jnp.arange(count) * size, blocks))
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :time]
