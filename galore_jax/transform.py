"""GaLore: project the gradient, run an optimizer in the subspace, lift its update.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
https://arxiv.org/abs/2403.03507.
"""

from __future__ import annotations

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_jax import checks
from galore_jax.boundary import transformation
from galore_jax.call import Call
from galore_jax.chaining import mark
from galore_jax.inner.decay import reads_params, split_affine
from galore_jax.inner.moments import carry_over
from galore_jax.inner.moments import check as check_moments
from galore_jax.inner.residual import init_outside, update_outside
from galore_jax.matrix.plan import sites, warn_about
from galore_jax.matrix.trees import Sites, bare
from galore_jax.precision import wide, widened_for
from galore_jax.projector.gradient import is_projected, received
from galore_jax.projector.lazy import next_turns
from galore_jax.projector.project import low_rank
from galore_jax.projector.refresh import refresh
from galore_jax.projector.schedule import NEVER, schedule
from galore_jax.projector.storage import default_projector, from_tree, to_tree
from galore_jax.projector.update import FactoredUpdate, lifted
from galore_jax.settings import GaLoreOptions, Settings, is_transformation, takes
from galore_jax.state import Asked, GaLoreState, answer


@takes(Settings)
def galore(
    inner: optax.GradientTransformation | None = None, **options: Unpack[GaLoreOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Run an optimizer in a low-rank subspace of the gradient.

    For a weight :math:`W` of shape (m, n), m inputs and n outputs as Flax stores kernels,
    and :math:`m \le n`, each step computes

    .. math::
        R_t &= P_t^T G_t \quad (r \times n) \\
        N_t &= \mathrm{inner}(R_t) \\
        W_{t+1} &= W_t + \mathrm{scale} \cdot P_t N_t + c_t W_t

    where :math:`P_t` (m, r) holds the leading left singular vectors of the gradient,
    recomputed at steps 0, T, 2T, ... with T = `update_proj_gap`, and :math:`c_t` is the
    inner optimizer's decoupled weight decay (:math:`-\eta\lambda` for AdamW), which acts on
    the full weight and is not scaled. All state of the inner optimizer has the shape of
    :math:`R_t`. Leaves that are not projected go through the inner optimizer as they are.

    Use it as a wrapper, `galore(optax.adamw(1e-3), rank=128)`, or as a link,
    `optax.chain(galore(rank=128), optax.adamw(1e-3))`: both give the same updates, see
    `galore_jax.chain`. The inner optimizer computes in float32 (float64 for float64
    parameters) whatever the parameters' dtype, so its moments are float32 unless it asks
    for another dtype itself; updates come back in the parameters' dtype (the gradients' where
    `update` gets no params).

    `proj_type` names sides as galore-torch does, whose weights are stored (out, in):

    ============= ======================== =====================
    proj_type     n_out >= n_in            n_out < n_in
    ============= ======================== =====================
    std           inputs: P (n_in, r)      outputs: P (n_out, r)
    reverse_std   outputs                  inputs
    right         inputs                   inputs
    left          outputs                  outputs
    full          both: moments are r x r  both
    ============= ======================== =====================

    Args:
        inner: the optimizer to run in the subspace: any Optax transformation whose update is
            affine in the parameters (adamw, lion, sgd with momentum, ...), with one coefficient
            for a matrix: a decay that differs within one gives NaN. Without it the
            result is a mark for `galore_jax.chain`.
        rank: r, as an int, as a share of the smaller side of the matrix in (0, 1), or as a
            callable `(path, shape) -> int or share`. A matrix whose smaller side is not above
            its rank is left alone.
        update_proj_gap: T, the number of updates between two refreshes of a projector. A matrix
            whose gradient is zero or not finite when its turn comes refreshes at the first step
            at which it is neither.
        scale: factor on the lifted update (the paper's alpha), not on the decay.
        unprojected_scale: factor on the updates of leaves that are not projected, their decay
            included where `inner` has it: the learning rate of embeddings, heads and norms in units
            of that of the matrices. At 1 they take whole steps, as in the paper, where `scale`
            shortens those of matrices: a rate chosen for these may then be too large for those.
        proj_type: which side of the matrix is projected, see above.
        method: how a projector is computed: `randomized` (range finder with power iterations
            on the smaller Gram matrix; 0.999 and more of the SVD's captured energy), `svd`,
            `eigh` (the same subspace from the smaller Gram matrix), `subspace` (one block power
            iteration from the last projector), `random` or `coordinates` (the gradient is not
            used; coordinate directions are r random rows of the matrix, or columns, and stored as
            indices). A schedule is a dict by first step: `{0: "randomized", 8000: "random"}`
            takes random projectors late in training, when noise prevails, as GoLore does.
        refresh: `fixed`, or `lazy`: a matrix whose subspace barely moved at a refresh (it shares
            more than 0.4 of the way from chance to equality with the last one) waits twice as
            long for the next, up to 16 T; when it moves again it is back at T.
        stagger: after step 0, spread the refreshes of matrices, layers of a stacked leaf
            included, over the T steps, so that no single step pays for all of them.
        moments: what becomes of the inner state when a projector changes: `keep` (the
            paper), `reset` to zero, or `rotate` into the new basis.
        residual: a transformation for the part of the gradient outside the subspace,
            :math:`G - P P^T G`, whose result is added to the lifted update (and not scaled). With
            `optax.sign_sgd(learning_rate)` it is FRUGAL's state-free half. It sees matrices
            `batch + (m, n)` and needs full gradients. None drops that part, as the paper does.
        exclude: regular expression, searched in a leaf's path (`blocks/attn/q/kernel`); leaves
            that match are not projected. The default keeps out embeddings, output heads,
            normalisation scales and biases. None excludes nothing.
        weight_dimension_numbers: which axes form the matrix: an object with `reduction_axis`
            and `output_axis` (such as `optax.contrib.MuonDimensionNumbers`) for all leaves, a
            tree (or prefix) of such objects and None, or a callable from parameters to one.
            Axes not named are stacked matrices, each with its own projector. By default 2-D
            leaves are matrices; `galore_jax.matrix_axes` knows the layouts in use.
        projector_dtype: how projectors are stored: float32 (default; float64 for float64
            parameters), bfloat16, or quantised in blocks of up to 256, `int8` or `int4` (two
            to a byte). What is stored is what projects and lifts.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `GaLoreState`. Extra arguments
        of `update` reach the inner optimizer.

    Raises:
        TypeError: for a rank, an inner optimizer or dimension numbers of the wrong type.
        ValueError: for an option out of range; at `init`, for dimension numbers that do not
            fit the parameters, an inner state that `moments` has no rule for, or one that keeps
            the weights themselves; at `update`, for gradients of another shape,
            for an inner update that is not affine in the parameters, or a state made for
            another rank.

    Example:
        >>> import jax, jax.numpy as jnp, optax, galore_jax
        >>> params = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}
        >>> loss = lambda p: jnp.sum(jnp.square(p["kernel"])) + jnp.sum(jnp.square(p["bias"]))
        >>> tx = galore_jax.galore(optax.adamw(0.1), rank=1, scale=1.0)
        >>> state = tx.init(params)
        >>> state.inner_state[0].mu["kernel"].shape
        (1, 16)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss(params):.0f}")
        132
        121
        110

    References:
        Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
        <https://arxiv.org/abs/2403.03507>`_, 2024; He et al., `GoLore
        <https://arxiv.org/abs/2410.11289>`_, 2024; Zhang et al., `Q-GaLore
        <https://arxiv.org/abs/2407.08296>`_, 2024; Zmushko et al., `FRUGAL
        <https://arxiv.org/abs/2411.07837>`_, 2024
    """
    settings = Settings(**options)
    if inner is None:
        return mark(functools.partial(_around, settings))
    if not is_transformation(inner):
        raise TypeError(
            "galore's first argument is the inner optimizer, an optax.GradientTransformation, "
            f"got {inner!r} (the rank goes by name: galore(rank=128))"
        )
    return _around(settings, inner)


def _around(
    settings: Settings, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`galore` with its options."""

    def init_fn(params):
        return _init(settings, inner, params)

    def update_fn(updates, state, params=None, *, galore: Call | None = None, **extra_args):
        if isinstance(state, Asked):
            like = updates if params is None else params
            plan = settings.plan(like)
            where = sites(plan, jax.tree.structure(like))
            checks.check_projectors(plan, where, state.state.projector, settings.storage)
            return answer(updates, state, settings, like, inner, galore)
        call = galore or Call()
        out, state = _update(settings, inner, updates, state, params, call, extra_args)
        treedef = jax.tree.structure(updates, is_leaf=is_projected)
        return jax.tree.unflatten(treedef, out), state

    inner = optax.with_extra_args_support(inner)
    return transformation(init_fn, update_fn)


def _init(settings: Settings, inner: optax.GradientTransformation, params: Any) -> GaLoreState:
    plan = settings.plan(params)
    warn_about(plan)
    where, storage = sites(plan, jax.tree.structure(params)), settings.storage

    def inner_init(low_params):
        return inner.init(where.put(low_params, params, wide))

    for view, reads in zip(where.views, reads_params(inner_init, _zeros(where)), strict=True):
        if reads:
            raise ValueError(
                "galore: the inner optimizer keeps the weights themselves in its state (leaf "
                f"'{view.path}'), as schedule-free ones do; the subspace does not show them. "
                "Put such a transformation around galore"
            )
    state = GaLoreState(
        count=jnp.zeros([], jnp.int32),
        projector=to_tree(
            where, [default_projector(x, storage or x.dtype) for x in where.views], storage
        ),
        refreshed=where.only(jnp.full(x.batch, NEVER, jnp.int32) for x in where.views),
        inner_state=inner_init(_zeros(where)),
    )
    if settings.moments != "keep":
        check_moments(inner.init, state.inner_state, params, plan, settings.moments)
    if settings.residual is not None:
        state = state._replace(residual_state=init_outside(settings.residual, where, params))
    if settings.lazy:
        ones = where.only(jnp.ones(x.batch, jnp.int32) for x in where.views)
        state = state._replace(turns_between=ones)
    return state


def _update(settings: Settings, inner, updates, state, params, call: Call, extra_args):
    """The updates' leaves, in the parameters' order, and the next state."""
    checks.check_state(state, settings.lazy)
    checks.check_gradients(updates, params)
    like = updates if params is None else params
    plan = settings.plan(like)
    where = sites(plan, jax.tree.structure(like))
    checks.check_projectors(plan, where, state.projector, settings.storage)
    views, old = where.views, from_tree(where, state.projector)
    grads = [received(g) for g in where.pick(updates)]
    checks.check_projected(views, grads, settings.needs)
    count = jnp.asarray(state.count)

    # Refresh.
    sources = grads if call.projector_grads is None else where.pick(bare(call.projector_grads))
    last = where.pick(state.refreshed)
    turns = where.pick(state.turns_between) if settings.lazy else None
    gap, stagger = settings.update_proj_gap, settings.stagger
    when = schedule(views, count, last, turns, gap, stagger, call)
    few = settings.stagger or settings.lazy
    now = refresh(views, sources, old, last, when, settings.methods, few)

    # Project. The inner optimizer meets zeros in the place of projected weights.
    projected = [low_rank(*x) for x in zip(views, now.stored, grads, strict=True)]
    fit = widened_for(inner)
    low_grads, zeros = where.put(projected, updates, fit), _zeros(where)

    def next_inner(inner_state, low_params):
        p = None if params is None else where.put(low_params, params, fit)
        return inner.update(low_grads, inner_state, p, **extra_args)

    # Carry the moments over.
    inner_state, factors = carry_over(
        settings.moments, state.inner_state, lambda s: next_inner(s, zeros)[1], where, old, now
    )

    # Update in the subspace.
    def at_params(low_params):
        out, next_state = next_inner(inner_state, low_params)
        return where.pick(out), (out, next_state)

    decays = None
    if views and params is not None:
        paths = [view.path for view in views]
        directions, (out, inner_state), decays = split_affine(at_params, zeros, paths)
    else:
        directions, (out, inner_state) = at_params(zeros)
    low_updates = [settings.scale * u for u in directions]
    if factors is not None:
        pairs = zip(factors, low_updates, strict=True)
        low_updates = [factor[..., None, None] * u for factor, u in pairs]

    # Lift, and decay the full weight.
    decays = decays or [None] * len(views)
    rows = zip(views, now.stored, low_updates, decays, where.pick(like), grads, strict=True)
    lifts: list[Any] = [lifted(*row) for row in rows]
    residual_state, turns_between = state.residual_state, state.turns_between
    if settings.residual is not None:
        rows = zip(views, now.stored, grads, projected, low_updates, strict=True)
        outside, residual_state = update_outside(
            settings.residual, residual_state, where, list(rows), params, extra_args
        )
        lifts = [u + x for u, x in zip(lifts, outside, strict=True)]
    if turns is not None:
        turns_between = where.only(next_turns(views, turns, old, now))
    out = where.flatten(where.put(lifts, out, settings.unprojected))
    return list(map(_like, out, where.flatten(like))), GaLoreState(
        optax.safe_increment(count),
        to_tree(where, now.stored, settings.storage),
        where.only(now.refreshed),
        inner_state,
        residual_state,
        turns_between,
    )


def _like(update: jax.Array | FactoredUpdate, x: jax.Array) -> jax.Array | FactoredUpdate:
    """In the dtype of the parameters, or of the gradients where there are none."""
    if isinstance(update, FactoredUpdate):
        return update
    return update.astype(jnp.result_type(x))


def _zeros(where: Sites) -> list[jax.Array]:
    """What the inner optimizer meets in the place of projected weights."""
    return [jnp.zeros(view.low_rank_shape, view.dtype) for view in where.views]
