"""Decoupled weight decay for an optimizer that only sees the subspace.

An optimizer with decoupled decay gives an update affine in the parameters,
`u(w) = u(0) + c w`. The inner optimizer meets `w = 0` on projected leaves, so `u(0)` is the
part to lift; the derivative `c` is the part to apply to the full weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax import dependence
from galore_jax.multiples import Group, multiples
from galore_jax.warn import warn

LowRank = list[jax.Array]


def split_affine(
    update: Callable[[LowRank], tuple[LowRank, Any]], like: LowRank, paths: Sequence[str]
) -> tuple[LowRank, Any, list[jax.Array] | None]:
    """Split an inner update into its value at zero parameters and its slope in them.

    The slope has to be one number for a matrix, as a decay is: a number of its own for each row
    or element of a low-rank array says nothing of the weights. Where it is not, it is NaN.

    Args:
        update: from low-rank parameters to (low-rank updates, (all updates, next state)).
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

    # Traced once, evaluated once. The slope tells whether it depends on the direction (is there
    # any?) and on the point (then it is no constant, and the update not affine).
    traced = dependence.trace(with_slope, like, like)
    _, slope, (_, next_state) = traced.depends

    # Positions of the low-rank parameters, then of their directions.
    sloped, kept = (sorted(dependence.used(x)) for x in (slope, next_state))
    if sloped and sloped[0] < len(like):
        raise ValueError(
            "galore: the inner optimizer's update is not affine in params, as decoupled weight "
            f"decay would be (leaf '{paths[sloped[0]]}'), so its use of params cannot be "
            "carried out of the subspace. Trust ratios and parameter scales (lamb, lars, "
            "adafactor) are of this kind. Put such a link outside, as in optax.chain(galore("
            "optax.scale_by_adam(), rank=...), optax.scale_by_trust_ratio(), ...), or use "
            "galore_jax.galore_adafactor"
        )
    if kept:
        warn(
            "galore: the inner optimizer feeds params into its moments (leaf "
            f"'{paths[kept[0]]}'), as L2 regularisation and novograd do. Those lie in the "
            "subspace, so the weights decay by their part in each step's update alone. For decay "
            "that is right use an optimizer that applies it after the moments, as optax.adamw"
        )
    zeros, ones = (jax.tree.map(f, like) for f in (jnp.zeros_like, jnp.ones_like))
    at_zero, slope, rest = traced.call(zeros, ones)
    if not sloped:
        return at_zero, rest, None
    count = len(like)
    directions = [Group((count + i,), frozenset([count + i])) for i in range(count)]
    found = multiples(traced.closed, directions)
    known = [found.scaled([count + i], group) is None for i, group in enumerate(directions)]
    return at_zero, rest, [_one_number(x, one) for x, one in zip(slope, known, strict=True)]


def _one_number(slope: jax.Array, known: bool) -> jax.Array:
    """The number that each matrix of (..., a, b) repeats; NaN where it holds several.

    An update that is known to multiply the parameters by a number need not be looked at.
    """
    first = slope[..., 0, 0]
    if known:
        return first
    same = jnp.all(slope == first[..., None, None], axis=(-2, -1))
    return jnp.where(same, first, jnp.nan)


def reads_params(init: Callable[[LowRank], Any], like: LowRank) -> list[bool]:
    """Whether an inner `init` uses the values of each low-rank parameter."""
    used = dependence.used(dependence.trace(init, like).depends)
    return [i in used for i in range(len(like))]
