"""Into the subspace and back: R = P^T G (or G P, or P^T G Q), and its transpose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.leaf import Leaf


def default_projector(leaf: Leaf, dtype: Any) -> jax.Array:
    """An orthonormal basis to start from: the first coordinate directions."""
    rows = (leaf.m, leaf.n) if leaf.side == "both" else (leaf.projector_shape[-2],)
    basis = jnp.concatenate([jnp.eye(k, leaf.rank, dtype=dtype) for k in rows])
    return jnp.broadcast_to(basis, leaf.projector_shape)


def bases(leaf: Leaf, p: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """The bases (P, Q) that a stored projector holds, None on a side left full."""
    p = p.astype(leaf.dtype)
    if leaf.side == "in":
        return p, None
    if leaf.side == "out":
        return None, p
    return p[..., : leaf.m, :], p[..., leaf.m :, :]


def project(leaf: Leaf, p: jax.Array, g: jax.Array) -> jax.Array:
    """Project a gradient of the leaf's shape, giving `leaf.low_rank_shape`."""
    p_in, p_out = bases(leaf, p)
    r = leaf.to_matrix(g).astype(leaf.dtype)
    if p_in is not None:
        r = contract(p_in, -2, r, -2)
    if p_out is not None:
        r = contract(r, -1, p_out, -2)
    return r


def lift(leaf: Leaf, p: jax.Array, r: jax.Array) -> jax.Array:
    """Lift a low-rank update to the leaf's shape."""
    p_in, p_out = bases(leaf, p)
    u = r.astype(leaf.dtype)
    if p_out is not None:
        u = contract(u, -1, p_out, -1)
    if p_in is not None:
        u = contract(p_in, -1, u, -2)
    return leaf.from_matrix(u)


def contract(a: jax.Array, axis_a: int, b: jax.Array, axis_b: int) -> jax.Array:
    """Batched matrix product that sums over the given one of each operand's two last axes.

    One `dot_general`: traced much faster than einsum, which tells with hundreds of leaves.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((axis_a % a.ndim,), (axis_b % b.ndim,)), (batch, batch)
    return jax.lax.dot_general(a, b, dims)
