"""What happens to the inner optimizer's moments when a projector changes.

With `C = P_new^T P_old`, a first moment `mu` in the old basis reads `C mu` in the new one.
For the second moment take the old coordinates as uncorrelated: with bias-corrected moments,
`var = nu - mu^2` moves by the squared entries of C, so

    nu <- | C^2 (nu - mu^2) + (C mu)^2 |

which is LDAdam's rule. The paper keeps both as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.control import cond
from galore_jax.matrix.plan import Plan
from galore_jax.matrix.trees import Sites, owners
from galore_jax.matrix.view import MatrixView
from galore_jax.precision import debias
from galore_jax.projector.project import bases, contract
from galore_jax.projector.refresh import Projectors
from galore_jax.projector.storage import Stored
from galore_jax.quantize import DYNAMIC, decode, encode

POLICIES = ("keep", "reset", "rotate")
_FIRST, _SECOND = ("mu", "trace"), "nu"
_SCALE = "_scale"

# (tree of the inner state) -> (tree of the next inner state), at this step's gradient
NextState = Callable[[Any], Any]


class Decay(NamedTuple):
    """Decay rates of a state's moments, found by differentiation (None: no such moment)."""

    b1: jax.Array | None
    b2: jax.Array | None


def check(init: Any, inner_state: Any, params: Any, plan: Plan, moments: str) -> None:
    """Raise when the inner state holds low-rank arrays that no rule is known for."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(inner_state)
    numbered = treedef.unflatten(range(len(leaves)))
    known, scales = set(), set()
    for node in _nodes(numbered):
        # Decay rates, which a second moment needs, are not to be read off codes.
        if _SECOND not in node._fields or not _scale_trees(node):
            known.update(jax.tree.leaves(_moment_trees(node)))
            scales.update(jax.tree.leaves(_scale_trees(node)))
    for i, owner in enumerate(owners(init, inner_state, params)):
        leaf, (path, x) = None if owner is None else plan[owner], leaves[i]
        if not isinstance(leaf, MatrixView) or i in scales:
            continue
        if i not in known or jnp.shape(x) != leaf.low_rank_shape:
            raise ValueError(
                f"moments='{moments}' knows states with fields mu, nu or trace of the gradient's "
                f"shape; the inner optimizer keeps {jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(x)} for leaf '{leaf.path}'. Use moments='keep' with it"
            )


def carry_over(
    policy: str,
    inner_state: Any,
    next_state: NextState,
    where: Sites,
    old: Sequence[Stored],
    now: Projectors,
) -> tuple[Any, list[jax.Array] | None]:
    """Take the inner state over from the old projectors to the new ones.

    Args:
        policy: `keep`, `reset` or `rotate`.
        inner_state: the inner optimizer's state.
        next_state: its update at this step's gradient, from state to state.
        where: the projected leaves.
        old: their projectors at the last step.
        now: those of this step, and when they were made.

    Returns:
        The state to update from, and per leaf a factor of the leaf's batch shape on the
        update, or None for no factor.
    """
    if policy == "keep" or not where.views:
        return inner_state, None
    if policy == "rotate":
        return _rotate(inner_state, next_state, where, old, now), None
    inner_state = _reset(inner_state, where, now)
    ages = [now.count - step + 1 for step in now.refreshed]  # this step included
    return inner_state, _reset_correction(inner_state, next_state, where, ages)


def _rotate(inner_state, next_state, where: Sites, old, now: Projectors) -> Any:
    """Re-express the moments of matrices with a new basis in it."""

    def turn_node(node, decay):
        debias1, debias2 = (_debias(b, node) for b in decay)
        held = _Held(node, where)
        changes = zip(where.views, where.at, old, now.stored, now.renewed, strict=True)
        for view, at, p, q, renewed in changes:
            c = [
                None if a is None or b is None else contract(b, -2, a, -2)
                for a, b in zip(bases(view, p), bases(view, q), strict=True)
            ]
            before = held.at(at)
            wide = {k: v.astype(view.dtype) for k, v in before.items()}
            after = {k: _change_basis(c, wide[k]) for k in _FIRST if k in wide}
            if _SECOND in wide:
                mean = wide["mu"] / debias1 if "mu" in wide else jnp.zeros_like(wide[_SECOND])
                # What overflowed stays large: infinity less infinity would be NaN.
                most = jnp.finfo(view.dtype).max
                variance = jnp.minimum(wide[_SECOND] / debias2, most) - jnp.minimum(mean**2, most)
                squared = [None if x is None else x**2 for x in c]
                moved = _change_basis(squared, variance) + _change_basis(c, mean) ** 2
                after[_SECOND] = debias2 * jnp.abs(moved)
            for k, x in after.items():
                held.put(k, at, renewed, x.astype(before[k].dtype))
        return held.node()

    def turned():
        decays = _decay_rates(inner_state, next_state, where)
        return _map_nodes(lambda node: turn_node(node, next(decays)), inner_state)

    if now.possible is False:
        return inner_state
    return cond(now.possible, turned, lambda: inner_state)


def _reset(inner_state, where: Sites, now: Projectors) -> Any:
    """Zero the moments of matrices with a new basis."""

    def zero_node(node):
        held = _Held(node, where)
        for at, renewed in zip(where.at, now.renewed, strict=True):
            for k, x in held.at(at).items():
                held.put(k, at, renewed, jnp.zeros_like(x))
        return held.node()

    return _map_nodes(zero_node, inner_state)


def _reset_correction(inner_state, next_state, where: Sites, ages: Sequence[jax.Array]):
    """Factors that give updates from reset moments the bias correction of their own age.

    The inner optimizer corrects by its step count t, but a matrix reset k steps ago holds
    averages of k gradients. Adam's update is off by the factor
    `(1 - b1^t) / (1 - b1^k) * sqrt((1 - b2^k) / (1 - b2^t))`: steps up to six times too large.
    """
    factors: list[Any] = [None] * len(where.views)
    decays = _decay_rates(inner_state, next_state, where)
    for node in _nodes(inner_state):
        b1, b2 = next(decays)
        if b1 is None or b2 is None or "count" not in node._fields:
            continue
        t = node.count + 1
        held = [isinstance(x, jax.Array) for x in where.pick(_moment_trees(node)[_SECOND])]
        for i, age in enumerate(ages):
            k = jnp.minimum(age, t)
            first = debias(b1, t) / debias(b1, k)
            ours = first * jnp.sqrt(debias(b2, k) / debias(b2, t))
            if held[i]:
                factors[i] = ours if factors[i] is None else factors[i] * ours
    if all(f is None for f in factors):
        return None
    return [
        jnp.ones(view.batch) if f is None else f
        for view, f in zip(where.views, factors, strict=True)
    ]


class _Held:
    """The moments of a state by leaf, of which some may be 8-bit codes."""

    def __init__(self, node: Any, where: Sites):
        self.before, self.where = node, where
        self.fields = {k: where.flatten(v) for k, v in _moment_trees(node).items()}
        self.scales = {k: where.flatten(v) for k, v in _scale_trees(node).items()}

    def at(self, at: int) -> dict[str, jax.Array]:
        """The moments of a leaf, as numbers."""
        found = {k: v[at] for k, v in self.fields.items() if isinstance(v[at], jax.Array)}
        for k, x in found.items():
            if (scales := self._scales(k, at)) is not None:
                found[k] = decode(x, scales, DYNAMIC, x.shape)
        return found

    def put(self, name: str, at: int, renewed: jax.Array, new: jax.Array) -> None:
        """Replace a moment of the matrices that have a new basis."""

        def chosen(new, old):
            return jnp.where(renewed[..., None, None], new, old)

        codes, scales = self.fields[name][at], self._scales(name, at)
        if scales is None:
            self.fields[name][at] = chosen(new, codes)
            return
        made = encode(new, DYNAMIC)
        self.fields[name][at] = chosen(made.codes, codes)
        self.scales[name][at] = chosen(made.scales, scales)

    def node(self) -> Any:
        """The state with what was put."""
        fields = self.fields | {k + _SCALE: v for k, v in self.scales.items()}
        return self.before._replace(
            **{k: self.where.treedef.unflatten(v) for k, v in fields.items()}
        )

    def _scales(self, name: str, at: int) -> jax.Array | None:
        scales = self.scales[name][at] if name in self.scales else None
        return scales if isinstance(scales, jax.Array) else None


def _is_node(x: Any) -> bool:
    return hasattr(x, "_fields") and any(f in x._fields for f in (*_FIRST, _SECOND))


def _nodes(state: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(state, is_leaf=_is_node) if _is_node(x)]


def _map_nodes(fn: Callable[[Any], Any], state: Any) -> Any:
    return jax.tree.map(lambda x: fn(x) if _is_node(x) else x, state, is_leaf=_is_node)


def _moment_trees(node: Any) -> dict[str, Any]:
    return {k: getattr(node, k) for k in (*_FIRST, _SECOND) if k in node._fields}


def _scale_trees(node: Any) -> dict[str, Any]:
    """By moment its blocks' scales, where it is kept in 8 bits."""
    return {k: getattr(node, k + _SCALE) for k in _moment_trees(node) if k + _SCALE in node._fields}


