"""Names of axes beside parameters: variables of Flax NNX, boxes of Linen.

`nnx.get_partition_spec` and `nn.get_partition_spec` read from them how an array is to be sharded,
the arrays of an optimizer's state too. Optax's states come by theirs as they are mapped over the
parameters, and an array of another shape gets names that do not fit it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax

from galore_jax.int8 import is_int8
from galore_jax.matrix.trees import bare, is_boxed, shapes
from galore_jax.sharding import Axes, Names, axes_of_state

# Where no mesh is at hand, what its axes are thought to be at most.
_LARGEST = 256

# What Flax NNX has called them, and Linen.
_FIELDS = ("out_sharding", "sharding_names", "names")


def named(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """The state of an optimizer, each array boxed as its parameter is, its axes named.

    Args:
        tx: the optimizer.
        state: its state, of bare arrays.
        params: the parameters, boxed or not.

    Returns:
        The state; as it is where no parameter names its axes.
    """
    boxes = jax.tree.leaves(params, is_leaf=lambda x: is_int8(x) or is_boxed(x))
    fields = [_field(x) for x in boxes]
    if not any(fields):
        return state
    like = shapes(bare(params))
    parameters = jax.tree.leaves(like)
    given = [
        [() if name is None else (name,) for name in _names(box, field)]
        if field
        else [()] * len(x.shape)
        for box, field, x in zip(boxes, fields, parameters, strict=True)
    ]
    leaves, treedef = jax.tree.flatten(state)
    values = iter(leaves)

    def place(axes: Axes) -> Any:
        value = next(values)
        if axes.owner is None or (field := fields[axes.owner]) is None:
            return value
        sizes = _parts(given[axes.owner], parameters[axes.owner].shape)
        return _boxed(boxes[axes.owner], value, field, _named(axes, sizes))

    return treedef.unflatten(
        jax.tree.leaves(axes_of_state(tx, like, given, place), is_leaf=is_boxed)
    )


def _parts(names: list[Names], shape: tuple[int, ...]) -> dict[Any, int]:
    """By name into how many parts an axis may be cut: by the mesh at hand, or a power of two."""
    mesh = dict(jax.sharding.get_abstract_mesh().shape)

    def parts(name: Any, n: int) -> int:
        several = name if isinstance(name, tuple) else (name,)
        known = all(part in mesh for part in several)
        return math.prod(mesh[part] for part in several) if known else min(n & -n, _LARGEST)

    return {name: parts(name, n) for n, of in zip(shape, names, strict=True) for name in of}


def _named(axes: Axes, parts: dict[Any, int]) -> tuple[Any, ...]:
    """Names of an array's axes: as in the weight, and what it cuts elsewhere on the longest."""
    names = [n[0] if n and k > 1 else None for n, k in zip(axes.names, axes.pieces, strict=True)]
    for name, size in parts.items():
        order = sorted(range(len(names)), key=lambda axis: -axes.shape[axis])
        free = (
            a
            for a in order
            if names[a] is None and axes.pieces[a] > 1 and axes.pieces[a] % size == 0
        )
        at = next(free, None)
        if name not in names and at is not None:
            names[at] = name
    return tuple(names)


def _field(box: Any) -> str | None:
    """Where a box keeps the names of its array's axes."""
    if not is_boxed(box):
        return None
    if hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        return next((field for field in _FIELDS if metadata.get(field)), None)
    return next((field for field in _FIELDS if getattr(box, field, None)), None)


def _names(box: Any, field: str) -> Any:
    return box.get_metadata()[field] if hasattr(box, "get_metadata") else getattr(box, field)


def _boxed(box: Any, value: Any, field: str, names: tuple[Any, ...]) -> Any:
    """The value in a box like this one."""
    if hasattr(box, "get_metadata"):
        return box.replace(value, **{field: names})
    return dataclasses.replace(box.replace_boxed(value), **{field: names})
