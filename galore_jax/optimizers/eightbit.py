r"""Optimizers whose moments are 8-bit codes with a float32 scale for up to 256 of them.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
https://arxiv.org/abs/2110.02861, as in bitsandbytes' AdamW8bit and Lion8bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import quantize
from galore_jax.boundary import transformation
from galore_jax.compiler import in_one_piece
from galore_jax.control import alike
from galore_jax.matrix.layouts import stacked_vectors
from galore_jax.matrix.trees import path_string
from galore_jax.meshes import auto_mesh, uncut
from galore_jax.precision import debias
from galore_jax.quantize import DYNAMIC, DYNAMIC_UNSIGNED, Format

# Smaller leaves keep float32 moments, and norms and biases of however many layers: there is
# little to save, and they matter.
MIN_SIZE = 4096

# A stack is processed slice by slice from this many numbers a slice on; smaller slices are
# taken together, as a loop's turn would cost more than its work.
_LOOP_SIZE = 2**14

# Gradients from here on have no finite square.
_LARGEST = math.sqrt(np.finfo(np.float32).max)


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam8bit`: trees like the parameters."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    mu: optax.Updates  # uint8 codes; float32 moments for small leaves
    nu: optax.Updates
    mu_scale: optax.Updates  # float32, see `quantize.Encoded`; MaskedNode for small leaves
    nu_scale: optax.Updates


class ScaleByLion8bitState(NamedTuple):
    """State of `scale_by_lion8bit`: trees like the parameters."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    mu: optax.Updates  # uint8 codes; float32 momentum for small leaves
    mu_scale: optax.Updates  # float32, see `quantize.Encoded`; MaskedNode for small leaves


