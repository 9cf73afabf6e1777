"""Conditionals, loops and means of the library: also called eagerly, and under `shard_map`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core


def cond(which: jax.Array | bool, true: Callable[[], Any], false: Callable[[], Any]) -> Any:
    """`jax.lax.cond` of two functions of nothing.

    Where the answer is known already, as in a loop that is not compiled, one of them is called:
    JAX would compile both anew at every step, since they are new functions. Under `shard_map`
    results of both vary over the same devices.
    """
    if not isinstance(which, jax.core.Tracer):
        return true() if which else false()
    if not manual_axes():
        return jax.lax.cond(which, true, false)
    types = jax.eval_shape(true), jax.eval_shape(false)
    axes = jax.tree.map(lambda *x: frozenset().union(*map(_varies, x)), *types)

    def alike(branch):
        return lambda: jax.tree.map(_varying, branch(), axes)

    return jax.lax.cond(which, alike(true), alike(false))


def alike(tree: Any) -> Any:
    """The same arrays, each varying over all devices that any of them varies over.

    What a loop carries: it becomes so in the first turn.
    """
    if not manual_axes():
        return tree
    axes = frozenset().union(*map(_varies, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _varying(x, axes), tree)


def manual_axes() -> tuple[Any, ...]:
    """The mesh axes of the `shard_map` that is being traced."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def names_of(axis_name: str | Iterable[str] | None, asked_by: str, needed: bool) -> tuple[str, ...]:
    """The mapped axes to average over.

    Args:
        axis_name: as a caller gave it.
        asked_by: the function that it was given to.
        needed: whether devices would go ways of their own without it.

    Raises:
        ValueError: under a `shard_map`, where it is needed and not given.
    """
    if axis_name is None:
        if needed and (axes := manual_axes()):
            name = repr(axes[0]) if len(axes) == 1 else repr(axes)
            raise ValueError(
                f"{asked_by}: under a shard_map over {axes} each device would go by its own part "
                f"of the batch. Pass axis_name={name}, and gradients are averaged over it; or "
                "axis_name=(), where each device trains a model of its own"
            )
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def mean_over(tree: Any, names: tuple[str, ...]) -> Any:
    """The means over mapped axes of all arrays."""
    return jax.lax.pmean(tree, names) if names else tree


def each_its_own(tree: Any, names: tuple[str, ...]) -> Any:
    """The same arrays, as varying over these axes: JAX would sum gradients of what does not."""
    return jax.tree.map(lambda x: _varying(x, frozenset(names)), tree) if names else tree


def _varies(x: Any) -> frozenset[str]:
    found = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if hasattr(found, "manual_axis_type"):
        return getattr(found.manual_axis_type, "varying", frozenset())
    return getattr(found, "vma", None) or frozenset()  # of older JAX


def _varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _varies(x)))
    if not missing:
        return x
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return lax.pvary(x, missing)  # of older JAX
