"""The mesh that arrays lie on, as far as their types say: with Auto axes, or Explicit ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def auto_mesh(arrays: Any) -> Any:
    """The mesh of several devices that work is to be shared over, None where there is none.

    That of `jax.set_mesh`, or else of the arrays. Its axes are Auto: XLA places what is computed.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or mesh.size == 1 or set(mesh.auto_axes) != set(mesh.axis_names):
        return None
    return mesh


def uncut(mesh: Any, x: jax.Array, axis: int) -> jax.Array:
    """An array on an Auto mesh, with one of its axes whole on each device.

    How the others lie is left to XLA, and what asks for the result does not reach past it: an
    exchange of the array is the most that this costs.
    """
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def sharding_of(x: jax.Array) -> NamedSharding:
    """How an array lies, as far as its type says."""
    return jax.typeof(x).sharding


def explicit_mesh(tree: Any) -> Any:
    """The mesh with Explicit axes on which arrays of a tree lie, if they do."""
    meshes = (sharding_of(x).mesh for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def as_auto(mesh: Any, function: Callable[..., Any], *args: Any, like: Callable[[Any], Any]) -> Any:
    """`function(*args)` with all axes of a mesh Auto within.

    Args:
        mesh: from `explicit_mesh`.
        function: of trees of arrays.
        *args: trees, on that mesh.
        like: from the result to how it is to lie, a tree of shardings.
    """
    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))

    def put(x, mesh, spec):
        put_to = NamedSharding(mesh, spec)
        return jax.sharding.reshard(x, put_to) if isinstance(x, jax.Array) else x

    with jax.sharding.use_abstract_mesh(auto):
        out = function(*jax.tree.map(lambda x: put(x, auto, PartitionSpec()), args))
    leaves, treedef = jax.tree.flatten(out)
    specs = [s.spec for s in jax.tree.leaves(like(out))]
    return treedef.unflatten([put(x, mesh, s) for x, s in zip(leaves, specs, strict=True)])


def everywhere(mesh: Any) -> Callable[[Any], Any]:
    """For `as_auto`: a result that is replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return lambda result: jax.tree.map(lambda _: replicated, result)
