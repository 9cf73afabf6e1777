"""A batch in parts: cut, and gradients in the subspace averaged over them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.matrix.trees import path_string
from galore_jax.precision import wide_dtype
from galore_jax.projector.gradient import pack, received, unpack


def is_key(x: Any) -> bool:
    """Whether an argument is a random key (of `jax.random.key`)."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def cut(given: tuple[Any, dict[int, jax.Array]], parts: int) -> Any:
    """Part i of every array: rows i, i + k, i + 2k, ...; of a random key, one folded with i."""
    args, keys = given
    if all(map(is_key, jax.tree.leaves(args))):
        raise ValueError(
            f"microbatches={parts}: there is no batch among the positional arguments to cut; what "
            "goes by keyword is given whole to each part"
        )

    def folded(key):
        fold_in = jax.random.fold_in
        for _ in key.shape:
            fold_in = jax.vmap(fold_in, (0, None))
        return jax.vmap(fold_in, (None, 0))(key, jnp.arange(parts))

    def cut(path, x):
        if is_key(x):
            return folded(x)
        rows, name = jnp.shape(x)[:1], path_string(path)
        if jnp.result_type(x) == jnp.uint32 and jnp.shape(x) == (2,):
            raise ValueError(
                f"microbatches={parts}: argument {name} looks like a random key of the old kind, "
                "whose two numbers are no batch. Make it by jax.random.key, and each part gets a "
                "key of its own, or give it by keyword, and all parts get the same"
            )
        if not rows or rows[0] % parts:
            raise ValueError(
                f"microbatches={parts} does not divide the rows of argument "
                f"{name} of shape {jnp.shape(x)}; what is no batch goes by keyword"
            )
        return jnp.stack([x[i::parts] for i in range(parts)])

    return jax.tree_util.tree_map_with_path(cut, args), jax.tree.map(folded, keys)


def accumulate(part: Any, taps: dict[int, Any], args: Any, has_aux: bool) -> tuple[Any, list[Any]]:
    """Means over microbatches, all projected as the first one was.

    Args:
        part: (projectors, turns, args) -> (value, gradients), of one microbatch.
        taps: the leaves whose gradients arrive in the subspace, by position.
        args: from `cut`.
        has_aux: whether a value is (loss, aux).
    """
    count = jax.tree.leaves(args)[0].shape[0]

    def unpacked(bases, turns, args):
        """Loss and gradients to sum up, auxiliary output, and the projectors in use."""
        value, grads = part({i: p for i, (p, _) in bases.items()}, turns, args)
        loss, aux = value if has_aux else (value, None)
        for i, (p, renewed) in bases.items():
            if grads[i].basis is not None:
                p, now = unpack(taps[i].rule.view, received(grads[i]).basis, p)
                bases = bases | {i: (p, renewed | now)}
                grads[i] = dataclasses.replace(grads[i], basis=None)
        return (loss, grads), aux, bases

    def add(carry, x):
        total, bases = carry
        first, args = x
        turns = {
            i: None if tap.turn is None else tap.turn._replace(due=tap.turn.due & first)
            for i, tap in taps.items()
        }
        new, aux, bases = unpacked(bases, turns, args)
        total = jax.tree.map(lambda t, x: t + x.astype(t.dtype) / count, total, new)
        return (total, bases), aux

    start = {i: (tap.projector, jnp.zeros(tap.rule.view.batch, bool)) for i, tap in taps.items()}
    turns = {i: tap.turn for i, tap in taps.items()}
    shapes = jax.eval_shape(unpacked, start, turns, jax.tree.map(lambda x: x[0], args))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x)), shapes)
    (total, bases), aux = jax.lax.scan(add, (zeros, start), (jnp.arange(count) == 0, args))
    loss, grads = total
    for i, (p, renewed) in bases.items():
        if taps[i].turn is not None:
            grads[i] = dataclasses.replace(grads[i], basis=pack(taps[i].rule.view, p, renewed))
    return (loss, aux) if has_aux else loss, grads
