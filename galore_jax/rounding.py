"""Applying updates to weights of few bits with stochastic rounding.

A bfloat16 weight has 8 significant bits: an update below 1/512 of it is lost when the sum is
rounded to nearest, and training stalls; one in 8-bit codes loses far more. Rounded up or down at
random, so that the mean is right, small updates add up.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.int8 import Int8Weight, is_int8
from galore_jax.precision import wide
from galore_jax.projector.update import FactoredUpdate
from galore_jax.warn import warn


def apply_updates(
    params: optax.Params, updates: optax.Updates, key: jax.Array | None = None
) -> optax.Params:
    r"""Apply updates as `optax.apply_updates` does, optionally with stochastic rounding.

    With a key, the sum x of a bfloat16 parameter and its update is taken in float32 and rounded
    to one of its two neighbours :math:`a \le x \le b` in bfloat16,

    .. math::
        P(b) = (x - a) / (b - a),

    so that the mean of the rounded sum is the sum. Sums that bfloat16 holds exactly, infinite
    ones and NaN come out as they are. So are sums of weights in codes
    (`galore_jax.quantize_weights`) to one of the two nearest levels, without a key to the nearest.
    Parameters of other dtypes, and those of bfloat16 without a key, are treated as by
    `optax.apply_updates`. Of an Equinox module the whole may be given, in the place
    of `eqx.apply_updates`, which takes no updates that are not multiplied out.

    Args:
        params: tree of parameters.
        updates: tree of updates of the same structure; None leaves what stands there as it is.
            Those that follow from `galore_jax.value_and_grad` are added layer by layer, in place.
        key: a JAX random key, a new one for each step. Every leaf draws from its own key,
            `jax.random.fold_in(key, i)` with i its position in the flattened tree, so that results
            depend on neither the sharding (with the default `jax_threefry_partitionable`) nor the
            dtypes of other leaves.

    Returns:
        Updated parameters, with the structure, shapes and dtypes of `params`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from galore_jax.rounding import apply_updates
        >>> w = jnp.ones(10_000, jnp.bfloat16)
        >>> float(apply_updates(w, jnp.float32(0.001)).mean(dtype=jnp.float32))
        1.0
        >>> w = apply_updates(w, jnp.float32(0.001), jax.random.key(0))
        >>> round(float(w.mean(dtype=jnp.float32)), 4)
        1.001

    References:
        Zamirai et al., `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020
    """
    if key is None and any(map(is_int8, jax.tree.leaves(params, is_leaf=is_int8))):
        warn(
            "weights in 8-bit codes are rounded to the nearest level, which loses most small "
            "updates. Give a key, a new one for each step: galore_jax.apply_updates(params, "
            "updates, key), or rounding_key= to the step that galore_jax.value_and_update makes"
        )
    position = iter(range(jax.tree.structure(params, is_leaf=is_int8).num_leaves))

    def apply(p, u):
        if p is None:
            return None
        number = next(position)
        if u is None:
            return p
        leaf_key = None if key is None else jax.random.fold_in(key, number)
        if is_int8(p):
            if isinstance(u, FactoredUpdate):
                return u.add_to(p, _round_codes, leaf_key)
            return p.plus(u, leaf_key)
        if leaf_key is None or jnp.result_type(p) != jnp.bfloat16:
            return optax.apply_updates(p, u)
        if isinstance(u, FactoredUpdate):
            return u.add_to(p, _round_matrix, leaf_key)
        total = wide(p) + jnp.asarray(u).astype(jnp.float32)
        return _round(total, leaf_key)

    return jax.tree.map(apply, params, updates, is_leaf=lambda x: x is None or is_int8(x))


def _round_matrix(x: jax.Array, old: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
    return _round(x, jax.random.fold_in(key, index))


def _round_codes(x: jax.Array, old: Int8Weight, index: jax.Array, key: Any) -> Int8Weight:
    return old.put(x, None if key is None else jax.random.fold_in(key, index))


def _round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 at random, without bias.

    A bfloat16 is the upper half of a float32: a random number added in the lower half carries
    into the upper one with the right probability, whatever the sign and the exponent.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    # A carry must not turn a NaN into a number.
    return jnp.where(jnp.isnan(x), jnp.nan, rounded)
