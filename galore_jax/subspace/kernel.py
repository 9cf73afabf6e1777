"""A kernel that hands its gradient over already projected.

`Tapped` stands in the place of a kernel in the tree of parameters. Being a pytree node it is
sliced by scans with its model, so the tap sits inside the scanned block, and the gradient of
one layer at a time is all that exists. Its gradient comes back as the cotangents of `Slots`,
arrays that the forward pass never reads: P^T dW for the low-rank gradient, and with it what
only the backward pass can know, dW's norm and, on a refresh, the new projector. (Flax's fp8
ops return their scales the same way.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.control import cond, mean_over
from galore_jax.matrix.view import MatrixView
from galore_jax.meshes import as_auto, everywhere, explicit_mesh
from galore_jax.node import ArrayNode
from galore_jax.projector.basis import Methods
from galore_jax.projector.gradient import Basis, pack
from galore_jax.projector.project import project
from galore_jax.projector.refresh import renew, seed_of
from galore_jax.projector.storage import Stored


class Slots(NamedTuple):
    """Where cotangents come back, for a stack of matrices; zeros on the way in."""

    low_rank: jax.Array  # view.low_rank_shape: the projected gradient
    square: jax.Array  # view.batch: squared norm of the full gradient
    basis: Basis | None  # what it was projected on, where that may be new


class Turn(NamedTuple):
    """Which of the matrices refresh at this step, all of shape view.batch."""

    due: jax.Array  # bool
    layer: jax.Array  # int32: numbers in the stack, with the step what seeds random bases
    step: jax.Array  # int32: see `Schedule`


@dataclasses.dataclass(frozen=True)
class Rule:
    """What of a tap is known when it is traced."""

    view: MatrixView  # of the whole stack
    methods: Methods
    axis_name: tuple[str, ...]  # the mapped axes that gradients are averaged over
    exact_norm: bool  # whether the norm of the full gradient is wanted

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean over devices that share a batch."""
        return mean_over(x, self.axis_name)

    def at(self, ndim: int) -> MatrixView:
        """The view of a kernel of `ndim` axes, below the scans around it."""
        return self.view.below(len(self.view.shape) - ndim)


class Kernel(NamedTuple):
    """The arrays of a tapped kernel. The weight comes first: Linen checks its shape there."""

    weight: jax.Array  # or a node that stands for one
    projector: Stored
    slots: Slots
    turn: Turn | None  # None: no refresh in this program


@jax.tree_util.register_pytree_with_keys_class
class Tapped(ArrayNode):
    """A kernel as modules meet it: an array to them, by `__jax_array__`."""

    def __init__(self, kernel: Kernel, rule: Rule, dtype: Any = None):
        self.kernel, self.rule, self._dtype = kernel, rule, dtype

    def tree_flatten_with_keys(self):
        """Weight, projector, slots and turn, by name."""
        keys = map(jax.tree_util.GetAttrKey, Kernel._fields)
        return tuple(zip(keys, self.kernel, strict=True)), (self.rule, self._dtype)

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Undo `tree_flatten_with_keys`."""
        return cls(Kernel(*children), *aux)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.kernel.weight.shape

    @property
    def dtype(self) -> Any:
        """Dtype that the weight is used in."""
        return self._dtype or self.kernel.weight.dtype

    @property
    def sharding(self) -> Any:
        """Sharding of the weight."""
        return self.kernel.weight.sharding

    def check_untouched(self) -> None:
        """Raise where a loss has cast its whole tree of parameters, projectors and all."""
        view, low_rank = self.rule.view, self.kernel.slots.low_rank
        if low_rank.dtype != view.dtype:
            raise TypeError(
                f"galore_jax.value_and_grad: kernel '{view.path}' came with its projector cast to "
                f"{low_rank.dtype}. Do not cast the tree of parameters in the loss: give layers "
                "dtype=, or cast each kernel where it is used (w.astype(dtype))"
            )

    def astype(self, dtype: Any) -> Tapped:
        """Cast where it is used."""
        return Tapped(self.kernel, self.rule, jnp.dtype(dtype))

    def __jax_array__(self) -> jax.Array:
        self.check_untouched()
        # What makes an array of a weight in codes is no part of the tap: it has no gradient.
        kernel = self.kernel._replace(weight=jnp.asarray(self.kernel.weight))
        weight: Any = _tap(self.rule, kernel)
        return weight.astype(self.dtype)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and self.rule.at(self.ndim).batch:  # one of the stack
            return Tapped(jax.tree.map(lambda a: a[index], self.kernel), self.rule, self._dtype)
        return super().__getitem__(index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(rule: Rule, kernel: Kernel) -> jax.Array:
    """The weight; its cotangent is projected, in all the stacked matrices it still has."""
    return kernel.weight


def _tap_forward(rule, kernel):
    return kernel.weight, (kernel.projector, kernel.turn)


def _tap_backward(rule, saved, dw):
    projector, turn = saved
    view, matrix = rule.at(dw.ndim), rule.view.matrix

    if (mesh := explicit_mesh(dw)) is not None:
        back = functools.partial(_tap_backward, rule)
        return as_auto(mesh, back, saved, dw, like=everywhere(mesh))

    def one(dw, stored, turn):
        return cotangents(
            rule,
            stored,
            turn,
            gradient=lambda: dw,
            project=lambda p: project(matrix, p, dw),
            square=lambda: jnp.sum(jnp.square(dw.astype(view.dtype))),
        )

    if not view.batch:
        return (as_kernel(one(view.to_matrix(dw), projector, turn)),)
    count, axes = math.prod(view.batch), len(view.batch)
    matrices = view.to_matrix(dw).reshape(count, view.m, view.n)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[axes:]), (projector, turn))
    slots = jax.lax.map(lambda x: one(x[0], *x[1]), (matrices, flat))
    return (as_kernel(jax.tree.map(lambda x: x.reshape(*view.batch, *x.shape[1:]), slots)),)


_tap.defvjp(_tap_forward, _tap_backward)


def cotangents(rule: Rule, stored: Stored, turn, gradient, project, square) -> Slots:
    """What a tap hands back for one matrix, given ways to get at its gradient.

    Averaged after projection: between refreshes no full gradient goes from device to device, but
    for an exact norm.
    """
    view = rule.view.matrix

    def squared():
        if not rule.exact_norm:
            return jnp.zeros([], view.dtype)
        if not rule.axis_name:
            return square()
        return jnp.sum(jnp.square(rule.mean(gradient()).astype(view.dtype)))

    if turn is None:
        return Slots(rule.mean(project(stored)), squared(), None)

    def due():
        seed = seed_of(rule.view), turn.step, turn.layer
        return renew(view, rule.mean(gradient()), stored, seed, rule.methods)

    new, renewed = cond(turn.due, due, lambda: (stored, jnp.zeros([], bool)))
    return Slots(rule.mean(project(new)), squared(), pack(view, new, renewed))


def as_kernel(slots: Slots) -> Kernel:
    """Cotangents of a kernel: none but the slots'."""
    return Kernel(None, None, slots, None)  # type: ignore[arg-type]
