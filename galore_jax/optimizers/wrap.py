"""What makes an optimizer of a transformation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.boundary import transformation
from galore_jax.precision import computes_wide, mark_wide, wide


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation with arithmetic and state in float32 at least, as in `galore`."""
    tx = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        given = updates if params is None else params
        params = None if params is None else jax.tree.map(wide, params)
        out, state = tx.update(jax.tree.map(wide, updates), state, params, **extra_args)
        return jax.tree.map(lambda u, x: u.astype(jnp.result_type(x)), out, given), state

    def init_fn(params):
        return tx.init(jax.tree.map(wide, params))

    return mark_wide(transformation(init_fn, update_fn))


def with_rate(
    tx: optax.GradientTransformation, rate: optax.ScalarOrSchedule, decay: Any, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """Decoupled decay behind a transformation, and the learning rate behind both, in float32."""
    return chained(tx, optax.add_decayed_weights(decay, mask), optax.scale_by_learning_rate(rate))


def chained(
    tx: optax.GradientTransformation, *links: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """A chain, with the state of one, whose links behind the first compute in float32.

    It is marked as computing in float32 if the first one is.
    """
    tx, step = optax.with_extra_args_support(tx), in_float32(optax.chain(*links))

    def init_fn(params):
        after: Any = step.init(params)
        return tx.init(params), *after

    def update_fn(updates, state, params=None, **extra_args):
        after: Any
        first, *after = state
        updates, first = tx.update(updates, first, params, **extra_args)
        updates, after = step.update(updates, tuple(after), params, **extra_args)
        return updates, (first, *after)

    made = transformation(init_fn, update_fn)
    return mark_wide(made) if computes_wide(tx) else made
