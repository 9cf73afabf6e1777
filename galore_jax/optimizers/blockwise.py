"""Elementwise steps with moments in 8 bits, in blocks with a float32 scale each.

What `galore_jax.optimizers.eightbit` is made of. A step is `(rates, g, *moments) -> (update,
*moments)`, in float32; moments are a tuple of trees, one for each format.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import quantize
from galore_jax.compiler import in_one_piece
from galore_jax.control import alike
from galore_jax.matrix.layouts import stacked_vectors
from galore_jax.matrix.trees import path_string
from galore_jax.meshes import auto_mesh, uncut
from galore_jax.quantize import Format

# Smaller leaves keep float32 moments, and norms and biases of however many layers: there is
# little to save, and they matter.
MIN_SIZE = 4096

# A stack is processed slice by slice from this many numbers a slice on; smaller slices are
# taken together, as a loop's turn would cost more than its work.
_LOOP_SIZE = 2**14

# A matrix of more numbers is processed part by part.
_AT_ONCE = 2**24

# Gradients from here on have no finite square.
_LARGEST = math.sqrt(np.finfo(np.float32).max)


def check_state(name: str, state: Any, wanted: type) -> None:
    """Refuse what a checkpoint gives that was restored without a target."""
    if not isinstance(state, wanted):
        raise TypeError(
            f"{name}'s state must be a {wanted.__name__}, got {type(state).__name__}. "
            "A checkpoint has to be restored with a target: jax.eval_shape(tx.init, params), on a "
            "mesh with the shardings of galore_jax.state_sharding"
        )


def init_moments(name: str, params: optax.Params, formats: Sequence[Format]) -> list[optax.Updates]:
    """Trees of the moments and then of their scales, for zeros."""

    def leaf(path, x, vector):
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}: leaf '{path_string(path)}' is {dtype}; moments in 8 bits "
                "need real floating numbers. Keep it out with optax.masked or optax.partition"
            )
        if math.prod(shape) < MIN_SIZE or vector:
            return [(jnp.zeros(shape, jnp.float32), optax.MaskedNode()) for _ in formats]
        return [quantize.zeros(shape, fmt) for fmt in formats]

    treedef = jax.tree.structure(params)
    paths, vectors = jax.tree_util.tree_leaves_with_path(params), stacked_vectors(params)
    leaves = [leaf(*x, vector) for x, vector in zip(paths, vectors, strict=True)]
    return [
        treedef.unflatten([made[i][part] for made in leaves])
        for part in (0, 1)
        for i in range(len(formats))
    ]


def update_moments(
    step: Callable, rates, formats: tuple[Format, ...], updates, moments, scales, params, count
):
    """Apply a step to every leaf.

    Returns:
        Trees of the updates, and of each moment and its scales.
    """
    treedef = jax.tree.structure(updates)
    grads = treedef.flatten_up_to(updates)
    like = grads if params is None else treedef.flatten_up_to(params)
    moments, scales = ([treedef.flatten_up_to(t) for t in trees] for trees in (moments, scales))

    outs, new_moments, new_scales = [], [], []
    leaves = zip(grads, like, zip(*moments, strict=True), zip(*scales, strict=True), strict=True)
    for g, x, m, s in leaves:
        if isinstance(s[0], optax.MaskedNode):
            out, *m = _guarded(step, rates, g, *m)
        else:
            out, m, s = _quantised(step, rates, formats, g, m, s, jnp.result_type(x), count)
        outs.append(out.astype(jnp.result_type(x)))
        new_moments.append(m)
        new_scales.append(s)

    def trees(leaves):
        return [treedef.unflatten([leaf[i] for leaf in leaves]) for i in range(len(formats))]

    return treedef.unflatten(outs), trees(new_moments), trees(new_scales)


def _guarded(step: Callable, rates, g, *moments):
    """Take a step with zeros in the place of what is not finite, or has no finite square."""
    g = g.astype(jnp.float32)
    good = jnp.abs(g) < _LARGEST
    return step(rates, *(jnp.where(good, x, 0) for x in (g, *moments)))


# Compiled once where steps are not.
@functools.partial(jax.jit, static_argnames=("step", "formats", "dtype"))
def _quantised(step: Callable, rates, formats, g, moments, scales, dtype, count):
    """Take a step with one quantised leaf, a stack slice by slice."""

    def decoded_step(g, codes, scales):
        old = [quantize.decode(*args, g.shape) for args in zip(codes, scales, formats, strict=True)]
        out, *new = _guarded(step, rates, g, *old)
        return out.astype(dtype), new

    def whole(g, codes, scales):
        out, new = in_one_piece(decoded_step, count, g, codes, scales)
        new = [quantize.encode_finite(x, f) for x, f in zip(new, formats, strict=True)]
        return out, [x.codes for x in new], [x.scales for x in new]

    moments, scales = list(moments), list(scales)
    stacks = range(1, g.ndim - 1)
    loops = max([k for k in stacks if math.prod(g.shape[k:]) >= _LOOP_SIZE], default=0)
    # On a mesh a loop over an axis that is cut would bring along all of it.
    if (mesh := auto_mesh(g)) is not None:
        axis, blocks, _ = quantize.layout(g.shape)
        if all(blocks % parts == 0 for parts in mesh.shape.values()):
            return whole(g, moments, scales)
        # Moments lie so that no device has a part of a block, and so must what meets them: left
        # to itself XLA gathers all of them where a weight's parts are parts of blocks.
        out, *new = whole(uncut(mesh, g, axis), moments, scales)
        return uncut(mesh, out, axis), *new
    if loops:
        turns = math.prod(g.shape[:loops])
        arrays = jax.tree.map(lambda x: x.reshape(turns, *x.shape[loops:]), (g, moments, scales))
        new = _in_turns(turns, 0, functools.partial(_in_parts, whole, dtype), arrays, dtype)
        return jax.tree.map(lambda x, old: x.reshape(old.shape), new, (g, moments, scales))
    return _in_parts(whole, dtype, g, moments, scales)


def _in_parts(whole: Callable, dtype: Any, g, moments, scales):
    """Take the step with a large matrix part by part, each with whole blocks."""
    if g.ndim < 2 or g.size <= _AT_ONCE:
        return whole(g, moments, scales)
    across = -3 - quantize.layout(g.shape).axis  # the other one of the last two axes
    size = g.shape[across]
    fit = size * _AT_ONCE // g.size  # so many rows or columns
    parts = next((k for k in range(1, size + 1) if size % k == 0 and size <= k * max(fit, 1)), size)
    return _in_turns(parts, across, whole, (g, moments, scales), dtype)


def _in_turns(turns: int, axis: int, work: Callable, arrays, dtype: Any):
    """Work on equal parts of arrays along an axis, one after the other.

    In place, the update over the gradient: the carry needs no second buffer where its first is
    donated or at the end of its life.
    """
    g, *others = arrays

    def turn(i, carry):
        def part(x):
            size = x.shape[axis] // turns
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        def put(x, new):
            start = i * new.shape[axis]
            return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), start, axis)

        return jax.tree.map(put, carry, work(*jax.tree.map(part, carry)))

    start = (g.astype(jnp.promote_types(g.dtype, dtype)), *others)
    return jax.lax.fori_loop(0, turns, turn, alike(start))