def _change_basis(c: Sequence[jax.Array | None], x: jax.Array) -> jax.Array:
    """`C_in x C_out^T`, where C takes coordinates in the old basis to the new one."""
    c_in, c_out = c
    if c_in is not None:
        x = contract(c_in, -1, x, -2)
    if c_out is not None:
        x = contract(x, -1, c_out, -1)
    return x


def _decay_rates(inner_state, next_state, where: Sites) -> Iterator[Decay]:
    """Decay rates of each state's moments: d mu_next / d mu, d nu_next / d nu.

    The betas are closed over by the inner optimizer; shifting all moments by s and taking
    the derivative in s reads them off, schedules and traced hyperparameters included.
    """

    def probe(s):
        def shift(node):
            moved = {
                k: jax.tree.map(lambda x: x + s.astype(x.dtype), v)
                for k, v in _moment_trees(node).items()
            }
            return node._replace(**moved)

        out = []
        for node in _nodes(next_state(_map_nodes(shift, inner_state))):
            trees = _moment_trees(node)
            first = next((trees[k] for k in _FIRST if k in trees), None)
            out.append([_sample(x, where) for x in (first, trees.get(_SECOND))])
        return out

    # Away from zero, where roots have no derivative.
    _, rates = jax.jvp(probe, (jnp.ones([]),), (jnp.ones([]),))
    return (Decay(b1, b2) for b1, b2 in rates)


def _sample(tree: Any, where: Sites) -> jax.Array | None:
    """One number of the first projected leaf that the tree holds."""
    picked = () if tree is None else where.pick(tree)
    x = next((x for x in picked if isinstance(x, jax.Array)), None)
    return None if x is None else x.ravel()[0].astype(jnp.float32)


def _debias(rate: jax.Array | None, node: Any) -> jax.Array | float:
    """`1 - b^t` where the state counts its steps; guarded for the first step."""
    if rate is None or "count" not in node._fields:
        return 1.0
    weight = debias(rate, node.count)
    return jnp.where(weight > 0, weight, 1.0)