def scale_by_adam8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates as Adam does, with moments in 8 bits.

    .. math::
        m &= b_1 D(m_8) + (1 - b_1) g, \quad v = b_2 D(v_8) + (1 - b_2) g^2 \\
        u &= \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t) + \bar\epsilon} + \epsilon}, \quad
        m_8 = E(m), \quad v_8 = E(v)

    where E and D are `quantize.encode` and `decode` with bitsandbytes' dynamic maps, signed
    for m and unsigned for v, and blocks of up to 256 numbers. All arithmetic is float32, whatever
    the dtype of gradients and parameters; updates come back in the parameters' dtype (the
    gradients' where `update` gets no params).

    A leaf of fewer than 4096 numbers keeps float32 moments, as do vectors of stacked layers, which
    what is beside them tells (see `galore_jax.matrix_axes`). In a larger one blocks run along the
    longer of the last two axes, which in the subspace of a gradient is not the one of the rank:
    each block then belongs to one direction, however far the spectrum falls. No v above zero is
    stored as zero, so that no step is m over :math:`\epsilon`. For stacked weights (layers, m, n)
    slice i of codes and scales belongs to layer i, and a compiled update works slice by slice, so
    that moments never exist in full in float32.

    An element whose gradient or squared gradient is not finite resets its moments to zero and
    gets a zero update, as in bitsandbytes; `optax.apply_if_finite` skips such a step whole.

    Args:
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        eps_root: added under the root.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `ScaleByAdam8bitState`.

    Raises:
        TypeError: at `init`, for a leaf that is not of a real floating dtype; at `update`, for a
            state of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from galore_jax import scale_by_adam8bit
        >>> state = scale_by_adam8bit().init({"kernel": jnp.ones((64, 512)), "bias": jnp.ones(512)})
        >>> state.mu["kernel"].dtype, state.mu["bias"].dtype
        (dtype('uint8'), dtype('float32'))
        >>> state.mu_scale
        {'bias': MaskedNode(), 'kernel': Array([[0., 0.],...

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2021
    """

    def init_fn(params):
        return ScaleByAdam8bitState(
            jnp.zeros([], jnp.int32), *_init("adam", params, (DYNAMIC, DYNAMIC_UNSIGNED))
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _check_state("adam", state, ScaleByAdam8bitState)
        count = optax.safe_increment(jnp.asarray(state.count))
        rates = b1, 1 - b1, b2, 1 - b2, eps, eps_root, debias(b1, count), debias(b2, count)
        updates, moments, scales = _update(
            _adam,
            rates,
            (DYNAMIC, DYNAMIC_UNSIGNED),
            updates,
            (state.mu, state.nu),
            (state.mu_scale, state.nu_scale),
            params,
            count,
        )
        return updates, ScaleByAdam8bitState(count, *moments, *scales)

    return transformation(init_fn, update_fn)


def scale_by_lion8bit(
    b1: jax.typing.ArrayLike = 0.9, b2: jax.typing.ArrayLike = 0.99
) -> optax.GradientTransformationExtraArgs:
    r"""Take the sign of Lion's momentum, which is kept in 8 bits.

    .. math::
        u = \mathrm{sign}(b_1 D(m_8) + (1 - b_1) g), \quad m_8 = E(b_2 D(m_8) + (1 - b_2) g)

    Layout of the state, small leaves, dtypes and non-finite gradients as in
    `scale_by_adam8bit`.

    Args:
        b1: how the momentum and the gradient are mixed into the step.
        b2: decay rate of the momentum.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `ScaleByLion8bitState`.

    Raises:
        TypeError: as `scale_by_adam8bit`.

    Example:
        >>> import jax.numpy as jnp
        >>> from galore_jax import scale_by_lion8bit
        >>> tx = scale_by_lion8bit()
        >>> params = jnp.ones((64, 512))
        >>> updates, state = tx.update(-2 * params, tx.init(params))
        >>> float(updates[0, 0]), state.mu.dtype
        (-1.0, dtype('uint8'))

    References:
        Chen et al., `Lion <https://arxiv.org/abs/2302.06675>`_, 2023
    """

    def init_fn(params):
        return ScaleByLion8bitState(jnp.zeros([], jnp.int32), *_init("lion", params, (DYNAMIC,)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _check_state("lion", state, ScaleByLion8bitState)

        count = optax.safe_increment(jnp.asarray(state.count))
        rates = b1, 1 - b1, b2, 1 - b2
        updates, moments, scales = _update(
            _lion, rates, (DYNAMIC,), updates, (state.mu,), (state.mu_scale,), params, count
        )
        return updates, ScaleByLion8bitState(count, *moments, *scales)

    return transformation(init_fn, update_fn)


# What both share: a step `(rates, g, *moments) -> (update, *moments)`; moments are a tuple of
# trees, one for each format.


def _adam(rates, g, m, v):
    b1, rest1, b2, rest2, eps, eps_root, m_correction, v_correction = rates
    m = b1 * m + rest1 * g
    v = b2 * v + rest2 * jnp.square(g)
    return (m / m_correction) / (jnp.sqrt(v / v_correction + eps_root) + eps), m, v


def _lion(rates, g, m):
    b1, rest1, b2, rest2 = rates
    return jnp.sign(b1 * m + rest1 * g), b2 * m + rest2 * g


def _check_state(name: str, state: Any, wanted: type) -> None:
    if not isinstance(state, wanted):
        raise TypeError(
            f"scale_by_{name}8bit's state must be a {wanted.__name__}, got {type(state).__name__}. "
            "A checkpoint has to be restored with a target: jax.eval_shape(tx.init, params), on a "
            "mesh with the shardings of galore_jax.state_sharding"
        )


def _init(name: str, params: optax.Params, formats: Sequence[Format]) -> list[optax.Updates]:
    """Trees of the moments and then of their scales, for zeros."""

    def leaf(path, x, vector):
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"scale_by_{name}8bit: leaf '{path_string(path)}' is {dtype}; moments in 8 bits "
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


def _update(
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
    if not loops:
        return whole(g, moments, scales)

    # In place, the update over the gradient: the carry needs no second buffer where its first
    # is donated or at the end of its life.
    def turn(i, carry):
        at = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), carry)
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), i, 0),
            carry,
            whole(*at),
        )

    start = g.astype(jnp.promote_types(g.dtype, dtype)), moments, scales
    turns = math.prod(g.shape[:loops])
    carry = jax.tree.map(lambda x: x.reshape(turns, *x.shape[loops:]), start)
    carry = jax.lax.fori_loop(0, turns, turn, alike(carry))
    return jax.tree.map(lambda x, old: x.reshape(old.shape), carry, start)
