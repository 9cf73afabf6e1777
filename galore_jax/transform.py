"""GaLore: project the gradient, run an optimizer in the subspace, lift its update.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
https://arxiv.org/abs/2403.03507.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax

from galore_jax import checks
from galore_jax import leaf as leaf_lib
from galore_jax import moments as moments_lib
from galore_jax.basis import Methods
from galore_jax.basis import methods as read_methods
from galore_jax.decay import reads_params, split_affine
from galore_jax.lazy import next_pauses, pause_tree, pauses_of, unpaused
from galore_jax.leaf import DEFAULT_EXCLUDE, Leaf, Rank, Sites, bare
from galore_jax.lowrank import Factored, factored, is_projected, wide
from galore_jax.probes import Probe, Record, probing, recorded
from galore_jax.projection import (
    default_projector,
    from_tree,
    lift,
    load,
    project,
    storage_of,
    store,
    to_tree,
)
from galore_jax.refresh import Schedule, in_multi_steps, schedule
from galore_jax.refresh import refresh as refresh_projectors
from galore_jax.residual import column_ratio, outside_of


class GaLoreState(NamedTuple):
    """State of `galore`: a struct of trees of plain arrays."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    # Bases, batch + (m, r) or (n, r); MaskedNode where unprojected. Quantised: an `Encoded`,
    # one tree of codes and one of scales.
    projector: optax.Params
    inner_state: optax.OptState  # of the inner optimizer, over low-rank arrays
    # Of `residual`, over the matrices outside the subspace.
    residual_state: optax.OptState = optax.EmptyState()
    pauses: Any = optax.EmptyState()  # refresh="lazy": a `Pause` of trees, int32, batch


class GaLoreOptions(TypedDict, total=False):
    """Keyword options shared by `galore` and its aliases; see `galore`."""

    update_proj_gap: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike
    proj_type: str
    method: str | Mapping[int, str]
    refresh: str
    stagger: bool
    moments: str
    residual: optax.GradientTransformation | None
    exclude: str | None
    weight_dimension_numbers: Any
    projector_dtype: Any


class _Mark(optax.GradientTransformationExtraArgs):
    """A `galore` without an inner optimizer: `galore_jax.chain` wraps what follows it."""

    around: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]


def galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: Rank,
    update_proj_gap: jax.typing.ArrayLike = 200,
    scale: jax.typing.ArrayLike = 0.25,
    proj_type: str = "std",
    method: str | Mapping[int, str] = "randomized",
    refresh: str = "fixed",
    stagger: bool = False,
    moments: str = "keep",
    residual: optax.GradientTransformation | None = None,
    exclude: str | None = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
    projector_dtype: Any = None,
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
            affine in the parameters (adamw, lion, sgd with momentum, ...). Without it the
            result is a mark for `galore_jax.chain`.
        rank: r, as an int, as a share of the smaller side of the matrix in (0, 1), or as a
            callable `(path, shape) -> int or share`. A matrix whose smaller side is not above
            its rank is left alone.
        update_proj_gap: T, the number of updates between two refreshes of a projector.
        scale: factor on the lifted update (the paper's alpha), not on the decay.
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
            leaves are matrices; `galore_jax.last_two_axes` is the rule for scanned models.
        projector_dtype: how projectors are stored: float32 (default; float64 for float64
            parameters), bfloat16, or quantised in blocks of 256 numbers, `int8` or `int4` (two
            to a byte). What is stored is what projects and lifts.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `GaLoreState`. `update` takes
        `projector_grads=`, a tree like the gradients to compute projectors from in their place;
        other extra arguments reach the inner optimizer.

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
    make_plan = leaf_lib.planner(rank, proj_type, exclude, weight_dimension_numbers)
    checks.check_gap(update_proj_gap)
    checks.check_scale(scale)
    checks.check_choice("stagger", stagger, (True, False))
    checks.check_choice("refresh", refresh, ("fixed", "lazy"))
    methods = read_methods(method)
    checks.check_choice("moments", moments, moments_lib.POLICIES)
    storage = checks.projector_storage(projector_dtype)
    if methods == read_methods("coordinates"):
        storage = checks.indices(projector_dtype, proj_type)

    if inner is None:
        mark = _Mark(_no_inner, _no_inner)
        mark.around = functools.partial(
            galore,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            method=method,
            refresh=refresh,
            stagger=stagger,
            moments=moments,
            residual=residual,
            exclude=exclude,
            weight_dimension_numbers=weight_dimension_numbers,
            projector_dtype=projector_dtype,
        )
        return mark
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            "galore's first argument is the inner optimizer, an optax.GradientTransformation, "
            f"got {inner!r} (the rank goes by name: galore(rank=128))"
        )
    if residual is not None and not (hasattr(residual, "init") and hasattr(residual, "update")):
        raise TypeError(
            f"residual must be an optax.GradientTransformation or None, got {residual!r}; FRUGAL's "
            "is optax.sign_sgd(learning_rate)"
        )
    inner_tx = optax.with_extra_args_support(inner)
    residual_tx = None if residual is None else optax.with_extra_args_support(residual)

    def init_fn(params):
        params = bare(params)
        plan = make_plan(params)
        if not recorded(Record(plan, params, inner, init_fn)):
            leaf_lib.warn_about(plan)
        where = leaf_lib.sites(plan, jax.tree.structure(params))
        projectors = [default_projector(leaf, storage or leaf.dtype) for leaf in where.leaves]
        low_params = [jnp.zeros(leaf.low_rank_shape, leaf.dtype) for leaf in where.leaves]

        def inner_init(low_params):
            return inner_tx.init(where.put(low_params, jax.tree.map(wide, params)))

        for leaf, reads in zip(where.leaves, reads_params(inner_init, low_params), strict=True):
            if reads:
                raise ValueError(
                    f"galore: the inner optimizer keeps the weights themselves in its state (leaf "
                    f"'{leaf.path}'), as schedule-free ones do; the subspace does not show them. "
                    "Put such a transformation around galore"
                )
        inner_state = inner_init(low_params)
        if moments != "keep":
            moments_lib.check(inner_tx.init, inner_state, params, plan, moments)
        state = GaLoreState(
            jnp.zeros([], jnp.int32), to_tree(where, projectors, params, storage), inner_state
        )
        if residual_tx is not None:
            matrices = [
                leaf.to_matrix(w).astype(leaf.dtype)
                for leaf, w in zip(where.leaves, where.pick(params), strict=True)
            ]
            residual_state = residual_tx.init(where.only(matrices, params))
            state = state._replace(residual_state=residual_state)
        if refresh == "lazy":
            state = state._replace(pauses=pause_tree(where, unpaused(where.leaves), params))
        return state

    def update_fn(updates, state, params=None, *, projector_grads=None, **extra_args):
        given, updates, params = updates, bare(updates), bare(params)
        if not isinstance(state, GaLoreState):
            raise TypeError(
                f"galore's state must be a GaLoreState, got {type(state).__name__}. A checkpoint "
                "has to be restored with a target: jax.eval_shape(tx.init, params)"
            )
        if params is not None:
            checks.check_shapes(updates, params)
        elif any(map(is_projected, jax.tree.leaves(updates, is_leaf=is_projected))):
            raise ValueError(
                "galore: gradients from galore_jax.value_and_grad need the parameters: call "
                "tx.update(grads, state, params)"
            )
        like = updates if params is None else params
        plan = make_plan(like)
        where = leaf_lib.sites(plan, jax.tree.structure(like))
        leaves = tuple(where.leaves)
        needs = None if residual is None else "galore's residual="
        if probing(Probe(leaves, update_proj_gap, stagger, methods, in_multi_steps(), needs)):
            return given, state
        checks.check_projectors(plan, where, state.projector, storage)
        grads, old = where.pick(updates), from_tree(where, state.projector)
        checks.check_projected(leaves, grads, needs)

        # Project, unless `value_and_grad` already did.
        count = jnp.asarray(state.count)
        pauses = pauses_of(where, state.pauses)
        when = schedule(leaves, count, update_proj_gap, stagger, pauses)
        fixed = [is_projected(g) and g.projector is None for g in grads]
        if any(fixed):  # by a program without refreshes
            when = when.without(leaves, fixed)
        sources = grads if projector_grads is None else where.pick(bare(projector_grads))
        some = stagger or pauses is not None  # matrices are due, and others not
        new = _projectors(leaves, sources, old, count, when, methods, some)
        projected = [
            g.low_rank if is_projected(g) else project(leaf, p, g)
            for leaf, p, g in zip(leaves, new, grads, strict=True)
        ]
        low_grads = where.put(projected, jax.tree.map(wide, updates, is_leaf=is_projected))

        # Update in the subspace. The inner optimizer meets zeros for projected weights.
        wide_params = None if params is None else jax.tree.map(wide, params)
        zeros = [jnp.zeros(leaf.low_rank_shape, leaf.dtype) for leaf in leaves]

        def inner_update(inner_state, low_params):
            p = None if wide_params is None else where.put(low_params, wide_params)
            return inner_tx.update(low_grads, inner_state, p, **extra_args)

        inner_state, correction = moments_lib.carry_over(
            moments, state.inner_state, lambda s: inner_update(s, zeros)[1], where, old, new, when
        )

        def at_params(low_params):
            inner_updates, next_state = inner_update(inner_state, low_params)
            return where.pick(inner_updates), (inner_updates, next_state)

        if leaves and params is not None:
            paths = [leaf.path for leaf in leaves]
            directions, (out, inner_state), decay = split_affine(at_params, zeros, paths)
        else:
            directions, (out, inner_state) = at_params(zeros)
            decay = None

        # Lift, and decay the full weight.
        factors: list[Any] = [scale] * len(leaves)
        if correction is not None:
            factors = [scale * c[..., None, None] for c in correction]
        scaled = [f * u for f, u in zip(factors, directions, strict=True)]
        decays = [None] * len(leaves) if decay is None else decay
        weights = grads if params is None else where.pick(params)
        lifted = [
            _lifted(leaf, p, u, c, w, is_projected(g))
            for leaf, p, u, c, w, g in zip(leaves, new, scaled, decays, weights, grads, strict=True)
        ]
        residual_state = state.residual_state
        if residual_tx is not None:
            update_outside = functools.partial(residual_tx.update, **extra_args)
            outside, residual_state = _outside(
                update_outside, residual_state, where, new, grads, projected, scaled, params
            )
            lifted = [u + x for u, x in zip(lifted, outside, strict=True)]  # type: ignore[operator]
        out = [
            u if isinstance(u, Factored) else u.astype(jnp.result_type(x))
            for u, x in zip(where.flatten(where.put(lifted, out)), where.flatten(like), strict=True)
        ]
        new_state = GaLoreState(
            optax.safe_increment(count),
            to_tree(where, new, like, storage),
            inner_state,
            residual_state,
            state.pauses,
        )
        if pauses is not None:
            pauses = next_pauses(leaves, pauses, old, new, projected, when)
            new_state = new_state._replace(pauses=pause_tree(where, pauses, like))
        treedef = jax.tree.structure(given, is_leaf=is_projected)
        return jax.tree.unflatten(treedef, out), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _outside(update, state, where: Sites, projectors, grads, low_grads, low_updates, params):
    """The updates that `residual` makes of what the subspace does not show, and its next state."""
    leaves, like = where.leaves, where.treedef.unflatten([0] * where.treedef.num_leaves)
    outside = list(map(outside_of, leaves, projectors, grads, low_grads))
    ratios = list(map(column_ratio, leaves, low_updates, low_grads))
    matrices = None
    if params is not None:
        weights = zip(leaves, where.pick(params), strict=True)
        matrices = where.only([leaf.to_matrix(wide(w)) for leaf, w in weights], like)
    outside, ratios = (where.only(x, like) for x in (outside, ratios))
    out, state = update(outside, state, matrices, column_ratio=ratios)
    return [leaf.from_matrix(x) for leaf, x in zip(leaves, where.pick(out), strict=True)], state


