"""What is handed to a transformation of ours, and back: arrays on any mesh, boxed or not.

On a mesh with Explicit axes a sharding is part of an array's type, and every product whose result
could lie in two ways has to say in which. What happens between a gradient and its update concerns
nobody's types: within, axes are Auto, and XLA shards it. Updates come back as the parameters are,
and state as it was. Boxes with names of axes are taken off, and put on the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from galore_jax.matrix.trees import bare
from galore_jax.metadata import named
from galore_jax.precision import compiled_if_narrow
from galore_jax.sharding import state_sharding
from galore_jax.state import Asked


def transformation(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of bare arrays, made fit for what users have."""
    plain = optax.GradientTransformationExtraArgs(
        compiled_if_narrow(init), compiled_if_narrow(update)
    )

    def init_fn(params):
        given, params = params, bare(params)
        if (mesh := explicit_mesh(params)) is None:
            state = plain.init(params)
        else:
            where = state_sharding(plain, params, jax.tree.map(_sharding, params))
            state = as_auto(mesh, plain.init, params, like=where)
        return named(plain, state, given)

    def update_fn(updates, state, params=None, **extra_args):
        given = updates, state, params
        updates, state, params = (bare(x) for x in given)
        everything: Any = updates, state, params, extra_args
        if isinstance(state, Asked) or (mesh := explicit_mesh(everything)) is None:
            out, new = plain.update(updates, state, params, **extra_args)  # type: ignore[arg-type]
        else:
            weights = updates if params is None else params
            like = jax.tree.map(_sharding, (weights, state))

            def within(updates, state, params, extra_args):
                return plain.update(updates, state, params, **extra_args)

            out, new = as_auto(mesh, within, *everything, like=like)
        return _boxed_as(given[0], updates, out), _boxed_as(given[1], state, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _boxed_as(given: Any, plain: Any, new: Any) -> Any:
    """A tree like `plain` in the boxes of the one that it was taken from."""
    treedef = jax.tree.structure(plain)
    if jax.tree.structure(given) == treedef:
        return new
    boxed = jax.tree.structure(given)
    return boxed.unflatten(treedef.flatten_up_to(new))


def _sharding(x: Any) -> NamedSharding:
    return jax.typeof(x).sharding


def explicit_mesh(tree: Any) -> Any:
    """The abstract mesh with Explicit axes on which arrays of a tree lie, if they do."""
    meshes = (_sharding(x).mesh for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def as_auto(mesh: Any, function: Callable[..., Any], *args: Any, like: Any) -> Any:
    """`function(*args)` with all axes of a mesh Auto within.

    Args:
        mesh: an abstract mesh with Explicit axes.
        function: of trees of arrays.
        *args: trees, on that mesh.
        like: how the result is to lie, a tree of shardings.
    """
    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))

    def put(x, mesh, spec):
        put_to = NamedSharding(mesh, spec)
        return jax.sharding.reshard(x, put_to) if isinstance(x, jax.Array) else x

    with jax.sharding.use_abstract_mesh(auto):
        out = function(*jax.tree.map(lambda x: put(x, auto, PartitionSpec()), args))
    leaves, treedef = jax.tree.flatten(out)
    specs = [s.spec for s in jax.tree.leaves(like)]
    return treedef.unflatten([put(x, mesh, s) for x, s in zip(leaves, specs, strict=True)])
