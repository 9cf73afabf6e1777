"""What to look at while training: how much of a gradient its subspace holds, how far both move."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.control import cond
from galore_jax.matrix.trees import bare, path_string
from galore_jax.matrix.view import MatrixView
from galore_jax.meshes import as_auto, everywhere, explicit_mesh
from galore_jax.precision import wide
from galore_jax.projector.gradient import is_projected
from galore_jax.projector.project import bases, contract, project
from galore_jax.projector.schedule import NEVER
from galore_jax.projector.storage import Stored, from_tree, is_indices
from galore_jax.projector.update import FactoredUpdate
from galore_jax.state import Told, ask, is_state


def metrics(
    opt_state: Any,
    grads: Any,
    tx: optax.GradientTransformation,
    *,
    params: Any = None,
    updates: Any = None,
    before: Any = None,
) -> dict[str, jax.Array]:
    r"""Figures of a training step, by leaf and in the mean: a flat dict that any logger takes.

    For each matrix G of a gradient with projector P of rank r, and for each weight W,

    .. math::
        \text{captured\_energy} &= 1 - \|G - P P^T G\|^2 / \|G\|^2 = \|P^T G\|^2 / \|G\|^2 \\
        \text{subspace\_overlap} &= \|P_\text{old}^T P_\text{new}\|_F^2 / r \\
        \text{update\_to\_weight} &= \|\Delta W\| / \|W\|

    (:math:`P P^T G Q Q^T` with two sides, whose overlaps are averaged; the right-hand forms are
    those of orthonormal columns, and with quantised ones the figures stay between 0 and 1). It
    takes sums and a few small products, and may stay in a jitted step. Call it behind the update::

        updates, new_state = tx.update(grads, opt_state, params)
        figures = galore_jax.metrics(
            new_state, grads, tx, params=params, updates=updates, before=opt_state
        )

    A state does not say how a projector lies in its leaf, so the optimizer is asked, which
    computes nothing. What cannot be known is left out: the energy of a leaf whose gradient arrives
    in the subspace (`galore_jax.value_and_grad`), energies and overlaps of leaves that are not
    projected or have no projector in the state (`apollo`'s random ones), and of optimizers
    without a subspace.

    Args:
        opt_state: the state behind the update, of any optimizer.
        grads: what the update was given, gradients whole or in the subspace; None where there are
            none, as in `galore_jax.value_and_update`.
        tx: the optimizer.
        params: the weights, for `update_to_weight`; needed where `grads` is None.
        updates: what the update returned, for `update_to_weight`.
        before: the state in front of the update, for `subspace_overlap` and `refreshed`. Between
            an earlier one and `opt_state` more than one refresh may lie.

    Returns:
        float32 scalars, each by `name/path` for a leaf and by `name` for the mean over matrices
        (over leaves for `update_to_weight`); a stacked leaf has the mean of its matrices:

        - `captured_energy`: 0 for a gradient of zeros, NaN for one that is not finite;
        - `refreshed`: the share of matrices that have another projector than in `before`. The
          first projector of a matrix has none to be compared with, and does not count;
        - `subspace_overlap`: the mean over those, 1 where there are none;
        - `update_to_weight`: of all leaves, a stack as a whole; 0 for a weight of zeros;
        - `state_bytes`: without leaves.

    Raises:
        ValueError: for gradients or a state that are not this optimizer's; where neither `grads`
            nor `params` say what the weights are.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> params = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}
        >>> grads = {"kernel": jnp.eye(8, 16), "bias": jnp.ones(16)}
        >>> tx = galore_jax.galore_adamw(0.1, rank=2)
        >>> before = tx.init(params)
        >>> updates, state = tx.update(grads, before, params)
        >>> found = galore_jax.metrics(state, grads, tx, params=params, updates=updates)
        >>> for name, x in found.items():
        ...     print(name, round(float(x), 2))
        captured_energy/kernel 0.25
        captured_energy 0.25
        update_to_weight/bias 0.1
        update_to_weight/kernel 0.01
        update_to_weight 0.05
        state_bytes 460.0

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024; Zhang et al., `Q-GaLore
        <https://arxiv.org/abs/2407.08296>`_, 2024
    """
    if grads is None and params is None:
        raise ValueError("metrics: grads is None, so give params=, which say what is projected")

    args = tuple(map(bare, (opt_state, grads, params, updates, before)))

    def figures(opt_state, grads, params, updates, before):
        told = ask(tx, _shapes(grads if params is None else params), opt_state)
        found = {}
        if grads is not None:
            found |= _energies(told, grads)
        if before is not None:
            found |= _overlaps(told, opt_state, before)
        if params is not None and updates is not None:
            found |= _ratios(params, updates)
        found["state_bytes"] = jnp.asarray(_nbytes(opt_state))
        return {name: x.astype(jnp.float32) for name, x in found.items()}

    if (mesh := explicit_mesh(args)) is None:
        return figures(*args)
    return as_auto(mesh, figures, *args, like=everywhere(mesh))


def _shapes(tree: Any) -> Any:
    """Shapes and dtypes of parameters, or of their gradients."""

    def shape(x):
        dtype = x.view.dtype if is_projected(x) else jnp.result_type(x)
        return jax.ShapeDtypeStruct(jnp.shape(x) if not is_projected(x) else x.shape, dtype)

    return jax.tree.map(shape, tree, is_leaf=is_projected)


def _nbytes(tree: Any) -> int:
    arrays = map(jnp.asarray, jax.tree.leaves(tree))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _by_leaf(
    name: str, values: dict[str, jax.Array], mean: Callable[[jax.Array], jax.Array] = jnp.mean
) -> dict[str, jax.Array]:
    """By leaf the mean of what is known by matrix, and that of all matrices."""
    if not values:
        return {}
    found = {_key(name, path): mean(x) for path, x in values.items()}
    return found | {name: mean(jnp.concatenate([x.ravel() for x in values.values()]))}


def _key(name: str, path: str) -> str:
    return f"{name}/{path or '(params)'}"  # as in the table of `summary`


class _Site(NamedTuple):
    """A projected leaf whose projector is in the state."""

    view: MatrixView
    projector: Stored
    refreshed: jax.Array  # int32, view.batch


def _sites(told: Sequence[Told]) -> list[_Site]:
    found: list[_Site] = []
    for answer, state, _ in told:
        if not isinstance(state.projector, optax.EmptyState):  # drawn anew at each step
            where = answer.where
            stored, refreshed = from_tree(where, state.projector), where.pick(state.refreshed)
            found += map(_Site, where.views, stored, refreshed)
    return found


# --- Captured energy ---


def _energies(told: Sequence[Told], grads: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_projected)
    given = {path_string(path): g for path, g in leaves}
    found = {}
    for view, p, _ in _sites(told):
        g = given.get(view.path)
        if g is None or is_projected(g):  # which may not know how large it was as a whole
            continue
        if g.shape != view.shape:
            raise ValueError(
                f"metrics: the gradient of leaf '{view.path}' has shape {g.shape}, the leaf has "
                f"{view.shape}. Give the gradients that tx.update was given"
            )
        found[view.path] = captured_energy(view, p, g)
    return _by_leaf("captured_energy", found)


def captured_energy(view: MatrixView, p: Stored, g: jax.Array) -> jax.Array:
    """The share of a gradient's squared norm that is left behind P P^T, by matrix; view.batch."""
    matrix = view.to_matrix(g).astype(view.dtype)
    size = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    unit = jnp.where(size == 0, 1, size)  # a square may over- or underflow
    whole = jnp.sum(jnp.square(matrix / unit), axis=(-2, -1))
    low_rank = project(view, p, g) / unit
    inside = jnp.sum(jnp.square(low_rank), axis=(-2, -1))
    if not is_indices(p):
        # |G|^2 - |G - P R|^2 = 2 |R|^2 - <R, P^T P R>, also where rounded columns are no longer
        # orthonormal.
        again, (p_in, p_out) = low_rank, bases(view, p)
        if p_in is not None:
            again = contract(contract(p_in, -2, p_in, -2), -1, again, -2)
        if p_out is not None:
            again = contract(again, -1, contract(p_out, -2, p_out, -2), -2)
        inside = 2 * inside - jnp.sum(low_rank * again, axis=(-2, -1))
    return jnp.where(whole == 0, 0, jnp.clip(inside / jnp.where(whole == 0, 1, whole), 0, 1))


