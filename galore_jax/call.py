"""What a caller tells `galore` about an update, through Optax's extra arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import optax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("emits", "layer", "projector_grads"),
    meta_fields=("refresh", "matrices"),
)
@dataclasses.dataclass(frozen=True)
class Call:
    """The argument `galore` of `tx.update(grads, state, params, galore=Call(...))`.

    A pytree: under a `jit` what decides which program is compiled is part of its cache key, the
    rest is traced.
    """

    emits: jax.Array | None = None  # bool: whether an `optax.MultiSteps` will use the result
    layer: jax.Array | None = None  # int32: which layer's slices of stacked leaves are updated
    projector_grads: Any = None  # gradients to compute projectors from in the place of others
    refresh: bool = True  # whether the program may refresh
    # With a layer, by path of a projected leaf: the number of its first matrix among all of the
    # optimizer's, and how many there are.
    matrices: tuple[tuple[str, int, int], ...] = ()


def update_with(
    tx: optax.GradientTransformation, call: Call, updates: Any, state: Any, params: Any, **more: Any
) -> tuple[Any, Any]:
    """`tx.update(...)`, with the call and more where its signature has room for them."""
    try:
        parameters = inspect.signature(tx.update).parameters.values()
    except ValueError:  # of a builtin
        parameters = ()
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters]
    extra = {k: v for k, v in {"galore": call, **more}.items() if every or k in names}
    return tx.update(updates, state, params, **extra)
