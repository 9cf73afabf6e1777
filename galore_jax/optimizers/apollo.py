"""APOLLO: the gradient itself, scaled as an optimizer in a small subspace would scale it.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance",
https://arxiv.org/abs/2412.05270. Written from the paper's equations.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_jax import checks
from galore_jax.boundary import transformation
from galore_jax.call import Call
from galore_jax.inner.residual import column_ratio, limit_norm_growth
from galore_jax.matrix.plan import sites, warn_about
from galore_jax.matrix.trees import Sites
from galore_jax.matrix.view import MatrixView
from galore_jax.optimizers.wrap import with_rate
from galore_jax.precision import wide, widened_for
from galore_jax.projector.basis import methods as read_methods
from galore_jax.projector.project import project
from galore_jax.projector.refresh import refresh, seed_of
from galore_jax.projector.schedule import NEVER, layer_numbers, per_view, schedule
from galore_jax.projector.storage import default_projector, from_tree, to_tree
from galore_jax.settings import GaLoreOptions, Settings, check_choice, takes
from galore_jax.state import Asked, GaLoreState, answer

_NAME = "scale_by_apollo"


@takes(
    Settings,
    without=["refresh", "stagger", "moments", "residual", "projector_dtype"],
    scale=1.0,
    method="random",
)
def scale_by_apollo(
    inner: optax.GradientTransformation,
    *,
    granularity: str = "channel",
    gamma: jax.typing.ArrayLike = 1.01,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the gradient's channels as an optimizer in the subspace scales theirs.

    For a weight (m, n) with inputs projected, m <= n,

    .. math::
        R &= P^T G, \quad N = \mathrm{inner}(R) \quad (r \times n) \\
        s_j &= \|N_j\| / \|R_j\|, \quad U = \mathrm{scale} \cdot G\, \mathrm{diag}(s)

    and the norm of U grows by no more than gamma from step to step. P is Gaussian, of variance
    1 / r, drawn anew every `update_proj_gap` steps and never stored. Leaves that are not
    projected go through `inner` as they are. Put decay and learning rate behind it; `apollo` does.

    Args:
        inner: what scales in the subspace, without learning rate or decay, such as
            `optax.scale_by_adam()` or `galore_jax.scale_by_adam8bit()`.
        granularity: `channel`, one factor for each column (row where outputs are projected), or
            `tensor`, one for the matrix.
        gamma: largest growth of an update's norm in a step.
        **options: see `galore`; of them `rank`, `update_proj_gap`, `scale` (the paper's alpha, 1),
            `unprojected_scale`, `proj_type`, `exclude`, `weight_dimension_numbers` and `method`:
            `random`, or how to take P from the gradient (the paper's variant with `svd`), in which
            case it is orthonormal, and stored.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients; its state is a
        `GaLoreState`, whose `residual_state` holds the norms of the last update's matrices.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; at `update`, for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp, optax, galore_jax
        >>> tx = galore_jax.scale_by_apollo(optax.scale_by_adam(), rank=2)
        >>> params = {"kernel": jnp.ones((8, 16))}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"kernel": jnp.full((8, 16), 3.0)}, state, params)
        >>> updates["kernel"].shape, state.inner_state.nu["kernel"].shape
        ((8, 16), (2, 16))

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    settings = Settings(**options)
    check_choice("granularity", granularity, ("channel", "tensor"))
    stored = settings.methods != read_methods("random")
    inner_tx, limiter = optax.with_extra_args_support(inner), limit_norm_growth(gamma)

    def factors(view: MatrixView, new: jax.Array, old: jax.Array) -> jax.Array:
        whole = dataclasses.replace(view, side="both") if granularity == "tensor" else view
        return column_ratio(whole, new, old)

    def init_fn(params):
        plan = settings.plan(params)
        warn_about(plan)
        where = sites(plan, jax.tree.structure(params))
        low_rank = [jnp.zeros(view.low_rank_shape, view.dtype) for view in where.views]
        norms = limiter.init(where.only(jnp.zeros((*v.batch, 1, 1)) for v in where.views))
        state = GaLoreState(
            count=jnp.zeros([], jnp.int32),
            projector=optax.EmptyState(),
            refreshed=optax.EmptyState(),
            inner_state=inner_tx.init(where.put(low_rank, params, wide)),
            residual_state=norms,
        )
        if not stored:
            return state
        bases = [default_projector(v, settings.storage or v.dtype) for v in where.views]
        never = where.only(jnp.full(v.batch, NEVER, jnp.int32) for v in where.views)
        return state._replace(projector=to_tree(where, bases, settings.storage), refreshed=never)

    def projectors(where: Sites, grads, state: GaLoreState, call: Call):
        """This step's projectors; where they are stored also the steps they were made at."""
        count, views = jnp.asarray(state.count), where.views
        if not stored:
            draw = count // settings.update_proj_gap
            layers = per_view(views, layer_numbers(views, call.layer))
            return [_gaussian(v, n, draw) for v, n in zip(views, layers, strict=True)], None
        last = where.pick(state.refreshed)
        when = schedule(views, count, last, None, settings.update_proj_gap, False, call)
        old = from_tree(where, state.projector)
        now = refresh(views, grads, old, last, when, settings.methods)
        return now.stored, now.refreshed

    def update_fn(updates, state, params=None, *, galore: Call | None = None, **extra_args):
        like = updates if params is None else params
        if isinstance(state, Asked):
            return answer(updates, state, settings, like, inner, galore, _NAME)
        where = sites(settings.plan(like), jax.tree.structure(like))
        views, grads = where.views, where.pick(updates)
        checks.check_projected(views, grads, _NAME)

        bases, steps = projectors(where, grads, state, galore or Call())
        low = [project(*x) for x in zip(views, bases, grads, strict=True)]
        out, inner_state = inner_tx.update(
            where.put(low, updates, widened_for(inner_tx)), state.inner_state, None, **extra_args
        )
        scaled = [
            view.to_matrix(g).astype(view.dtype) * factors(view, new, r)
            for view, g, new, r in zip(views, grads, where.pick(out), low, strict=True)
        ]
        limited, norms = limiter.update(where.only(scaled), state.residual_state)
        lifted = [
            view.from_matrix(settings.scale * x)
            for view, x in zip(views, where.pick(limited), strict=True)
        ]
        out = where.put(lifted, out, settings.unprojected)
        out = jax.tree.map(lambda u, x: u.astype(jnp.result_type(x)), out, like)
        state = state._replace(
            count=optax.safe_increment(jnp.asarray(state.count)),
            inner_state=inner_state,
            residual_state=norms,
        )
        if steps is not None:
            trees = to_tree(where, bases, settings.storage), where.only(steps)
            state = state._replace(projector=trees[0], refreshed=trees[1])
        return out, state

    return transformation(init_fn, update_fn)


