"""Keeping XLA's CPU backend from copying weights that could be updated in place.

It orders reads and writes of a buffer by data dependence alone, before anything is scheduled,
and copies where it cannot tell that all reads come first; `jax.lax.optimization_barrier` is
gone by then. Accelerators schedule first, and need none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def surely(x: jax.Array) -> jax.Array:
    """True, once `x`, a scalar, is known; what XLA cannot tell is that it is always so.

    False for one of 2^24 kinds of NaN, which no arithmetic makes.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits != 0x7FC0DEAD


def reads_first(update: Callable[..., Any], otherwise: Callable[..., Any], x: jax.Array, *operands):
    """`update(*operands)`, all of which are read before any of the result is written.

    Behind a conditional they are; `otherwise` gives its other branch, which is never taken.
    """

    def behind_conditional(*operands):
        return jax.lax.cond(surely(x), update, otherwise, *operands)

    return jax.lax.platform_dependent(*operands, cpu=behind_conditional, default=update)
