"""A parameter as a stack of matrices, and what is projected of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A projected parameter seen as a stack of matrices.

    With `m` the product of the reduction axes, `n` of the output axes and `batch` the
    remaining ones, the matrix view is `batch + (m, n)`. For `x @ W` that is
    (inputs, outputs), as Flax stores kernels.
    """

    path: str
    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    side: str  # "in": P^T G with P (m, r). "out": G P with P (n, r). "both": two bases.
    rank: int
    dtype: Any  # dtype of the arithmetic and of low-rank arrays: at least float32

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return tuple(self.shape[a] for a in self.batch_axes)

    @property
    def m(self) -> int:
        """Rows of each matrix: inputs."""
        return math.prod(self.shape[a] for a in self.reduction_axes)

    @property
    def n(self) -> int:
        """Columns of each matrix: outputs."""
        return math.prod(self.shape[a] for a in self.output_axes)

    @property
    def projector_shape(self) -> tuple[int, ...]:
        """Shape of the stored basis; two-sided bases stand on top of each other."""
        rows = {"in": self.m, "out": self.n, "both": self.m + self.n}[self.side]
        return (*self.batch, rows, self.rank)

    @property
    def low_rank_shape(self) -> tuple[int, ...]:
        """Shape of the gradient in the subspace, and so of each moment."""
        r = self.rank
        return (
            *self.batch,
            *{"in": (r, self.n), "out": (self.m, r), "both": (r, r)}[self.side],
        )

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.reduction_axes + self.output_axes

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """View an array of the leaf's shape as `batch + (m, n)`."""
        if self._order != tuple(range(len(self.shape))):
            x = x.transpose(self._order)
        shape = (*self.batch, self.m, self.n)
        return x if x.shape == shape else x.reshape(shape)

    def from_matrix(self, x: jax.Array) -> jax.Array:
        """Undo `to_matrix`."""
        shape = tuple(self.shape[a] for a in self._order)
        x = x if x.shape == shape else x.reshape(shape)
        if self._order != tuple(range(len(self.shape))):
            x = x.transpose([self._order.index(a) for a in range(len(shape))])
        return x

    def matrix_at(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Take matrix number `index` (in the flattened batch) out of `x`, shape (m, n)."""
        for axis, i in zip(self.batch_axes, jnp.unravel_index(index, self.batch), strict=True):
            x = jax.lax.dynamic_slice_in_dim(x, i, 1, axis)
        return dataclasses.replace(self, shape=x.shape).to_matrix(x).reshape(self.m, self.n)

    @property
    def matrix(self) -> MatrixView:
        """One of the stacked matrices, as (m, n)."""
        return dataclasses.replace(
            self, shape=(self.m, self.n), batch_axes=(), reduction_axes=(0,), output_axes=(1,)
        )

    @property
    def batch_leads(self) -> bool:
        """Whether the stacked axes come first, so that a scan takes them off one by one."""
        return self.batch_axes == tuple(range(len(self.batch_axes)))

    def below(self, axes: int) -> MatrixView:
        """What is left of the leaf when scans have taken off its first `axes` stacked axes."""
        return dataclasses.replace(
            self,
            shape=self.shape[axes:],
            batch_axes=tuple(a - axes for a in self.batch_axes[axes:]),
            reduction_axes=tuple(a - axes for a in self.reduction_axes),
            output_axes=tuple(a - axes for a in self.output_axes),
        )