@takes(scale_by_apollo)
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: the gradient, its channels scaled as Adam scales them in a random subspace.

    With U the update of `scale_by_apollo` around Adam,

    .. math:: W \leftarrow W - \eta\,(U + \lambda W)

    It keeps Adam's moments in the subspace and, with random projectors, nothing else.

    Args:
        learning_rate: eta, a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: lambda, decoupled, acting on the full weight.
        mask: tree of bools, or callable giving one: which leaves decay.
        **options: see `scale_by_apollo`; the rank is a quarter or an eighth of the width in the
            paper.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; at `update`, for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.apollo(1e-3, rank=2)
        >>> sum(x.size for x in jax.tree.leaves(tx.init({"kernel": jnp.ones((8, 16))})[0]))
        67

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    tx = scale_by_apollo(optax.scale_by_adam(b1, b2, eps), **options)
    return with_rate(tx, learning_rate, weight_decay, mask)


@takes(apollo, without=["granularity"], rank=1, scale=128**0.5)
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: one factor for a whole matrix, from a subspace of rank one.

    `apollo(..., rank=1, scale=sqrt(128), granularity="tensor")`: two numbers for each column of a
    matrix are all it keeps.

    Args:
        learning_rate: a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, acting on the full weight.
        mask: tree of bools, or callable giving one: which leaves decay.
        **options: see `apollo`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; at `update`, for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.apollo_mini(1e-3)
        >>> sum(x.size for x in jax.tree.leaves(tx.init({"kernel": jnp.ones((8, 16))})[0]))
        35

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    options["granularity"] = "tensor"
    return apollo(learning_rate, b1, b2, eps, weight_decay, mask, **options)


def _gaussian(view: MatrixView, layer: jax.Array, draw: jax.Array) -> jax.Array:
    """Random projectors of variance 1 / r, the same whenever asked for."""

    def one(layer):
        key = jax.random.key(seed_of(view))
        key = jax.random.fold_in(jax.random.fold_in(key, draw), layer)
        shape = view.matrix.projector_shape
        return jax.random.normal(key, shape, view.dtype) / view.rank**0.5

    return jax.vmap(one)(layer.ravel()).reshape(view.projector_shape)
