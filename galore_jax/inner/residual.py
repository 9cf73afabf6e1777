"""The part of a gradient outside the subspace, and the links that make an update of it.

They see matrices, `batch + (m, n)`: the last two axes are the matrix, the others are stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.trees import Sites
from galore_jax.matrix.view import MatrixView
from galore_jax.precision import wide
from galore_jax.projector.project import outside

_TINY = 1e-12  # norms below it count as none


def init_outside(
    residual: optax.GradientTransformation, where: Sites, params: optax.Params
) -> optax.OptState:
    """The state of `residual` over the projected weights' matrices."""
    return residual.init(_matrices(where, params))


def update_outside(
    residual: optax.GradientTransformation,
    state: optax.OptState,
    where: Sites,
    rows: Sequence[Any],
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[list[jax.Array], optax.OptState]:
    """The updates that `residual` makes of what the subspace does not show.

    Args:
        residual: the transformation.
        state: its state.
        where: the projected leaves.
        rows: by leaf: view, projector, gradient, and the gradient and the update in the subspace.
        params: the parameters, if there are any.
        extra_args: for the transformation; `column_ratio` is added.

    Returns:
        By leaf an update of its shape; the next state.
    """
    rest = where.only(outside(view, p, g, low) for view, p, g, low, _ in rows)
    ratios = where.only(column_ratio(view, new, low) for view, _, _, low, new in rows)
    weights = None if params is None else _matrices(where, params)
    out, state = optax.with_extra_args_support(residual).update(
        rest, state, weights, column_ratio=ratios, **extra_args
    )
    return [v.from_matrix(x) for v, x in zip(where.views, where.pick(out), strict=True)], state


def _matrices(where: Sites, params: optax.Params) -> optax.Params:
    pairs = zip(where.views, where.pick(params), strict=True)
    return where.only(wide(view.to_matrix(w)) for view, w in pairs)


def column_ratio(view: MatrixView, new: Any, old: Any) -> jax.Array:
    """`|new_j| / |old_j|` of low-rank arrays, j the axis that is not projected.

    One number a column (inputs projected), a row (outputs) or, for a two-sided projection, a
    matrix; of a shape that multiplies `batch + (m, n)`.
    """
    axis = {"in": -2, "out": -1, "both": (-2, -1)}[view.side]
    norms = [jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True)) for x in (new, old)]
    return norms[0] / jnp.maximum(norms[1], _TINY)


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`."""

    norm: optax.Params  # shape=batch: of the last update's matrices; 0 before the first


def limit_norm_growth(gamma: jax.typing.ArrayLike = 1.01) -> optax.GradientTransformation:
    r"""Let a matrix's norm grow by no more than a factor from step to step: Fira's limiter.

    .. math::
        S_t \leftarrow S_t \min(1, \gamma \|S_{t-1}\| / \|S_t\|)

    with :math:`S_{t-1}` the last, limited, update. The first one, and one after zeros, passes.

    Args:
        gamma: largest growth of a step.

    Returns:
        An `optax.GradientTransformation` over matrices `batch + (m, n)`.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, section 3.3
    """

    def init_fn(params):
        return LimitNormGrowthState(jax.tree.map(lambda x: jnp.zeros(x.shape[:-2]), params))

    def update_fn(updates, state, params=None):
        del params
        norms = jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1))), updates)

        def factor(norm, last):
            limit = gamma * last / jnp.maximum(norm, _TINY)
            return jnp.where(last > 0, jnp.minimum(limit, 1), 1)

        factors = jax.tree.map(factor, norms, state.norm)
        limited = jax.tree.map(lambda x, f: x * f[..., None, None], updates, factors)
        return limited, LimitNormGrowthState(jax.tree.map(jnp.multiply, norms, factors))

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_column_ratio(
    largest: jax.typing.ArrayLike = jnp.inf,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by the extra argument `column_ratio`, which `galore` gives its residual."""

    def update_fn(updates, state, params=None, **extra_args):
        del params
        ratios = extra_args["column_ratio"]
        return jax.tree.map(lambda x, r: x * jnp.minimum(r, largest), updates, ratios), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
