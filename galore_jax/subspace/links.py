"""Whether the links around a galore treat gradients in the subspace rightly.

A gradient in the subspace may be scaled, by its norm too; so may an update that is not multiplied
out. What a link does beside that, element by element or with parameters, it would do to factors.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.trees import path_string, shapes
from galore_jax.multiples import Group, multiples, raised_in
from galore_jax.projector.gradient import ProjectedGradient
from galore_jax.projector.update import FactoredUpdate, factored
from galore_jax.state import around, is_state


def check_links(
    tx: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    like: dict[str, tuple[ProjectedGradient, Any]],
) -> None:
    """Raise where a link in front of a galore, or behind it, does more than scaling.

    Args:
        tx: the optimizer.
        params: the parameters, a tree of arrays.
        opt_state: its state.
        like: by path of a leaf whose gradient arrives in the subspace, shapes of that gradient
            and of the projector.

    Raises:
        ValueError: it names the link.
    """
    if is_state(opt_state) or not like:
        return  # nothing is around it
    treedef = jax.tree.structure(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    place = {path_string(path): i for i, (path, _) in enumerate(leaves)}
    weights, state = shapes((jax.tree.leaves(params), opt_state))
    gradients = {path: gradient for path, (gradient, _) in like.items()}
    updates = {path: _update(*like[path], weights[place[path]]) for path in like}

    def run(gradients, updates, leaves, state):
        given = [gradients.get(path, leaves[i]) for path, i in place.items()]
        params = treedef.unflatten(leaves)
        out, rest, arrived = around(tx, treedef.unflatten(given), state, params, updates)
        flat = treedef.flatten_up_to(out)
        others = [flat[i] for path, i in place.items() if path not in like]
        return {p: arrived[p] for p in like}, {p: flat[place[p]] for p in like}, (others, rest)

    args = gradients, updates, weights, state
    inputs = _numbered(args)
    groups = {path: _group(inputs[0][path], ("low_rank", "rest")) for path in like}
    lifted = {path: _group(inputs[1][path], ("norm",)) for path in like}
    try:
        closed, results = jax.make_jaxpr(run, return_shape=True)(*args)
    except Exception as error:  # whatever a link raises for what it does not expect
        if (name := raised_in(error)) is None:
            raise
        raise ValueError(_message(name, next(iter(like)))) from error
    found = multiples(closed, [*groups.values(), *lifted.values()])
    arrived, out, others = _numbered(results)
    for path in like:
        for node, group in ((arrived[path], groups[path]), (out[path], lifted[path])):
            if (name := found.scaled(jax.tree.leaves(node), group)) is not None:
                raise ValueError(_message(name, path))
    if (name := found.spoilt(jax.tree.leaves(others))) is not None:
        raise ValueError(_message(name, next(iter(like))))


def _numbered(tree: Any) -> Any:
    """The positions of its arrays in the place of a tree's arrays."""
    return jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))


def _update(gradient: ProjectedGradient, projector: Any, w: Any) -> FactoredUpdate:
    """Shapes of the update of a leaf whose gradient arrives in the subspace."""
    view = gradient.view

    def make(p, low_rank, w):
        return factored(view, p, low_rank, jnp.zeros(view.batch, view.dtype), w)

    return jax.eval_shape(make, projector, gradient.low_rank, w)


def _group(node: Any, heavy: tuple[str, ...]) -> Group:
    return Group(tuple(jax.tree.leaves(node)), frozenset(getattr(node, name) for name in heavy))


def _message(name: str, path: str) -> str:
    return (
        f"galore_jax.value_and_grad: '{name}' around galore does more than scale the gradient of "
        f"'{path}', which arrives in the subspace, or its update, which is not multiplied out: it "
        "would treat their factors. Put it inside, behind the galore(rank=...) of an "
        "optax.chain, or use jax.value_and_grad, or galore_jax.value_and_update"
    )
