"""Work on a stack of matrices, shared by the devices of a mesh.

Left to itself XLA lets every device do all of it, each with all matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.meshes import auto_mesh


def each_its_share(mesh: Any, work: Callable[[Any], Any], stack: Any) -> Any:
    """`work(stack)`, each device at its share of the stack.

    The stack goes over to being cut along its first axis, by an exchange in which each device
    keeps a share, whichever way it was cut before.

    Args:
        mesh: with Auto axes.
        work: from trees of arrays with one first axis to such trees, element by element.
        stack: a tree of arrays.

    Returns:
        The results, cut along their first axis.
    """
    count = jax.tree.leaves(stack)[0].shape[0]
    missing = -count % mesh.size
    # One axis after the other, from the last on, which XLA knows how to do; at once it may bring
    # all of it together first.
    names = tuple(mesh.axis_names)[::-1]
    specs = [PartitionSpec(names[: i + 1]) for i in range(len(names))]

    def share(x):
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
        for spec in specs:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x

    def back(x):
        for spec in specs[-2::-1]:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x[:count] if missing else x

    shared = jax.shard_map(work, mesh=mesh, in_specs=specs[-1], out_specs=specs[-1])
    return jax.tree.map(back, shared(jax.tree.map(share, stack)))


def in_shares(work: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array]) -> list[Any]:
    """A function of matrices `batch + (m, n)`, of each stack; on a mesh each device has its share.

    Args:
        work: from such arrays to arrays like them, matrix by matrix.
        stacks: arrays.
    """
    if (mesh := auto_mesh(stacks)) is None:
        return [work(x) for x in stacks]
    together: dict[Any, list[int]] = {}
    for i, x in enumerate(stacks):
        together.setdefault((x.shape[-2:], x.dtype), []).append(i)
    made: list[Any] = list(stacks)
    for members in together.values():
        rows = [stacks[i].reshape(-1, *stacks[i].shape[-2:]) for i in members]
        done = each_its_share(mesh, work, jnp.concatenate(rows))
        ends = np.cumsum([len(x) for x in rows])[:-1]
        for i, x in zip(members, jnp.split(done, ends), strict=True):
            made[i] = x.reshape(stacks[i].shape)
    return made


def one_by_one(which: jax.Array, one: Callable[[Any], Any], stack: Any, old: Any) -> Any:
    """Apply a function to some of a stack, every device to each of them.

    What is not asked for stays where it is: of a stack cut along its first axis an element at a
    number known when it runs would bring all of it along, a sum of it and zeros does not.

    Args:
        which: bool, by element.
        one: a function of trees of arrays.
        stack: a tree of arrays with one first axis.
        old: what the function returns of all of them, in the place of what is not asked for.

    Returns:
        A tree like `old`.
    """
    order = jnp.argsort(~which)  # those that are asked for first

    def turn(i, made):
        at = jnp.arange(which.size) == order[i]

        def pick(x):
            chosen = jnp.where(at.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros([], x.dtype))
            together = jnp.any if x.dtype == bool else functools.partial(jnp.sum, dtype=x.dtype)
            return together(chosen, axis=0)

        def put(x, new):
            return jnp.where(at.reshape(-1, *[1] * (x.ndim - 1)), new[None].astype(x.dtype), x)

        return jax.tree.map(put, made, one(jax.tree.map(pick, stack)))

    return jax.lax.fori_loop(0, jnp.sum(which), turn, old)
