"""Float32 at least: what arithmetic and optimizer state are in, whatever the parameters' dtype."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def wide_dtype(x: Any) -> Any:
    """The dtype to compute in with an array like `x`: its own, or float32 where that is wider."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """The array in float32 at least; integers as they are."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def mark_wide(tx: Any) -> Any:
    """Mark a transformation that computes in float32 whatever dtype it is given; returns it.

    `galore` then hands it what it does not project as it is: a float32 copy of an embedding in
    half precision would be the largest array of a step.
    """
    tx.update.computes_wide = True
    return tx


def computes_wide(tx: Any) -> bool:
    """Whether a transformation is marked so."""
    return getattr(tx.update, "computes_wide", False)


def widened_for(tx: Any) -> Callable[[Any], Any]:
    """What makes arrays fit for a transformation: `wide`, or nothing where it is marked."""
    return (lambda x: x) if computes_wide(tx) else wide


def debias(decay: jax.typing.ArrayLike, count: jax.typing.ArrayLike) -> jax.Array:
    """`1 - decay^count`: what an average of so many steps is short of."""
    # In floats: strict dtype promotion has no power of an integer.
    return 1 - decay ** jnp.asarray(count, jnp.float32)  # type: ignore[operator]


def compiled_if_narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function where it is called eagerly with arrays of half precision.

    It computes in float32 with copies of them: XLA fuses those away, but one by one they are as
    large as the weights. (Made anew at every step, as by an eager `optax.inject_hyperparams`, it
    is compiled anew too.)
    """
    compiled = jax.jit(function)

    def is_narrow(x: Any) -> bool:
        return jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.result_type(x).itemsize < 4

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        eager = all(
            isinstance(x, jax.Array | np.ndarray | np.generic | numbers.Number)
            and not isinstance(x, jax.core.Tracer | bool)  # which Python may branch on
            for x in leaves
        )
        return (compiled if eager and any(map(is_narrow, leaves)) else function)(*args, **kwargs)

    return call
