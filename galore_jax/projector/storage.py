"""How a projector is stored: an array, codes and scales (`quantize.Encoded`), or indices.

Of coordinate directions only the indices are kept. `load` gives the basis that every product
uses, so what is projected and what is lifted agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.trees import Sites
from galore_jax.matrix.view import MatrixView
from galore_jax.quantize import INT4, INT8, Encoded, Format, decode, encode, spec

QUANTISED = {"int8": INT8, "int4": INT4}

Storage = Any  # a dtype (an integer one for indices), or a quantize.Format
Stored = jax.Array | Encoded
INDICES = jnp.dtype(jnp.int32)  # shape=batch + (r,): which rows, for one-sided projections


def default_projector(view: MatrixView, storage: Storage) -> Stored:
    """An orthonormal basis to start from: the first coordinate directions."""
    rows = (view.m, view.n) if view.side == "both" else (view.projector_shape[-2],)
    basis = jnp.concatenate([jnp.eye(k, view.rank, dtype=view.dtype) for k in rows])
    one = store(view.matrix, basis, storage)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*view.batch, *x.shape)), one)


def store(view: MatrixView, p: jax.Array, storage: Storage) -> Stored:
    """Cast or quantise a projector of `view.projector_shape`."""
    if isinstance(storage, Format):
        return encode(p, storage)
    if storage == INDICES:
        return jnp.argmax(jnp.abs(p), axis=-2).astype(INDICES)
    return p.astype(storage)


def load(view: MatrixView, stored: Stored) -> jax.Array:
    """The basis that a stored projector stands for, in the dtype of the arithmetic."""
    if isinstance(stored, Encoded):
        return decode(*stored, storage_of(stored), view.projector_shape, view.dtype)
    if stored.dtype == INDICES:
        return jax.nn.one_hot(stored, view.projector_shape[-2], axis=-2, dtype=view.dtype)
    return stored.astype(view.dtype)


def storage_of(stored: Stored) -> Storage:
    """How a projector is stored."""
    if isinstance(stored, Encoded):
        return next(f for f in QUANTISED.values() if f.dtype == stored.codes.dtype)
    return stored.dtype


def stored_types(view: MatrixView, storage: Storage) -> tuple[str, ...]:
    """Dtypes and shapes of the arrays that hold a leaf's projector."""
    if isinstance(storage, Format):
        return tuple(map(array_type, spec(view.projector_shape, storage)))
    shape = (*view.batch, view.rank) if storage == INDICES else view.projector_shape
    return (array_type(jax.ShapeDtypeStruct(shape, storage)),)


def array_type(x: Any) -> str:
    """As in `float32[8,4]`."""
    return f"{jnp.result_type(x)}[{','.join(map(str, jnp.shape(x)))}]"


def is_indices(stored: Stored) -> bool:
    """Whether a projector is stored as the rows that it takes."""
    return not isinstance(stored, Encoded) and stored.dtype == INDICES


def to_tree(where: Sites, stored: Sequence[Stored], storage: Storage) -> optax.Params:
    """The projectors as a tree like the parameters, or as one of codes and one of scales.

    Two trees, since `nnx.Optimizer` does not keep a struct in the place of a parameter.
    """
    if isinstance(storage, Format):
        return Encoded(*(where.only([getattr(p, f) for p in stored]) for f in Encoded._fields))
    return where.only(stored)


def from_tree(where: Sites, tree: optax.Params) -> list[Stored]:
    """Undo `to_tree`."""
    if isinstance(tree, Encoded):
        return [Encoded(*x) for x in zip(*map(where.pick, tree), strict=True)]
    return where.pick(tree)
