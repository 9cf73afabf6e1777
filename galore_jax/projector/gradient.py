"""The gradient of a projected leaf that arrives in the subspace."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.matrix.view import MatrixView
from galore_jax.projector.storage import Stored, load, storage_of, store

# What is no part of a gradient or an update but rides along with one is scaled down to this: it
# adds nothing to a norm in float32, and a power of two leaves its digits alone.
LIGHT = 2.0**-60

# Squared norms of a basis' columns are compared to this: they tell equal bases from others.
_SAME = 1e-3


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("projector", "squares", "renewed", "unit"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Basis:
    """A projector beside the gradient that it projected; all arrays in units of `unit`."""

    projector: jax.Array  # shape=view.projector_shape
    squares: jax.Array  # shape=batch + (r,): squared norms of its columns
    renewed: jax.Array  # shape=batch: one where it was made at this step, else zero
    unit: jax.Array  # shape=batch: LIGHT, times what the gradient was scaled by; 1 once received


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("low_rank", "rest", "basis"),
    meta_fields=("view",),
)
@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
    """The gradient of a projected leaf, as `galore_jax.value_and_grad` returns it.

    A pytree node whose arrays scale with the gradient, so that links of a chain that scale or
    measure gradients (`optax.clip_by_global_norm`) work on it unchanged. The global norm of a
    tree with these nodes is that of the full gradient, since
    `|G|^2 = |R|^2 + |G - P P^T G|^2`; scaling one scales the gradient; adding two adds the
    gradients (`rest` then is an upper bound, by the triangle inequality) when their projectors
    are the same.
    """

    low_rank: jax.Array  # R, shape=view.low_rank_shape
    rest: jax.Array  # shape=view.batch: norm of the part of G outside the subspace
    basis: Basis | None  # None from a program without refreshes: that of the state
    view: MatrixView

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full gradient."""
        return self.view.shape


def is_projected(x: Any) -> bool:
    """Whether a leaf is a gradient in the subspace."""
    return isinstance(x, ProjectedGradient)


def pack(view: MatrixView, stored: Stored, renewed: jax.Array) -> Basis:
    """A stored projector, and whether it is new, to ride along with a gradient."""
    p = load(view, stored)
    light = jnp.full(view.batch, LIGHT, view.dtype)
    squares = jnp.sum(jnp.square(p), axis=-2)
    return Basis(p * LIGHT, squares * LIGHT, jnp.where(renewed, light, 0), light)


def received(gradient: Any) -> Any:
    """A gradient whose basis, if it brings one, is as it was before links scaled the gradient.

    Averaged by hand, under `shard_map` or over microbatches, gradients are projected alike between
    refreshes alone. Where bases differ no step would be right: R is NaN, and the basis is not new.
    Bases that differ show, since their columns are shorter in the mean.
    """
    if not is_projected(gradient) or gradient.basis is None:
        return gradient
    # A unit of zero, from scaling by zero or of a kernel that the loss does not use, leaves no
    # basis and a gradient that is zero rightly.
    basis = gradient.basis
    unit = jnp.where(basis.unit == 0, 1, basis.unit)
    p, renewed = basis.projector / unit[..., None, None], basis.renewed / unit
    squares = basis.squares / unit[..., None]
    # Also false where the basis is not finite.
    equal = jnp.abs(jnp.sum(jnp.square(p), axis=-2) - squares) <= _SAME * squares
    sound = jnp.all(equal, axis=-1) & ((renewed == 0) | (renewed == 1))
    return dataclasses.replace(
        gradient,
        low_rank=jnp.where(sound[..., None, None], gradient.low_rank, jnp.nan),
        basis=Basis(p, squares, jnp.where(sound, renewed, 0), jnp.ones_like(unit)),
    )


def unpack(view: MatrixView, basis: Basis, old: Stored) -> tuple[Stored, jax.Array]:
    """The projector of a received gradient, stored as the old one is, and where it is new.

    The old one stays where it is not.
    """
    new, done = store(view, basis.projector, storage_of(old)), basis.renewed == 1

    def choose(n, o):
        return jnp.where(done.reshape(done.shape + (1,) * (n.ndim - done.ndim)), n, o)

    return jax.tree.map(choose, new, old), done
