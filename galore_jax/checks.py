"""Whether what an update is given fits the optimizer; errors that name value and leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.plan import Plan
from galore_jax.matrix.trees import Sites, path_string
from galore_jax.matrix.view import MatrixView
from galore_jax.projector.gradient import is_projected
from galore_jax.projector.storage import Storage, array_type, stored_types
from galore_jax.quantize import Encoded
from galore_jax.state import is_state


def check_state(state: Any, lazy: bool) -> None:
    """Raise for a state that is not a galore's, or of one with another `refresh`."""
    if not is_state(state):
        raise TypeError(
            f"galore's state must be a GaLoreState, got {type(state).__name__}. A checkpoint "
            "has to be restored with a target: jax.eval_shape(tx.init, params), on a mesh with the "
            "shardings of galore_jax.state_sharding"
        )
    if lazy == isinstance(state.turns_between, optax.EmptyState):
        options = ("lazy", "fixed")
        raise ValueError(
            f"galore has refresh='{options[not lazy]}', and its state is of a run with "
            f"refresh='{options[lazy]}': turns_between, by which matrices wait, belongs to 'lazy' "
            "alone. Use the same option, or start from tx.init(params)"
        )


def check_gradients(updates: Any, params: Any) -> None:
    """Raise where gradients are not of the parameters' structure and shapes."""
    if params is None:
        if any(map(is_projected, jax.tree.leaves(updates, is_leaf=is_projected))):
            raise ValueError(
                "galore: gradients from galore_jax.value_and_grad need the parameters: call "
                "tx.update(grads, state, params)"
            )
        return
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
        projected = isinstance(leaf, MatrixView)
        wanted = stored_types(leaf, storage or leaf.dtype) if projected else None
        found = tuple(map(array_type, stored)) if jax.tree.leaves(stored) else None
        if wanted != found:
            rank = f" (rank {leaf.rank})" if projected else ""
            raise ValueError(
                f"galore's state does not fit leaf '{leaf.path}' of shape {leaf.shape}: its "
                f"projector is {found}, expected {wanted}{rank}, None meaning not projected. Was "
                "the state restored from a run with another rank, proj_type, projector_dtype, "
                "exclude or weight_dimension_numbers? Use the same, or start from tx.init(params)"
            )


def check_projected(
    views: Sequence[MatrixView], grads: Sequence[Any], needs: str | None = None
) -> None:
    """Raise where gradients were projected by another optimizer's settings.

    Args:
        views: the projected leaves.
        grads: their gradients, full or projected.
        needs: what needs full gradients, if anything does.
    """
    for view, g in zip(views, grads, strict=True):
        if is_projected(g) and needs is not None:
            raise ValueError(needs_full(needs, view.path))
        if is_projected(g) and (g.view.side, g.view.rank) != (view.side, view.rank):
            raise ValueError(
                f"the gradient of leaf '{view.path}' was projected on side '{g.view.side}' to rank "
                f"{g.view.rank}, but this optimizer projects it on side '{view.side}' to rank "
                f"{view.rank}: give galore_jax.value_and_grad the optimizer that updates"
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
