"""RACS: the gradient, scaled by row and by column.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension", https://arxiv.org/abs/2502.07752. Written from the paper's equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.inner.residual import limit_norm_growth
from galore_jax.optimizers.matrices import beside_adam, over_matrices
from galore_jax.optimizers.wrap import in_float32
from galore_jax.settings import Settings

_STEPS = 5  # of the fixed-point iteration
_TINY = 1e-37  # what is below it counts as none


class ScaleByRowAndColumnState(NamedTuple):
    """State of `scale_by_row_and_column`: trees like the matrices."""

    rows: optax.Updates  # shape=batch + (m,)
    columns: optax.Updates  # shape=batch + (n,)


def scale_by_row_and_column(
    decay: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide a matrix by the roots of one number a row and one a column.

    With :math:`G^2` the squares of the elements of a matrix (m, n), and from q = 1 five times

    .. math::
        s = (G^2)^T q / \|q\|^2, \quad q = G^2 s / \|s\|^2,

    so that :math:`q s^T` is the best approximation of :math:`G^2` of rank one,

    .. math::
        \bar s &\leftarrow \beta \bar s + (1 - \beta) s, \quad
        \bar q \leftarrow \beta \bar q + (1 - \beta) q \\
        U &= \mathrm{diag}(\bar q)^{-1/2}\, G\, \mathrm{diag}(\bar s)^{-1/2}

    Args:
        decay: beta.

    Returns:
        An `optax.GradientTransformationExtraArgs` over matrices `batch + (m, n)`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.scale_by_row_and_column(decay=0.0)
        >>> g = jnp.array([[1.0, -10.0], [3.0, 30.0]])
        >>> tx.update(g, tx.init(g))[0].round(3).tolist()
        [[1.0, -1.0], [1.0, 1.0]]

    References:
        Gong et al., `RACS <https://arxiv.org/abs/2502.07752>`_, 2025
    """

    def init_fn(params):
        rows = jax.tree.map(lambda x: jnp.zeros(x.shape[:-1]), params)
        columns = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], x.shape[-1])), params)
        return ScaleByRowAndColumnState(rows, columns)

    def update_fn(updates, state, params=None):
        del params

        def rank_one(g):
            # In units of the largest element: the squares of squares must not vanish.
            unit = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
            squares = jnp.square(g / jnp.maximum(unit, _TINY))
            q = jnp.ones(g.shape[:-1], g.dtype)
            for _ in range(_STEPS):
                s = _mean(jnp.swapaxes(squares, -1, -2), q)
                q = _mean(squares, s)
            return q, s * jnp.square(unit[..., 0])

        def mixed(old, new):
            return jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, new)

        leaves, treedef = jax.tree.flatten(updates)
        found = [rank_one(g) for g in leaves]
        rows = mixed(state.rows, treedef.unflatten([q for q, _ in found]))
        columns = mixed(state.columns, treedef.unflatten([s for _, s in found]))

        def scaled(g, q, s):
            return g * _rsqrt(q)[..., :, None] * _rsqrt(s)[..., None, :]

        new = ScaleByRowAndColumnState(rows, columns)
        return jax.tree.map(scaled, updates, rows, columns), new

    return in_float32(optax.GradientTransformation(init_fn, update_fn))


def _mean(matrix: jax.Array, weights: jax.Array) -> jax.Array:
    """`matrix @ weights / |weights|^2`."""
    product = jnp.sum(matrix * weights[..., None, :], axis=-1)
    square = jnp.sum(jnp.square(weights), axis=-1, keepdims=True)
    return product / jnp.maximum(square, _TINY)


def _rsqrt(x: jax.Array) -> jax.Array:
    return jnp.where(x > _TINY, jax.lax.rsqrt(jnp.maximum(x, _TINY)), 0)


def racs(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    scale: jax.typing.ArrayLike = 0.05,
    gamma: jax.typing.ArrayLike = 1.01,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    exclude: str | None = Settings.exclude,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RACS: SGD scaled by row and column, m + n + 1 numbers for a matrix (m, n).

    With U the update of `scale_by_row_and_column`,

    .. math:: W \leftarrow W - \eta\,(\alpha\, U + \lambda W)

    where the norm of U grows by no more than gamma from step to step. Other leaves, and those
    that `exclude` names, take AdamW steps.

    Args:
        learning_rate: eta, a number or a schedule. Times alpha about AdamW's: around 0.02.
        decay: beta, of the means over steps of the numbers of rows and columns.
        weight_decay: lambda, decoupled, of all leaves.
        mask: tree of bools, or callable giving one: which leaves decay.
        scale: alpha, on matrices alone.
        gamma: largest growth of an update's norm in a step.
        adam_learning_rate: of the leaves that take AdamW steps, by default `learning_rate`, which
            is too large for most: try AdamW's.
        b1: decay rate of their first moment.
        b2: decay rate of their second moment.
        eps: added to the root of their second moment.
        exclude: see `galore`.
        weight_dimension_numbers: see `galore`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        ValueError: as `galore` for `exclude` and `weight_dimension_numbers`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.racs(0.02)
        >>> state = tx.init({"kernel": jnp.ones((8, 16))}).inner_states["racs"]
        >>> sum(x.size for x in jax.tree.leaves(state))
        25

    References:
        Gong et al., `RACS <https://arxiv.org/abs/2502.07752>`_, 2025
    """
    settings = Settings(rank=1, exclude=exclude, weight_dimension_numbers=weight_dimension_numbers)
    matrices = optax.chain(
        scale_by_row_and_column(decay), limit_norm_growth(gamma), optax.scale(scale)
    )
    return beside_adam(
        over_matrices(matrices, settings),
        settings,
        learning_rate,
        adam_learning_rate,
        in_float32(optax.scale_by_adam(b1, b2, eps)),
        weight_decay,
        mask,
        "racs",
    )
