"""Conditionals and loops of the library: also called eagerly, and under `shard_map`."""

from __future__ import annotations

from collections.abc import Callable
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
    if not _manual():
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
    if not _manual():
        return tree
    axes = frozenset().union(*map(_varies, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _varying(x, axes), tree)


def _manual() -> bool:
    """Whether a `shard_map` is being traced."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


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