def _projectors(leaves, grads, old, count, when: Schedule, methods: Methods, some: bool):
    """This step's projectors: those that came with the gradients, or refreshed from them."""
    new = [
        store(leaf, g.new_projector(load(leaf, p)), storage_of(p))
        if is_projected(g) and g.projector is not None
        else p
        for leaf, g, p in zip(leaves, grads, old, strict=True)
    ]
    full = [i for i, g in enumerate(grads) if not is_projected(g)]
    if full and when.any_due is not False:
        refreshed = refresh_projectors(
            tuple(leaves[i] for i in full),
            [grads[i] for i in full],
            [old[i] for i in full],
            count,
            when.of(leaves, full),
            methods,
            some,
        )
        for i, p in zip(full, refreshed, strict=True):
            new[i] = p
    return new


def _lifted(leaf: Leaf, p, update, decay, w, in_subspace: bool):
    """`P N + c W`, multiplied out or, for a gradient that never was full either, not."""
    if in_subspace:
        return factored(leaf, p, update, decay, jnp.result_type(w))
    u = lift(leaf, p, update)
    return u if decay is None else u + _over(leaf, decay) * w.astype(leaf.dtype)


def _no_inner(*args, **kwargs):
    raise ValueError(
        "a galore(...) without an inner optimizer reached a transformation that does not know "
        "it. Write galore_jax.chain(galore(rank=...), optax.adamw(...)) (which importing "
        "galore_jax also installs as optax.chain), or galore(optax.adamw(...), rank=...)"
    )


def _over(leaf: Leaf, per_matrix: jax.Array) -> jax.Array:
    """Lay one number per stacked matrix out against an array of the leaf's shape."""
    shape = [1] * len(leaf.shape)
    for axis in leaf.batch_axes:
        shape[axis] = leaf.shape[axis]
    return per_matrix.reshape(shape)