# --- Overlap ---


def _overlaps(told: Sequence[Told], opt_state: Any, before: Any) -> dict[str, jax.Array]:
    if jax.tree.structure(before) != jax.tree.structure(opt_state):
        raise ValueError(
            "metrics: before is not an earlier state of the optimizer that opt_state is of: their "
            "trees differ. Give the state that tx.update was given"
        )
    states = filter(is_state, jax.tree.leaves(before, is_leaf=is_state))
    earlier = [x._replace(state=state) for x, state in zip(told, states, strict=True)]
    pairs = list(zip(_sites(earlier), _sites(told), strict=True))
    if not pairs:
        return {}
    renewed = [(new.refreshed != old.refreshed) & (old.refreshed != NEVER) for old, new in pairs]

    def overlaps():
        shares = (overlap(new.view, old.projector, new.projector) for old, new in pairs)
        return [jnp.where(*x, jnp.nan) for x in zip(renewed, shares, strict=True)]

    def unknown():
        return [jnp.full(new.view.batch, jnp.nan, new.view.dtype) for _, new in pairs]

    any_renewed = functools.reduce(jnp.logical_or, map(jnp.any, renewed))
    shares = cond(any_renewed, overlaps, unknown)
    paths = [new.view.path for _, new in pairs]
    return _by_leaf(
        "refreshed", {path: x.astype(jnp.float32) for path, x in zip(paths, renewed, strict=True)}
    ) | _by_leaf("subspace_overlap", dict(zip(paths, shares, strict=True)), _mean_of_known)


