"""Fira: GaLore that keeps the part of the gradient outside the subspace.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
https://arxiv.org/abs/2410.01623. Written from the paper's equations.
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import optax

from galore_jax.inner.residual import limit_norm_growth, scale_by_column_ratio
from galore_jax.optimizers.wrap import with_rate
from galore_jax.settings import GaLoreOptions, Settings, takes
from galore_jax.transform import galore


@takes(Settings, without=["residual"])
def scale_by_fira(
    inner: optax.GradientTransformation,
    *,
    gamma: jax.typing.ArrayLike = 1.01,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""`galore` whose residual is scaled as the inner optimizer scales the subspace.

    For a weight (m, n) with inputs projected, m <= n,

    .. math::
        R &= P^T G, \quad N = \mathrm{inner}(R) \\
        S &= \phi \circ (G - P R), \quad \phi_j = \|N_j\| / \|R_j\| \\
        U &= \mathrm{scale} \cdot (P N + S)

    where the norm of S grows by no more than gamma from step to step. Put decay and learning rate
    behind it; `fira` does.

    Args:
        inner: what scales in the subspace, without learning rate or decay, such as
            `optax.scale_by_adam()` or `galore_jax.scale_by_adam8bit()`.
        gamma: largest growth of the residual's norm in a step.
        **options: see `galore`; all but `residual`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp, optax, galore_jax
        >>> tx = galore_jax.scale_by_fira(optax.scale_by_adam(), rank=2)
        >>> state = tx.init({"kernel": jnp.ones((8, 16))})
        >>> state.inner_state.nu["kernel"].shape, state.residual_state[1].norm["kernel"].shape
        ((2, 16), ())

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    residual = optax.chain(scale_by_column_ratio(), limit_norm_growth(gamma))
    return galore(inner, **{**options, "residual": residual})


@takes(scale_by_fira)
def fira(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    gamma: jax.typing.ArrayLike = 1.01,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: AdamW in the subspace, and the rest of the gradient scaled like it.

    With U the update of `scale_by_fira` around Adam,

    .. math:: W \leftarrow W - \eta\,(U + \lambda W)

    It keeps what `galore_adamw` keeps and one number for each matrix, the residual's norm.

    Args:
        learning_rate: eta, a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: lambda, decoupled, acting on the full weight.
        mask: tree of bools, or callable giving one: which leaves decay.
        gamma: largest growth of the residual's norm in a step.
        **options: see `galore`; all but `residual`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.fira(1e-3, rank=2)
        >>> tx.init({"kernel": jnp.ones((8, 16))})[0].inner_state.nu["kernel"].shape
        (2, 16)

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    tx = scale_by_fira(optax.scale_by_adam(b1, b2, eps), gamma=gamma, **options)
    return with_rate(tx, learning_rate, weight_decay, mask)
