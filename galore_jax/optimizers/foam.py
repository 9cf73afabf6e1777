"""FOAM: Adam whose moments are of means of neighbouring entries.

Wen et al., "FOAM: Blocked State Folding for Memory-Efficient LLM Training",
https://arxiv.org/abs/2512.07112. Written from the paper's equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.inner.residual import limit_norm_growth
from galore_jax.optimizers.matrices import beside_adam, over_matrices
from galore_jax.optimizers.wrap import in_float32
from galore_jax.precision import debias
from galore_jax.settings import Settings


class ScaleByFoamState(NamedTuple):
    """State of `scale_by_foam`: trees of matrices, their last axis folded."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    mu: optax.Updates  # shape=batch + (m, blocks)
    nu: optax.Updates


def fold(x: jax.Array, level: int) -> jax.Array:
    """Means of `2^level` neighbours on the last axis, the last ones of what is left."""
    n, width = x.shape[-1], 2**level
    blocks = -(-n // width)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * width - n)])
    counts = jnp.minimum(width, n - width * jnp.arange(blocks)).astype(x.dtype)
    return jnp.sum(padded.reshape(*x.shape[:-1], blocks, width), axis=-1) / counts


def unfold(x: jax.Array, level: int, n: int) -> jax.Array:
    """Each number of the last axis `2^level` times, to `n` in all."""
    return jnp.repeat(x, 2**level, axis=-1)[..., :n]


def scale_by_foam(
    level: int = 2,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's step from moments of folded gradients and the present residual.

    With A the mean over :math:`2^l` neighbours on the last axis, and E its repetition,

    .. math::
        \tilde m &\leftarrow \beta_1 \tilde m + (1 - \beta_1) A G, \quad
        \tilde v \leftarrow \beta_2 \tilde v + (1 - \beta_2) (A G)^2, \quad R = G - E A G \\
        U &= \frac{E \hat m + R}{\sqrt{E \hat v + R^2} + \epsilon}

    where hats correct the bias as in Adam, which the paper's equations leave out: without them the
    first steps are up to three times as long. :math:`E / 2^{l/2}` is an orthonormal basis that
    takes neither memory nor a product.

    Args:
        level: l. The moments take :math:`2^{1 - l}` numbers for each of the gradient.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root.

    Returns:
        An `optax.GradientTransformationExtraArgs` over matrices `batch + (m, n)`; its state is a
        `ScaleByFoamState`.

    Raises:
        ValueError: for a level that is no whole number of at least 0.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.scale_by_foam(level=2)
        >>> tx.init({"kernel": jnp.ones((8, 18))}).nu["kernel"].shape
        (8, 5)

    References:
        Wen et al., `FOAM <https://arxiv.org/abs/2512.07112>`_, 2025
    """
    if not isinstance(level, int) or isinstance(level, bool) or level < 0:
        raise ValueError(f"level must be a whole number of at least 0, got {level!r}")

    def init_fn(params):
        def zeros():  # arrays of their own for each moment: both may be donated
            return jax.tree.map(lambda x: fold(jnp.zeros(x.shape), level), params)

        return ScaleByFoamState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(jnp.asarray(state.count))
        folded = jax.tree.map(lambda g: fold(g, level), updates)
        mu = optax.tree.update_moment(folded, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(folded, state.nu, b2, 2)

        def step(g, folded, m, v):
            n = g.shape[-1]
            outside = g - unfold(folded, level, n)
            m = unfold(m / debias(b1, count), level, n) + outside
            v = unfold(v / debias(b2, count), level, n) + jnp.square(outside)
            return m / (jnp.sqrt(v) + eps)

        return jax.tree.map(step, updates, folded, mu, nu), ScaleByFoamState(count, mu, nu)

    return in_float32(optax.GradientTransformation(init_fn, update_fn))


def foam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    level: int = 2,
    scale: jax.typing.ArrayLike = 1.0,
    gamma: jax.typing.ArrayLike = 1.01,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    exclude: str | None = Settings.exclude,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FOAM: Adam on means of neighbouring entries, and the present residual in both moments.

    With U the update of `scale_by_foam` on a matrix (m, n), its neighbours n,

    .. math:: W \leftarrow W - \eta\,(\alpha\, U + \lambda W)

    where the norm of U grows by no more than gamma from step to step. Of a matrix it keeps
    :math:`2 m n / 2^l` numbers and the norm. Other leaves, and those that `exclude` names,
    take AdamW steps.

    Args:
        learning_rate: eta, a number or a schedule. As AdamW's.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: lambda, decoupled, of all leaves.
        mask: tree of bools, or callable giving one: which leaves decay.
        level: l, moments of :math:`2^l` entries are one: FOAM-2 by default.
        scale: alpha, on matrices alone.
        gamma: largest growth of an update's norm in a step.
        adam_learning_rate: of the leaves that take AdamW steps, by default `learning_rate`.
        exclude: see `galore`.
        weight_dimension_numbers: see `galore`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        ValueError: as `scale_by_foam`; as `galore` for `exclude` and `weight_dimension_numbers`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.foam(1e-3)
        >>> sum(x.size for x in jax.tree.leaves(tx.init({"kernel": jnp.ones((8, 16))})))
        67

    References:
        Wen et al., `FOAM <https://arxiv.org/abs/2512.07112>`_, 2025
    """
    settings = Settings(rank=1, exclude=exclude, weight_dimension_numbers=weight_dimension_numbers)
    matrices = optax.chain(
        scale_by_foam(level, b1, b2, eps), limit_norm_growth(gamma), optax.scale(scale)
    )
    return beside_adam(
        over_matrices(matrices, settings),
        settings,
        learning_rate,
        adam_learning_rate,
        in_float32(optax.scale_by_adam(b1, b2, eps)),
        weight_decay,
        mask,
        "foam",
    )
