"""An optimizer that updates some parameters at a time, with one state for all.

Absent parameters are `optax.MaskedNode`s, which every transformation of Optax passes over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import dependence
from galore_jax.call import Call, update_with
from galore_jax.int8 import dequantize_weights
from galore_jax.layers.model import Arrays
from galore_jax.matrix.trees import bare, owners, path_string
from galore_jax.projector.schedule import sizes
from galore_jax.rounding import apply_updates
from galore_jax.state import ask


class Parts(NamedTuple):
    """An optimizer that can update some parameters at a time."""

    # (gradients, weights, state, layer, value) -> ((weights, state), shared state), by position;
    # the gradients say which, of the others more may be given. Links that follow the loss get it
    # as `value`.
    step: Callable[..., tuple[tuple[Arrays, Arrays], Arrays]]
    owner: list[int | None]  # of each array in the state, the parameter it belongs to
    paths: list[str]  # of the parameters

    def of(self, weights: Arrays, state: Arrays) -> Arrays:
        """The arrays in the state that belong to these parameters."""
        return {j: state[j] for j, i in enumerate(self.owner) if i in weights}

    def check_rows(self, owned: Arrays, layers: int) -> None:
        """Raise where state of a stacked leaf cannot be cut into its layers."""
        for j, x in owned.items():
            if not x.ndim or x.shape[0] != layers:
                raise ValueError(
                    f"value_and_update: the optimizer keeps an array of shape {x.shape} for leaf "
                    f"'{self.paths[self.owner[j]]}' of {layers} layers, which cannot be cut "  # type: ignore[index]
                    "into them. Keep that leaf out of the optimizer's state (optax.masked), or "
                    "use galore_jax.value_and_grad"
                )

    def unchanged(self, weights: Arrays, state: Arrays) -> list[int]:
        """Positions of the arrays in the state that an update hands back as they are."""
        found = []

        def run(weights, state):
            grads = jax.tree.map(jnp.zeros_like, dequantize_weights(weights))
            _, new = self.step(grads, weights, state, layer=0)[0]
            found.extend(j for j in state if new[j] is state[j])

        jax.eval_shape(run, weights, state)
        return found


def in_parts(tx, params, opt_state, refresh: bool, rounding_key: jax.Array | None) -> Parts:
    """Take an optimizer apart, at this state; refuse one that mixes leaves."""
    plain = bare(params)
    treedef, state_def = jax.tree.structure(plain), jax.tree.structure(opt_state)
    arrays = jax.tree.leaves(opt_state)
    owner = owners(tx.init, bare(opt_state), plain)
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain)]
    matrices = _numbered(tx, params, opt_state)
    absent = optax.MaskedNode()

    def step(grads, weights, state, layer=None, value=None, refresh=refresh):
        def tree(values):
            return treedef.unflatten(
                [values[i] if i in grads else absent for i in range(len(paths))]
            )

        kept = [
            arrays[j] if i is None else state[j] if i in grads else absent
            for j, i in enumerate(owner)
        ]
        call = Call(
            refresh=refresh, layer=jnp.asarray(0 if layer is None else layer), matrices=matrices
        )
        value = jnp.zeros([]) if value is None else value
        given = tree(grads), state_def.unflatten(kept), dequantize_weights(tree(weights))
        updates, new = update_with(tx, call, *given, value=value)
        key = rounding_key
        if key is not None:  # each leaf's own comes from its place among those of this part
            part = min(grads, default=0) if layer is None else len(paths) + layer
            key = jax.random.fold_in(key, part)
        new_params = apply_updates(tree(weights), updates, key)
        flat, new_state = treedef.flatten_up_to(new_params), state_def.flatten_up_to(new)
        mine = {j: new_state[j] for j, i in enumerate(owner) if i in grads}
        shared = {j: new_state[j] for j, i in enumerate(owner) if i is None}
        return ({i: flat[i] for i in grads}, mine), shared

    parts = Parts(step, owner, paths)
    _check_separate(parts, jax.tree.leaves(plain), arrays)
    return parts


def _numbered(tx, params, opt_state) -> tuple[tuple[str, int, int], ...]:
    """For `Call.matrices`: where each projected leaf's matrices stand among an optimizer's."""
    numbers = []
    for answer, *_ in ask(tx, params, opt_state):
        if not answer.called:
            raise ValueError(
                "value_and_update: a wrapper around galore drops Optax's extra arguments, by which "
                "it is told which layer it updates (it projects "
                f"{', '.join(repr(v.path) for v in answer.where.views[:3])}). Make the wrapper an "
                "optax.GradientTransformationExtraArgs that hands **extra_args on"
            )
        starts = np.cumsum([0, *sizes(answer.where.views)]).tolist()
        for view, start in zip(answer.where.views, starts, strict=False):
            numbers.append((view.path, start, starts[-1]))
    return tuple(numbers)


def _check_separate(parts: Parts, weights: list[Any], state: list[Any]) -> None:
    """Raise where an optimizer's treatment of a leaf depends on the gradient of another."""

    def run(grads):
        return parts.step(grads, dict(enumerate(weights)), dict(enumerate(state)), refresh=False)

    like = {i: jnp.zeros_like(w) for i, w in enumerate(weights)}
    (new_weights, new_state), shared = dependence.trace(run, like).depends
    results = [*new_weights.items(), *((parts.owner[j], x) for j, x in new_state.items())]
    results += [(None, x) for x in shared.values()]
    for leaf, used in results:
        if others := sorted(used - {leaf}):
            what = "state that all leaves share" if leaf is None else f"leaf '{parts.paths[leaf]}'"
            raise ValueError(
                f"value_and_update: the optimizer's update of {what} depends on the gradient of "
                f"leaf '{parts.paths[others[0]]}', so leaves cannot be updated one by one. For "
                "clipping by the global norm pass clip_norm= instead of putting "
                "optax.clip_by_global_norm into tx; else use galore_jax.value_and_grad"
            )
