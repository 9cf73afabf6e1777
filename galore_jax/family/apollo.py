"""APOLLO: the gradient itself, scaled as an optimizer in a small subspace would scale it.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance",
https://arxiv.org/abs/2412.05270. Written from the paper's equations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_jax import checks
from galore_jax import leaf as leaf_lib
from galore_jax.alias import spell_out, with_rate
from galore_jax.basis import methods as read_methods
from galore_jax.leaf import DEFAULT_EXCLUDE, Leaf, Rank, bare
from galore_jax.lowrank import wide
from galore_jax.probes import Probe, Record, probing, recorded
from galore_jax.projection import default_projector, project
from galore_jax.refresh import per_leaf, refresh, schedule, seed_of
from galore_jax.residual import column_ratio, limit_norm_growth


class ApolloState(NamedTuple):
    """State of `scale_by_apollo`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    # Bases, batch + (m, r) or (n, r); none at all for random ones, which a key gives again.
    projector: optax.Params
    inner_state: optax.OptState  # over low-rank arrays
    limiter: Any  # a LimitNormGrowthState: norms of the last update's matrices


class ApolloOptions(TypedDict, total=False):
    """Keyword arguments of `scale_by_apollo`; they are documented there."""

    update_proj_gap: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike
    granularity: str
    gamma: jax.typing.ArrayLike
    method: str | Mapping[int, str]
    proj_type: str
    exclude: str | None
    weight_dimension_numbers: Any


def scale_by_apollo(
    inner: optax.GradientTransformation,
    *,
    rank: Rank,
    update_proj_gap: jax.typing.ArrayLike = 200,
    scale: jax.typing.ArrayLike = 1.0,
    granularity: str = "channel",
    gamma: jax.typing.ArrayLike = 1.01,
    method: str | Mapping[int, str] = "random",
    proj_type: str = "std",
    exclude: str | None = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
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
        rank: r, see `galore`.
        update_proj_gap: T, steps between two projectors.
        scale: the paper's alpha.
        granularity: `channel`, one factor for each column (row where outputs are projected), or
            `tensor`, one for the matrix.
        gamma: largest growth of an update's norm in a step.
        method: `random`, or how to take P from the gradient (the paper's variant with `svd`), in
            which case it is orthonormal, and stored; see `galore`.
        proj_type: see `galore`.
        exclude: see `galore`.
        weight_dimension_numbers: see `galore`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

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
    checks.check_gap(update_proj_gap)
    checks.check_scale(scale)
    checks.check_choice("granularity", granularity, ("channel", "tensor"))
    make_plan = leaf_lib.planner(rank, proj_type, exclude, weight_dimension_numbers)
    methods = read_methods(method)
    stored = methods != read_methods("random")
    inner_tx = optax.with_extra_args_support(inner)
    limiter = limit_norm_growth(gamma)

    def factors(leaf: Leaf, new: jax.Array, old: jax.Array) -> jax.Array:
        whole = dataclasses.replace(leaf, side="both") if granularity == "tensor" else leaf
        return column_ratio(whole, new, old)

    def init_fn(params):
        params = bare(params)
        plan = make_plan(params)
        if not recorded(Record(plan, params, inner, init_fn)):
            leaf_lib.warn_about(plan)
        where = leaf_lib.sites(plan, jax.tree.structure(params))
        low_rank = [jnp.zeros(leaf.low_rank_shape, leaf.dtype) for leaf in where.leaves]
        projectors: Any = optax.EmptyState()
        if stored:
            bases = [default_projector(leaf, leaf.dtype) for leaf in where.leaves]
            projectors = where.only(bases, params)
        matrices = [
            leaf.to_matrix(w) for leaf, w in zip(where.leaves, where.pick(params), strict=True)
        ]
        return ApolloState(
            jnp.zeros([], jnp.int32),
            projectors,
            inner_tx.init(where.put(low_rank, jax.tree.map(wide, params))),
            limiter.init(where.only(matrices, params)),
        )

    def update_fn(updates, state, params=None, **extra_args):
        updates = bare(updates)
        like = updates if params is None else bare(params)
        where = leaf_lib.sites(make_plan(like), jax.tree.structure(like))
        leaves = tuple(where.leaves)
        if probing(Probe(leaves, update_proj_gap, False, methods, needs="scale_by_apollo")):
            return updates, state
        grads = where.pick(updates)
        checks.check_projected(leaves, grads, "scale_by_apollo")

        count = jnp.asarray(state.count)
        when = schedule(leaves, count, update_proj_gap, stagger=False)
        if stored:
            old = where.pick(state.projector)
            bases = refresh(leaves, grads, old, count, when, methods, False)
        else:
            layers = per_leaf(leaves, when.layer)
            bases = [
                _gaussian(leaf, layer, count // update_proj_gap)
                for leaf, layer in zip(leaves, layers, strict=True)
            ]
        low = [project(*x) for x in zip(leaves, bases, grads, strict=True)]
        out, inner_state = inner_tx.update(
            where.put(low, jax.tree.map(wide, updates)), state.inner_state, None, **extra_args
        )
        scaled = [
            leaf.to_matrix(g).astype(leaf.dtype) * factors(leaf, new, r)
            for leaf, g, new, r in zip(leaves, grads, where.pick(out), low, strict=True)
        ]
        limited, limits = limiter.update(where.only(scaled, like), state.limiter)
        lifted = [
            leaf.from_matrix(scale * x) for leaf, x in zip(leaves, where.pick(limited), strict=True)
        ]
        out = jax.tree.map(lambda u, x: u.astype(jnp.result_type(x)), where.put(lifted, out), like)
        projectors = where.only(bases, like) if stored else state.projector
        count = optax.safe_increment(count)
        return out, ApolloState(count, projectors, inner_state, limits)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@spell_out(scale_by_apollo, ApolloOptions.__annotations__)
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    rank: Rank,
    **options: Unpack[ApolloOptions],
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
        rank: r, see `galore`; a quarter or an eighth of the width in the paper.
        **options: see `scale_by_apollo`.

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
    tx = scale_by_apollo(optax.scale_by_adam(b1, b2, eps), rank=rank, **options)
    return with_rate(tx, learning_rate, weight_decay, mask)


@spell_out(apollo, [n for n in ApolloOptions.__annotations__ if n not in ("scale", "granularity")])
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    rank: Rank = 1,
    scale: jax.typing.ArrayLike = 128**0.5,
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
        rank: see `galore`.
        scale: see `scale_by_apollo`.
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
    shape = {"rank": rank, "scale": scale, "granularity": "tensor"}
    return apollo(learning_rate, b1, b2, eps, weight_decay, mask, **shape, **options)


def _gaussian(leaf: Leaf, layer: jax.Array, draw: jax.Array) -> jax.Array:
    """Random projectors of variance 1 / r, the same whenever asked for."""

    def one(layer):
        key = jax.random.key(seed_of(leaf))
        key = jax.random.fold_in(jax.random.fold_in(key, draw), layer)
        shape = leaf.matrix.projector_shape
        return jax.random.normal(key, shape, leaf.dtype) / leaf.rank**0.5

    return jax.vmap(one)(layer.ravel()).reshape(leaf.projector_shape)
