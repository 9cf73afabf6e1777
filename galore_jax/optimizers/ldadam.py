"""LDAdam: a subspace that follows the gradient step by step, and an account of what it drops.

Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
https://arxiv.org/abs/2410.16103. Written from the paper's equations.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_jax import checks
from galore_jax.boundary import transformation
from galore_jax.call import Call
from galore_jax.matrix.plan import sites
from galore_jax.optimizers.wrap import with_rate
from galore_jax.precision import debias
from galore_jax.projector.project import lift, outside
from galore_jax.settings import GaLoreOptions, Settings, takes
from galore_jax.state import Asked
from galore_jax.transform import galore

_NAME = "scale_by_ldadam"


class LDAdamState(NamedTuple):
    """State of `scale_by_ldadam`."""

    galore: Any  # a GaLoreState: projector and Adam's moments
    # What the subspace did not show so far: float32 of the weights' shapes, for projected leaves.
    error: optax.Updates


@takes(
    Settings,
    without=[
        *("update_proj_gap", "scale", "method", "refresh"),
        *("stagger", "moments", "residual", "projector_dtype"),
    ],
)
def scale_by_ldadam(
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    rho: jax.typing.ArrayLike = 0.908,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace that takes one power iteration at every step, with error feedback.

    For a weight (m, n) with inputs projected, m <= n,

    .. math::
        A_t &= G_t + E_t \\
        B_t &= \rho\, P_{t-1} \hat m_{t-1} + (1 - \rho) A_t \\
        P_t &= \mathrm{QR}(B_t B_t^T P_{t-1}) \\
        U_t &= P_t\, \mathrm{Adam}(P_t^T A_t) \\
        E_{t+1} &= (I - P_t P_t^T) (A_t + \tfrac{b_1}{1 - b_1} P_{t-1} m_{t-1})

    with Adam's moments rotated from :math:`P_{t-1}` into :math:`P_t` (`moments="rotate"` of
    `galore`). The first projector is the SVD's. E is as large as the weights: this method saves
    one of Adam's two moments, for quality, not both.

    Args:
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        rho: share of the momentum in the matrix whose subspace is followed.
        **options: of `galore`: `rank`, `unprojected_scale`, `proj_type`, `exclude` and
            `weight_dimension_numbers`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; at `update`, for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.scale_by_ldadam(rank=2)
        >>> state = tx.init({"kernel": jnp.ones((8, 16))})
        >>> state.galore.inner_state.nu["kernel"].shape, state.error["kernel"].shape
        ((2, 16), (8, 16))

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    every_step: Any = dict(update_proj_gap=1, method={0: "svd", 1: "subspace"})
    every_step |= {**options, "scale": 1.0, "moments": "rotate"}
    settings = Settings(**every_step)
    tx: Any = galore(optax.scale_by_adam(b1, b2, eps), **every_step)

    def init_fn(params):
        where = sites(settings.plan(params), jax.tree.structure(params))
        error = where.only(jnp.zeros(view.shape, view.dtype) for view in where.views)
        return LDAdamState(tx.init(params), error)

    def update_fn(updates, state, params=None, **extra_args):
        if isinstance(state.galore, Asked):
            out, asked = tx.update(updates, state.galore, params, **extra_args)
            answers, number = asked.answers, asked.number
            answers[number] = answers[number]._replace(needs=_NAME)
            return out, state._replace(galore=asked)
        like = updates if params is None else params
        where = sites(settings.plan(like), jax.tree.structure(like))
        views, grads = where.views, where.pick(updates)
        checks.check_projected(views, grads, _NAME)

        adam, error = state.galore.inner_state, where.pick(state.error)
        rows = zip(views, where.pick(state.galore.projector), where.pick(adam.mu), strict=True)
        momentum = [lift(*row) for row in rows]
        # Its bias corrected; zero before the first step.
        corrected = rho / debias(b1, jnp.maximum(adam.count, 1))
        whole = [g.astype(v.dtype) + e for v, g, e in zip(views, grads, error, strict=True)]
        followed = [corrected * m + (1 - rho) * a for m, a in zip(momentum, whole, strict=True)]
        call = extra_args.pop("galore", None) or Call()
        out, galore_state = tx.update(
            where.put(whole, updates),
            state.galore,
            params,
            galore=dataclasses.replace(call, projector_grads=where.put(followed, updates)),
            **extra_args,
        )
        new = zip(views, where.pick(galore_state.projector), whole, momentum, strict=True)
        error = [v.from_matrix(outside(v, p, a + b1 / (1 - b1) * m)) for v, p, a, m in new]
        if params is None:
            out = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), out, updates)
        return out, LDAdamState(galore_state, where.only(error))

    return transformation(init_fn, update_fn)


@takes(scale_by_ldadam)
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    rho: jax.typing.ArrayLike = 0.908,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam: AdamW in a subspace that follows the gradient, with error feedback.

    With U the update of `scale_by_ldadam`,

    .. math:: W \leftarrow W - \eta\,(U + \lambda W)

    Args:
        learning_rate: eta, a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: lambda, decoupled, acting on the full weight.
        mask: tree of bools, or callable giving one: which leaves decay.
        rho: share of the momentum in the matrix whose subspace is followed.
        **options: see `scale_by_ldadam`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; at `update`, for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.ldadam(1e-3, rank=2)
        >>> tx.init({"kernel": jnp.ones((8, 16))})[0].error["kernel"].shape
        (8, 16)

    References:
        Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    tx = scale_by_ldadam(b1, b2, eps, rho, **options)
    return with_rate(tx, learning_rate, weight_decay, mask)
