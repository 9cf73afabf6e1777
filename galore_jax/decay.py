"""Decoupled weight decay for an optimizer that only sees the subspace.

An optimizer with decoupled decay gives an update affine in the parameters,
`u(w) = u(0) + c w`. The inner optimizer meets `w = 0` on projected leaves, so `u(0)` is the
part to lift; the derivative `c` is the part to apply to the full weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.interpreters import partial_eval as pe

LowRank = list[jax.Array]


def split_affine(
    update: Callable[[LowRank], tuple[LowRank, Any]], like: LowRank, paths: Sequence[str]
) -> tuple[LowRank, Any, list[jax.Array] | None]:
    """Split an inner update into its value at zero parameters and its slope in them.

    Args:
        update: from low-rank parameters to (low-rank updates, anything else).
        like: arrays of the low-rank shapes and dtypes, one a projected leaf.
        paths: the leaves' paths, for the error message.

    Returns:
        The updates at zero, the rest of the result, and per leaf the slope, an array of the
        leaf's batch shape: the coefficient of each stacked weight in its own update. The
        slopes are None when the update does not use the parameters.

    Raises:
        ValueError: where the update is not affine in the parameters.
    """

    def with_slope(at, direction):
        return jax.jvp(update, (at,), (direction,), has_aux=True)

    # Traced once, evaluated once: the jaxpr tells whether the slope depends on the direction
    # (is there any?) and on the point (then it is no constant, and the update not affine).
    traced, shapes = jax.make_jaxpr(with_slope, return_shape=True)(like, like)
    out, slope, rest = (jax.tree.structure(s) for s in shapes)
    wanted = [False] * out.num_leaves + [True] * slope.num_leaves + [False] * rest.num_leaves
    _, used = pe.dce_jaxpr(traced.jaxpr, wanted)
    if any(used[: len(like)]):
        raise ValueError(
            "galore: the inner optimizer's update is not affine in params, as decoupled weight "
            f"decay would be (seen with leaf '{paths[0]}'), so its use of params cannot be "
            "carried out of the subspace. Trust ratios and parameter scales (lamb, lars, "
            "adafactor) are of this kind. Put such a link outside, as in optax.chain(galore("
            "optax.scale_by_adam(), rank=...), optax.scale_by_trust_ratio(), ...), or use "
            "galore_jax.galore_adafactor"
        )
    zeros, ones = map(jnp.zeros_like, like), map(jnp.ones_like, like)
    flat = jex.core.jaxpr_as_fun(traced)(*zeros, *ones)
    values = [
        jax.tree.unflatten(s, [next(it) for _ in range(s.num_leaves)])
        for it in [iter(flat)]
        for s in (out, slope, rest)
    ]
    slopes = [c[..., 0, 0] for c in values[1]] if any(used[len(like) :]) else None
    return values[0], values[2], slopes
