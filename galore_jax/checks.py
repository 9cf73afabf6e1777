"""Errors that name the argument, the value and the leaf."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.leaf import Leaf, Plan, Sites
from galore_jax.lowrank import is_projected
from galore_jax.projection import INDICES, QUANTISED, Storage, stored_shapes
from galore_jax.quantize import Encoded
from galore_jax.specs import path_string

PROJECTOR_DTYPES = ("float32", "bfloat16", *QUANTISED)


def check_shapes(updates: Any, params: Any) -> None:
    """Raise where gradients are not of the parameters' structure and shapes."""
    shapes = [
        {
            path_string(path): (x.shape if is_projected(x) else jnp.shape(x))
            for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_projected)
        }
        for tree in (updates, params)
    ]
    for path in {**shapes[1], **shapes[0]}:
        g, w = (s.get(path, "absent") for s in shapes)
        if g != w:
            raise ValueError(
                f"gradients and parameters do not match at leaf '{path}': the gradient's shape is "
                f"{g}, the parameter's {w}"
            )


def check_projectors(plan: Plan, where: Sites, projector: Any, storage: Storage) -> None:
    """Raise where a state's projectors are not those of the plan."""
    trees = projector if isinstance(projector, Encoded) else (projector,)
    for leaf, *stored in zip(plan, *map(where.flatten, trees), strict=True):
        projected = isinstance(leaf, Leaf)
        wanted = stored_shapes(leaf, storage or leaf.dtype) if projected else None
        found = tuple(jnp.shape(p) for p in stored if not isinstance(p, optax.MaskedNode)) or None
        if wanted != found:
            rank = f" (rank {leaf.rank})" if projected else ""
            raise ValueError(
                f"galore's state does not fit leaf '{leaf.path}' of shape {leaf.shape}: its "
                f"projector has shape {found}, expected {wanted}{rank}, None meaning not "
                "projected. Was the state restored from a run with another rank, proj_type, "
                "projector_dtype, exclude or weight_dimension_numbers? Use the same, or start "
                "from tx.init(params)"
            )


def check_projected(leaves: Sequence[Leaf], grads: Sequence[Any], needs: str | None = None) -> None:
    """Raise where gradients were projected by another optimizer's settings.

    Args:
        leaves: the projected leaves.
        grads: their gradients, full or projected.
        needs: what needs full gradients, if anything does.
    """
    for leaf, g in zip(leaves, grads, strict=True):
        if is_projected(g) and needs is not None:
            raise ValueError(needs_full(needs, leaf.path))
        if is_projected(g) and (g.leaf.side, g.leaf.rank) != (leaf.side, leaf.rank):
            raise ValueError(
                f"the gradient of leaf '{leaf.path}' was projected on side '{g.leaf.side}' to rank "
                f"{g.leaf.rank}, but this optimizer projects it on side '{leaf.side}' to rank "
                f"{leaf.rank}: give galore_jax.value_and_grad the optimizer that updates"
            )


def check_full(updates: Any, what: str) -> None:
    """Raise where gradients arrived in the subspace."""
    for path, g in jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_projected):
        if is_projected(g):
            raise ValueError(needs_full(what, path_string(path)))


def needs_full(what: str, path: str) -> str:
    """The message for gradients that arrived in the subspace where they must not."""
    return (
        f"{what} needs the full gradient, of which galore_jax.value_and_grad hands over the "
        f"projection alone (leaf '{path}'). Use jax.value_and_grad, or "
        "galore_jax.value_and_update, which holds the gradient of one layer at a time"
    )


def check_gap(gap: Any) -> None:
    """Raise unless the gap is a step count."""
    if isinstance(gap, jax.Array):  # traced or injected: its value may be unknown
        return
    if not isinstance(gap, numbers.Integral) or isinstance(gap, bool):
        raise TypeError(f"update_proj_gap must be an int >= 1, got {gap!r}")
    if int(gap) < 1:
        raise ValueError(f"update_proj_gap must be an int >= 1, got {gap}")
    if int(gap) >= 2**31:
        raise ValueError(f"update_proj_gap must be below 2^31, as steps are, got {gap}")


def check_scale(scale: Any) -> None:
    """Raise unless the scale is one number."""
    if not isinstance(scale, numbers.Real | jax.Array | np.ndarray) or np.shape(scale):  # type: ignore[arg-type]
        raise TypeError(f"scale must be a number, got {scale!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def indices(projector_dtype: Any, proj_type: str) -> Storage:
    """How to store coordinate directions; raise for options that make no sense with them."""
    if projector_dtype is not None:
        raise ValueError(
            "method='coordinates' stores which rows it takes, so projector_dtype has no meaning, "
            f"got {projector_dtype!r}; leave it out"
        )
    if proj_type == "full":
        raise ValueError("method='coordinates' projects one side, not proj_type='full'")
    return INDICES


def projector_storage(dtype: Any) -> Storage:
    """How to store projectors; None for the dtype of the arithmetic."""
    if dtype is None:
        return None
    name = dtype
    if not isinstance(dtype, str) or dtype not in QUANTISED:
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = None
    if name not in PROJECTOR_DTYPES:
        raise ValueError(
            f"projector_dtype must be None or one of {', '.join(PROJECTOR_DTYPES)}, got {dtype!r}"
        )
    return QUANTISED[name] if name in QUANTISED else np.dtype(jnp.dtype(name))
