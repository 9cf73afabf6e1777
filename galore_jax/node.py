"""Nodes of a tree of parameters that modules meet as arrays, by `__jax_array__`."""

from __future__ import annotations

import abc
import math
from typing import Any

import jax.numpy as jnp


class ArrayNode(abc.ABC):
    """What is common to kernels with arrays of their own: they act as the weight they stand for."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Dtype that the weight is used in."""

    @abc.abstractmethod
    def astype(self, dtype: Any) -> Any:
        """The same weight, used in another dtype."""

    @abc.abstractmethod
    def __jax_array__(self) -> Any: ...

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.__jax_array__()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __neg__(self) -> Any:
        return -self.__jax_array__()

    __array_ufunc__ = None  # NumPy's operators leave it to ours

    def __getattr__(self, name: str) -> Any:  # T, reshape, ...
        if name.startswith("_") or hasattr(type(self), name):  # as where there are no arrays inside
            raise AttributeError(name)
        return getattr(self.__jax_array__(), name)


def _operator(name: str):
    def method(self, other):
        return getattr(self.__jax_array__(), name)(jnp.asarray(other))

    return method


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _op in (f"__{_name}__", f"__r{_name}__"):
        setattr(ArrayNode, _op, _operator(_op))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ArrayNode, f"__{_name}__", _operator(f"__{_name}__"))
