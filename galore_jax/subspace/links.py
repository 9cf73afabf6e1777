"""Whether the links around a galore treat gradients in the subspace rightly.

A gradient in the subspace may be scaled, by its norm too; so may an update that is not multiplied
out. What a link does beside that, element by element or with parameters, it would do to factors.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.trees import path_string
from galore_jax.matrix.view import MatrixView
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
    if is_state(opt_state):
        return  # nothing is around it
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    shapes, state = jax.tree.map(_shape, (jax.tree.leaves(params), opt_state))
    treedef = jax.tree.structure(params)
    gradients = {path: gradient for path, (gradient, _) in like.items()}
    updates = {
        path: jax.eval_shape(lambda p, r, w, v=g.view: _factored(v, p, r, w), p, g.low_rank, w)
        for (path, (g, p)), w in zip(
            like.items(), (shapes[paths.index(path)] for path in like), strict=True
        )
    }

    def run(gradients, updates, leaves, state):
        grads = treedef.unflatten([gradients.get(p, x) for p, x in zip(paths, leaves, strict=True)])
        out, rest, arrived = around(tx, grads, state, treedef.unflatten(leaves), updates)
        flat = treedef.flatten_up_to(out)
        out = {path: flat[paths.index(path)] for path in like}
        others = [x for path, x in zip(paths, flat, strict=True) if path not in like]
        return {path: arrived[path] for path in like}, out, (others, rest)

    args = gradients, updates, shapes, state
    number = iter(range(len(jax.tree.leaves(args))))
    numbered = jax.tree.map(lambda _: next(number), args)
    groups = [_group(numbered[0][path], ("low_rank", "rest")) for path in like]
    groups += [_group(numbered[1][path], ("norm",)) for path in like]
    try:
        structure: list[Any] = []

        def flat(*args):
            results = run(*args)
            structure.append(jax.tree.structure(results))
            return jax.tree.leaves(results)

        found = multiples(jax.make_jaxpr(flat)(*args), groups)
    except Exception as error:  # whatever a link raises for what it does not expect
        name = raised_in(error)
        if name is None:
            raise
        raise ValueError(_message(name, next(iter(like)))) from error
    number = iter(range(len(found.results)))
    arrived, out, others = jax.tree.unflatten(structure[0], range(len(found.results)))
    for nodes, of in ((arrived, groups[: len(like)]), (out, groups[len(like) :])):
        for path, group in zip(like, of, strict=True):
            name = found.scaled(jax.tree.leaves(nodes[path]), group)
            if name is not None:
                raise ValueError(_message(name, path))
    if (name := found.spoilt(jax.tree.leaves(others))) is not None:
        raise ValueError(_message(name, next(iter(like))))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _factored(view: MatrixView, p: Any, low_rank: Any, w: Any) -> FactoredUpdate:
    return factored(view, p, low_rank, jnp.zeros(view.batch, view.dtype), w)


def _group(node: Any, heavy: tuple[str, ...]) -> Group:
    return Group(tuple(jax.tree.leaves(node)), frozenset(getattr(node, name) for name in heavy))


def _message(name: str, path: str) -> str:
    return (
        f"galore_jax.value_and_grad: '{name}' around galore does more than scale the gradient of "
        f"'{path}', which arrives in the subspace, or its update, which is not multiplied out: it "
        "would treat their factors. Put it inside, behind the galore(rank=...) of an "
        "optax.chain, or use jax.value_and_grad, or galore_jax.value_and_update"
    )
