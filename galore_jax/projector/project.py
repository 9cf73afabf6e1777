"""Into the subspace and back: R = P^T G (or G P, or P^T G Q), and its transpose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.matrix.view import MatrixView
from galore_jax.projector.gradient import ProjectedGradient
from galore_jax.projector.storage import INDICES, Stored, is_indices, load


def bases(view: MatrixView, stored: Stored) -> tuple[jax.Array | None, jax.Array | None]:
    """The bases (P, Q) that a stored projector holds, None on a side left full."""
    p = load(view, stored)
    if view.side == "in":
        return p, None
    if view.side == "out":
        return None, p
    return p[..., : view.m, :], p[..., view.m :, :]


def low_rank(view: MatrixView, p: Stored, g: jax.Array | ProjectedGradient) -> jax.Array:
    """A gradient in the subspace, `view.low_rank_shape`, whether it is there already or not."""
    return g.low_rank if isinstance(g, ProjectedGradient) else project(view, p, g)


def project(view: MatrixView, p: Stored, g: jax.Array) -> jax.Array:
    """Project a gradient of the leaf's shape, giving `view.low_rank_shape`."""
    r = view.to_matrix(g).astype(view.dtype)
    if is_indices(p):
        return _take(view, r, p)
    p_in, p_out = bases(view, p)
    if p_in is not None:
        r = contract(p_in, -2, r, -2)
    if p_out is not None:
        r = contract(r, -1, p_out, -2)
    return r


def lift(view: MatrixView, p: Stored, r: jax.Array) -> jax.Array:
    """Lift a low-rank update to the leaf's shape."""
    u = r.astype(view.dtype)
    if is_indices(p):
        # Rows not among the indices come from one of zeros behind the others: a gather, which
        # is faster than a scatter.
        hot = jax.nn.one_hot(p, view.projector_shape[-2], dtype=INDICES)
        slots = jax.lax.broadcasted_iota(INDICES, hot.shape, hot.ndim - 2) - view.rank
        places = view.rank + jnp.sum(slots * hot, axis=-2)
        widths = [(0, 0)] * u.ndim
        widths[-2 if view.side == "in" else -1] = (0, 1)
        return view.from_matrix(_take(view, jnp.pad(u, widths), places))
    p_in, p_out = bases(view, p)
    if p_out is not None:
        u = contract(u, -1, p_out, -1)
    if p_in is not None:
        u = contract(p_in, -1, u, -2)
    return view.from_matrix(u)


def outside(view: MatrixView, p: Stored, g: jax.Array, low_rank: jax.Array | None = None) -> Any:
    """`G - P P^T G` of a gradient of the leaf's shape, as matrices; `low_rank` is its P^T G."""
    if is_indices(p):  # rows that the subspace has not: a select, which needs no lifted matrix
        chosen = jnp.sum(jax.nn.one_hot(p, view.projector_shape[-2], dtype=INDICES), axis=-2)
        rows = chosen[..., :, None] if view.side == "in" else chosen[..., None, :]
        return jnp.where(rows == 0, view.to_matrix(g).astype(view.dtype), 0)
    if low_rank is None:
        low_rank = project(view, p, g)
    return view.to_matrix(g.astype(view.dtype) - lift(view, p, low_rank))


def _take(view: MatrixView, x: jax.Array, indices: Any) -> jax.Array:
    """Rows of matrices where inputs are projected, columns where outputs are."""
    if view.side == "in":
        return jnp.take_along_axis(x, indices[..., :, None], axis=-2)
    return jnp.take_along_axis(x, indices[..., None, :], axis=-1)


def contract(a: jax.Array, axis_a: int, b: jax.Array, axis_b: int, dtype: Any = None) -> jax.Array:
    """Batched matrix product that sums over the given one of each operand's two last axes.

    One `dot_general`: traced much faster than einsum, which tells with hundreds of leaves.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((axis_a % a.ndim,), (axis_b % b.ndim,)), (batch, batch)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)
