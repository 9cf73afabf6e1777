"""Decoupled weight decay for an optimizer that only sees the subspace.

An optimizer with decoupled decay gives an update affine in the parameters,
`u(w) = u(0) + c w`. The inner optimizer meets `w = 0` on projected leaves, so `u(0)` is the
part to lift; the derivative `c` is the part to apply to the full weight.
"""

from __future__ import annotations

import warnings
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

    The slope is taken to be one number for a matrix, as a decay is.

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

    # Traced once, evaluated once: the jaxpr tells whether the slope depends on the direction
    # (is there any?) and on the point (then it is no constant, and the update not affine).
    traced, shapes = jax.make_jaxpr(with_slope, return_shape=True)(like, like)
    out, slope, (others, next_state) = shapes
    sizes = [len(jax.tree.leaves(x)) for x in (out, slope, others, next_state)]

    def uses(*which):
        """Whether the outputs of the kinds named use each low-rank parameter and direction."""
        wanted = [i in which for i, size in enumerate(sizes) for _ in range(size)]
        used = pe.dce_jaxpr(traced.jaxpr, wanted)[1]
        return used[: len(like)], used[len(like) :]

    if any(bent := uses(1)[0]):
        raise ValueError(
            "galore: the inner optimizer's update is not affine in params, as decoupled weight "
            f"decay would be (leaf '{paths[bent.index(True)]}'), so its use of params cannot be "
            "carried out of the subspace. Trust ratios and parameter scales (lamb, lars, "
            "adafactor) are of this kind. Put such a link outside, as in optax.chain(galore("
            "optax.scale_by_adam(), rank=...), optax.scale_by_trust_ratio(), ...), or use "
            "galore_jax.galore_adafactor"
        )
    if any(kept := uses(3)[0]):
        warnings.warn(
            "galore: the inner optimizer feeds params into its moments (leaf "
            f"'{paths[kept.index(True)]}'), as L2 regularisation and novograd do. Those lie in the "
            "subspace, so the weights decay by their part in each step's update alone. For decay "
            "that is right use an optimizer that applies it after the moments, as optax.adamw",
            UserWarning,
            stacklevel=2,
        )
    zeros, ones = map(jnp.zeros_like, like), map(jnp.ones_like, like)
    flat = jex.core.jaxpr_as_fun(traced)(*zeros, *ones)
    at_zero, slope, rest = jax.tree.unflatten(jax.tree.structure(shapes), flat)
    slopes = [c[..., 0, 0] for c in slope] if any(uses(1)[1]) else None
    return at_zero, rest, slopes


def reads_params(init: Callable[[LowRank], Any], like: LowRank) -> list[bool]:
    """Whether an inner `init` uses the values of each low-rank parameter."""
    traced = jax.make_jaxpr(init)(like).jaxpr
    return pe.dce_jaxpr(traced, [True] * len(traced.outvars))[1]
