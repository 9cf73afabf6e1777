"""LDAdam: a subspace that follows the gradient step by step, and an account of what it drops.

Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
https://arxiv.org/abs/2410.16103. Written from the paper's equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import checks
from galore_jax import leaf as leaf_lib
from galore_jax.alias import with_rate
from galore_jax.leaf import DEFAULT_EXCLUDE, Rank, bare
from galore_jax.probes import Probe, probing
from galore_jax.projection import lift
from galore_jax.residual import outside_of
from galore_jax.transform import galore


class LDAdamState(NamedTuple):
    """State of `scale_by_ldadam`."""

    galore: Any  # a GaLoreState: projector and Adam's moments
    # What the subspace did not show so far: float32 of the weights' shapes, for projected leaves.
    error: optax.Updates


def scale_by_ldadam(
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    rho: jax.typing.ArrayLike = 0.908,
    *,
    rank: Rank,
    proj_type: str = "std",
    exclude: str | None = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
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
        rank: see `galore`.
        proj_type: see `galore`.
        exclude: see `galore`.
        weight_dimension_numbers: see `galore`.

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
    make_plan = leaf_lib.planner(rank, proj_type, exclude, weight_dimension_numbers)
    tx: Any = galore(
        optax.scale_by_adam(b1, b2, eps),
        rank=rank,
        update_proj_gap=1,
        scale=1.0,
        method={0: "svd", 1: "subspace"},
        moments="rotate",
        proj_type=proj_type,
        exclude=exclude,
        weight_dimension_numbers=weight_dimension_numbers,
    )

    def init_fn(params):
        plain = bare(params)
        where = leaf_lib.sites(make_plan(plain), jax.tree.structure(plain))
        error = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in where.leaves]
        return LDAdamState(tx.init(params), where.only(error, plain))

    def update_fn(updates, state, params=None, **extra_args):
        updates, params = bare(updates), bare(params)
        like = updates if params is None else params
        where = leaf_lib.sites(make_plan(like), jax.tree.structure(like))
        if probing(Probe(tuple(where.leaves), 1, False, (), needs="scale_by_ldadam")):
            return updates, state
        checks.check_projected(where.leaves, where.pick(updates), "scale_by_ldadam")

        adam = state.galore.inner_state
        momentum = [
            lift(*x)
            for x in zip(
                where.leaves, where.pick(state.galore.projector), where.pick(adam.mu), strict=True
            )
        ]
        # Its bias corrected; zero before the first step.
        debias = 1 / (1 - b1 ** jnp.maximum(adam.count, 1))
        whole = [
            g.astype(leaf.dtype) + e
            for leaf, g, e in zip(
                where.leaves, where.pick(updates), where.pick(state.error), strict=True
            )
        ]
        followed = [rho * debias * m + (1 - rho) * a for m, a in zip(momentum, whole, strict=True)]
        out, galore_state = tx.update(
            where.put(whole, updates),
            state.galore,
            params,
            projector_grads=where.put(followed, updates),
            **extra_args,
        )
        error = [
            leaf.from_matrix(outside_of(leaf, p, a + b1 / (1 - b1) * m))
            for leaf, p, a, m in zip(
                where.leaves, where.pick(galore_state.projector), whole, momentum, strict=True
            )
        ]
        if params is None:
            out = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), out, updates)
        return out, LDAdamState(galore_state, where.only(error, like))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    rank: Rank,
    rho: jax.typing.ArrayLike = 0.908,
    proj_type: str = "std",
    exclude: str | None = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
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
        rank: see `galore`.
        rho: share of the momentum in the matrix whose subspace is followed.
        proj_type: see `galore`.
        exclude: see `galore`.
        weight_dimension_numbers: see `galore`.

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
    tx = scale_by_ldadam(
        b1,
        b2,
        eps,
        rho,
        rank=rank,
        proj_type=proj_type,
        exclude=exclude,
        weight_dimension_numbers=weight_dimension_numbers,
    )
    return with_rate(tx, learning_rate, weight_decay, mask)
