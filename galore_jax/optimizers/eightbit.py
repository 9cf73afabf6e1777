r"""Optimizers whose moments are 8-bit codes with a float32 scale for up to 256 of them.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
https://arxiv.org/abs/2110.02861, as in bitsandbytes' AdamW8bit and Lion8bit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.boundary import transformation
from galore_jax.optimizers.blockwise import check_state, init_moments, update_moments
from galore_jax.precision import debias, mark_wide
from galore_jax.quantize import DYNAMIC, DYNAMIC_UNSIGNED


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


class Trace8bitState(NamedTuple):
    """State of `trace8bit`: trees like the parameters."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    trace: optax.Updates  # uint8 codes; float32 momentum for small leaves
    trace_scale: optax.Updates  # float32, see `quantize.Encoded`; MaskedNode for small leaves


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
            jnp.zeros([], jnp.int32),
            *init_moments("scale_by_adam8bit", params, (DYNAMIC, DYNAMIC_UNSIGNED)),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state("scale_by_adam8bit", state, ScaleByAdam8bitState)
        count = optax.safe_increment(jnp.asarray(state.count))
        rates = b1, 1 - b1, b2, 1 - b2, eps, eps_root, debias(b1, count), debias(b2, count)
        updates, moments, scales = update_moments(
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

    return mark_wide(transformation(init_fn, update_fn))


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
        return ScaleByLion8bitState(
            jnp.zeros([], jnp.int32), *init_moments("scale_by_lion8bit", params, (DYNAMIC,))
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state("scale_by_lion8bit", state, ScaleByLion8bitState)

        count = optax.safe_increment(jnp.asarray(state.count))
        rates = b1, 1 - b1, b2, 1 - b2
        updates, moments, scales = update_moments(
            _lion, rates, (DYNAMIC,), updates, (state.mu,), (state.mu_scale,), params, count
        )
        return updates, ScaleByLion8bitState(count, *moments, *scales)

    return mark_wide(transformation(init_fn, update_fn))


def trace8bit(
    decay: jax.typing.ArrayLike, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum in 8 bits: `optax.trace` with its trace in codes.

    .. math::
        m = g + \mu D(m_8), \quad u = m \;\text{ or, with Nesterov's, }\; g + \mu m, \quad
        m_8 = E(m)

    Layout of the state, small leaves, dtypes and non-finite gradients as in `scale_by_adam8bit`.

    Args:
        decay: mu.
        nesterov: use Nesterov momentum.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `Trace8bitState`.

    Raises:
        TypeError: as `scale_by_adam8bit`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from galore_jax import trace8bit
        >>> tx = optax.chain(trace8bit(0.9), optax.scale_by_learning_rate(0.1))
        >>> params = jnp.ones((64, 512))
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.ones_like(params), state, params)
        >>> round(float(updates[0, 0]), 4), state[0].trace.dtype
        (-0.19, dtype('uint8'))

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    step = _nesterov if nesterov else _trace

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        return Trace8bitState(count, *init_moments("trace8bit", params, (DYNAMIC,)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state("trace8bit", state, Trace8bitState)
        count = optax.safe_increment(jnp.asarray(state.count))
        moments, scales = (state.trace,), (state.trace_scale,)
        updates, moments, scales = update_moments(
            step, (decay,), (DYNAMIC,), updates, moments, scales, params, count
        )
        return updates, Trace8bitState(count, *moments, *scales)

    return mark_wide(transformation(init_fn, update_fn))


def _adam(rates, g, m, v):
    b1, rest1, b2, rest2, eps, eps_root, m_correction, v_correction = rates
    m = b1 * m + rest1 * g
    v = b2 * v + rest2 * jnp.square(g)
    return (m / m_correction) / (jnp.sqrt(v / v_correction + eps_root) + eps), m, v


def _lion(rates, g, m):
    b1, rest1, b2, rest2 = rates
    return jnp.sign(b1 * m + rest1 * g), b2 * m + rest2 * g


def _trace(rates, g, m):
    (decay,) = rates
    m = g + decay * m
    return m, m


def _nesterov(rates, g, m):
    (decay,) = rates
    m = g + decay * m
    return g + decay * m, m
