"""Borders that XLA's CPU compiler does not look across.

It orders the reads and writes of a buffer by data dependence alone, and copies where it cannot
tell that all reads come first; it repeats cheap arithmetic in every consumer; it compiles a
kernel of its own for every slice at a constant offset. `jax.lax.optimization_barrier` is gone
before all of that, a conditional that cannot be decided is not. Accelerators do none of it, and
would pay for the conditional.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from galore_jax.control import cond


def in_one_piece(
    function: Callable[..., Any],
    known: jax.Array,
    *operands: Any,
    otherwise: Callable[..., Any] | None = None,
) -> Any:
    """`function(*operands)`, behind a conditional where XLA compiles for a CPU.

    All operands are read before any of the results is written, and each result is computed once.

    Args:
        function: what to compute.
        known: a scalar, with which the conditional waits.
        *operands: arrays, or trees of them.
        otherwise: a branch that is never taken, where one is cheaper than zeros: operands to
            hand back, whose buffers the results then share.

    Returns:
        What the function returns.
    """
    if not isinstance(known, jax.core.Tracer):
        return function(*operands)  # nothing is compiled

    def zeros(*operands):
        shapes = jax.eval_shape(function, *operands)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def behind_conditional(*operands):
        never = otherwise or zeros
        return cond(_always(known), lambda: function(*operands), lambda: never(*operands))

    return jax.lax.platform_dependent(*operands, cpu=behind_conditional, default=function)


def _always(known: jax.Array) -> jax.Array:
    """True for every bit pattern of a number, of which XLA knows nothing before it is computed."""
    bits = jax.lax.bitcast_convert_type(known.astype(jnp.float32), jnp.int32)
    return (bits | 1) != 0