def _mean_of_known(x: jax.Array) -> jax.Array:
    known = ~jnp.isnan(x)
    total = jnp.sum(jnp.where(known, x, 0))
    return jnp.where(jnp.any(known), total / jnp.maximum(jnp.sum(known), 1), 1)


def overlap(view: MatrixView, old: Stored, new: Stored) -> jax.Array:
    """How much of two projectors' subspaces is common, 0 if orthogonal, 1 if equal; view.batch.

    `|P^T Q|_F^2 / r`, where r is written as `|P^T P|_F |Q^T Q|_F`: rounded columns do not count as
    longer than one.
    """
    if is_indices(new):
        rows, others = jnp.asarray(old), jnp.asarray(new)
        same = rows[..., :, None] == others[..., None, :]
        return jnp.sum(same, axis=(-2, -1)).astype(view.dtype) / view.rank
    shares = []
    for p, q in zip(bases(view, old), bases(view, new), strict=True):
        if p is not None and q is not None:
            pq, pp, qq = (_square(contract(a, -2, b, -2)) for a, b in ((p, q), (p, p), (q, q)))
            shares.append(pq / jnp.sqrt(pp * qq))
    return jnp.minimum(sum(shares[1:], shares[0]) / len(shares), 1)


def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=(-2, -1))


# --- Updates ---


def _ratios(params: Any, updates: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_factored)
    moved = {path_string(path): u for path, u in leaves}
    found = {}
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        u = moved.get(path_string(path))
        if u is not None and jnp.issubdtype(jnp.result_type(w), jnp.inexact):
            weight = _norm(w)
            ratio = _norm(u) / jnp.where(weight == 0, 1, weight)
            found[path_string(path)] = jnp.where(weight == 0, 0, ratio)
    return _by_leaf("update_to_weight", found)


def _norm(x: Any) -> jax.Array:
    if _is_factored(x):
        return jnp.sqrt(jnp.sum(jnp.square(x.norm)))
    return jnp.sqrt(jnp.sum(jnp.square(wide(jnp.abs(x)))))


def _is_factored(x: Any) -> bool:
    return isinstance(x, FactoredUpdate)
