"""Dropout by keys, of which no key is no dropout."""

import jax
import jax.numpy as jnp


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeros for a share `rate` of x, and the rest larger, so that the mean stays."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def folded(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """The key of one place among several."""
    return None if key is None else jax.random.fold_in(key, number)
