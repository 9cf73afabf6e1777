"""Decoupled weight decay for an optimizer that only sees the subspace.

An optimizer with decoupled decay gives an update affine in the parameters,
`u(w) = u(0) + c w`. The inner optimizer meets `w = 0` on projected leaves, so `u(0)` is the
part to lift; the derivative `c` is the part to apply to the full weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

LowRank = list[jax.Array]


def decay_coefficients(
    update: Callable[[LowRank], LowRank], paths: Sequence[str], like: LowRank
) -> list[jax.Array] | None:
    """Derivative of an inner update in the parameters it meets on projected leaves.

    Args:
        update: from low-rank parameters to low-rank updates, one array a leaf.
        paths: the leaves' paths, for the error message.
        like: arrays of the low-rank shapes and dtypes.

    Returns:
        One array per leaf, of the leaf's batch shape: the coefficient of each stacked weight
        in its own update. None when the update does not use the parameters.

    Raises:
        ValueError: where the update is not affine in the parameters.
    """
    traced = jax.make_jaxpr(update)(like)
    if not _uses_inputs(traced.jaxpr):
        return None
    ones = [jnp.ones_like(x) for x in like]
    # linear_transpose refuses a function that is not affine while it is traced, in whichever
    # way the offending operation's transpose rule happens to fail.
    try:
        (slopes,) = jax.linear_transpose(update, like)(ones)
    except (NotImplementedError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            "galore: the inner optimizer's update is not affine in params, as decoupled weight "
            f"decay would be (seen at leaf '{paths[0]}'), so its use of params cannot be carried "
            "out of the subspace. Trust ratios and parameter scales (lamb, lars, adafactor) are "
            "of this kind: put such a link outside, galore(optax.scale_by_adam(), ...) followed "
            "by optax.scale_by_trust_ratio(), or use galore_adafactor"
        ) from error
    return [c[..., 0, 0] for c in slopes]


def _uses_inputs(jaxpr) -> bool:
    """Whether any output may depend on an input."""
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(v in reached for v in equation.invars if not hasattr(v, "val")):
            reached.update(equation.outvars)
    return any(v in reached for v in jaxpr.outvars if not hasattr(v, "val"))
