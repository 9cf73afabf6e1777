"""Where an optimizer's memory goes, leaf by leaf, before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.family.apollo import ApolloState
from galore_jax.family.ldadam import LDAdamState
from galore_jax.leaf import Leaf, owners, sites
from galore_jax.probes import Probe, Record, probe_all, recording
from galore_jax.projection import from_tree
from galore_jax.transform import GaLoreState


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of the parameters (or a total); sizes in bytes."""

    path: str
    shape: tuple[int, ...] | None
    side: str  # projected side and rank, or why the leaf is not projected
    rank: int | None
    weights: int
    projector: int
    inner_state: int
    without_galore: int  # state of the same inner optimizer on the full leaf

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state: projector and inner state."""
        return self.projector + self.inner_state


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step holds at a time in one of the three ways to take it; bytes."""

    tier: str  # full, subspace or layerwise
    weights: int
    gradients: int
    state: int
    activations: int | None  # kept for the backward pass; None where no loss was given

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.state + (self.activations or 0)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` found. Printing it gives the table."""

    rows: tuple[Row, ...]
    total: Row
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        head = ("leaf", "shape", "side", "rank", "weights", "projector", "inner state", "full")
        text = _aligned([head, *(_cells(r) for r in (*self.rows, self.total))], left=3)
        rule = "-" * max(map(len, text))
        share = self.total.state / max(1, self.total.without_galore)
        note = (
            f"optimizer state {_bytes(self.total.state)} = {share:.1%} of the "
            f"{_bytes(self.total.without_galore)} that the same optimizer keeps without GaLore"
        )
        head = ("step", "weights", "gradients", "state", "activations", "total")
        steps = _aligned([head, *map(_step_cells, self.steps)], left=1)
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1], note, "", *steps])

    __repr__ = __str__


def summary(
    tx: optax.GradientTransformation,
    params: optax.Params,
    loss_fn: Callable[..., Any] | None = None,
    *args: Any,
) -> Summary:
    """Table of what `galore` projects and of the bytes it keeps.

    For the leaves that reach `galore` (or `scale_by_apollo`), and in total: shape, projected side
    (`in` for inputs, `out` for outputs) and rank, or why the leaf is not projected; bytes of the
    weights, of the projector and of the inner state; and `full`, the bytes that the same inner
    optimizer would keep without GaLore. What else the optimizer keeps, such as accumulated
    gradients or moments of leaves that go another way, is under `(other)`. It computes shapes
    alone, so a 7B model can be summarised on a laptop.

    Then an estimate of what a training step holds, for gradients in full (`jax.value_and_grad`),
    in the subspace (`galore_jax.value_and_grad`, where the optimizer allows it) and layer by layer
    (`galore_jax.value_and_update`, one layer's gradient at a time): weights, gradients,
    optimizer state and, with `loss_fn`, what the forward pass keeps for the backward pass. What
    a compiler adds for its work is not in it; `benchmarks/memory.py` sets both side by side.

    Args:
        tx: a transformation with `galore` in it: an alias, a chain, inside MultiSteps, ...
        params: the parameters, or their shapes from `jax.eval_shape`.
        loss_fn: `loss_fn(params, *args) -> loss`, for the estimate of activations.
        *args: its other arguments, a batch, or their shapes.

    Returns:
        A `Summary`: print it, or read `rows`, `total` and `steps` (bytes).

    Raises:
        ValueError: where `tx` holds no `galore`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> params = jax.eval_shape(lambda: {"kernel": jnp.zeros((512, 2048)),
        ...                                  "bias": jnp.zeros(2048)})
        >>> print(galore_jax.summary(galore_jax.galore_adamw(1e-3, rank=128), params))
        leaf     shape     side                  rank  weights  projector  inner state     full
        ---------------------------------------------------------------------------------------
        bias     2048      path matches exclude         8.0 KB        0 B      16.0 KB  16.0 KB
        kernel   512x2048  in                     128   4.0 MB   256.0 KB       2.0 MB   8.0 MB
        (other)            not per leaf                    0 B        0 B          8 B      4 B
        ---------------------------------------------------------------------------------------
        total                                           4.0 MB   256.0 KB       2.0 MB   8.0 MB
        optimizer state 2.3 MB = 28.3% of the 8.0 MB that the same optimizer keeps without GaLore
        <BLANKLINE>
        step       weights  gradients   state  activations    total
        full        4.0 MB     4.0 MB  2.3 MB            ?  10.3 MB
        subspace    4.0 MB     1.0 MB  2.3 MB            ?   7.3 MB
        layerwise   4.0 MB     4.0 MB  2.3 MB            ?  10.3 MB
    """
    with recording() as records:
        # A function of its own: JAX does not trace the same one twice, and nothing is recorded.
        state = jax.eval_shape(lambda p: tx.init(p), params)
    found = _instances((GaLoreState, ApolloState), state)
    if not records or not found:
        raise ValueError("summary: there is no galore in this transformation")
    rows, plans = [], []
    other = other_full = _nbytes(state) - _nbytes(found)
    # An error is kept because of the projection; accumulators and other leaves' moments are not.
    other_full -= sum(_nbytes(x.error) for x in _instances(LDAdamState, state))
    for galore_state in found:
        # States come in the order of the tree, records in that of the inits.
        record = next(r for r in records if _fits(r, galore_state))
        records.remove(record)
        more, rest, rest_full = _rows(record, galore_state)
        rows += more
        plans += [leaf for leaf in record.plan if isinstance(leaf, Leaf)]
        other += rest
        other_full += rest_full
    elsewhere = _nbytes(params) - sum(row.weights for row in rows)
    rows.append(Row("(other)", None, "not per leaf", None, elsewhere, 0, other, other_full))
    fields = ("weights", "projector", "inner_state", "without_galore")
    sums = {f: sum(getattr(r, f) for r in rows) for f in fields}
    total = Row("total", None, "", None, **sums)
    steps = _steps(rows, plans, state, params, loss_fn, args)
    if _needs_full_gradients(tx, params, state):
        steps = tuple(step for step in steps if step.tier != "subspace")
    return Summary(tuple(rows), total, steps)


def _needs_full_gradients(tx, params, state) -> bool:
    probes: list[Probe] = []
    jax.eval_shape(lambda p, s: probes.extend(probe_all(tx, p, s)), params, state)
    return any(probe.needs for probe in probes)


def _steps(rows, leaves: list[Leaf], state, params, loss_fn, args) -> tuple[Step, ...]:
    full = _nbytes(params)
    saved = None
    if loss_fn is not None:
        # The residuals of the backward pass, without the weights among them.
        backward = jax.eval_shape(
            lambda p, *a: jax.vjp(lambda p: loss_fn(p, *a), p)[1], params, *args
        )
        kept = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(backward))
        kept -= collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(params))
        saved = sum(math.prod(s) * d.itemsize * times for (s, d), times in kept.items())
    by_path = {row.path: row.weights for row in rows}
    projected = {leaf: by_path[leaf.path or "(params)"] for leaf in leaves}
    alone = full - sum(projected.values())  # embeddings, heads, norms
    low_rank = sum(math.prod(x.low_rank_shape) * jnp.dtype(x.dtype).itemsize for x in leaves)
    layer = sum(size // x.batch[0] if x.batch else size for x, size in projected.items())
    gradients = {"full": full, "subspace": alone + low_rank, "layerwise": alone + layer}
    kept = _nbytes(state)
    return tuple(Step(tier, full, g, kept, saved) for tier, g in gradients.items())


def _fits(record: Record, state: GaLoreState | ApolloState) -> bool:
    def shapes(tree):
        leaves, treedef = jax.tree.flatten(tree)
        return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]

    return shapes(jax.eval_shape(record.init, record.params)) == shapes(state)


def _rows(record: Record, state: GaLoreState | ApolloState) -> tuple[list[Row], int, int]:
    """Rows of one galore, and the bytes of its state that belong to no leaf."""
    init, params = record.inner.init, record.params
    inner, rest = _state_bytes(init, state.inner_state, params)
    full, rest_full = _state_bytes(init, jax.eval_shape(init, params), params)
    where = sites(record.plan, jax.tree.structure(params))
    redrawn = isinstance(state.projector, optax.EmptyState)  # never stored
    stored = {} if redrawn else dict(zip(where.at, from_tree(where, state.projector), strict=True))
    rows = []
    for i, (leaf, w) in enumerate(zip(record.plan, jax.tree.leaves(params), strict=True)):
        projected = isinstance(leaf, Leaf)
        rows.append(
            Row(
                path=leaf.path or "(params)",
                shape=leaf.shape,
                side=leaf.side if projected else leaf.reason,
                rank=leaf.rank if projected else None,
                weights=_nbytes(w),
                projector=_nbytes(stored.get(i)),
                inner_state=inner.get(i, 0),
                without_galore=full.get(i, 0),
            )
        )
    rest += _nbytes(state) - _nbytes((state.projector, state.inner_state))
    return rows, rest, rest_full


def _state_bytes(init: Any, state: Any, params: Any) -> tuple[dict[int, int], int]:
    owner, by_leaf, rest = owners(init, state, params), {}, 0
    for x in jax.tree.leaves(state):
        if id(x) in owner:
            at = owner[id(x)]
            by_leaf[at] = by_leaf.get(at, 0) + _nbytes(x)
        else:
            rest += _nbytes(x)
    return by_leaf, rest


def _instances(kind: Any, tree: Any) -> list[Any]:
    """The outermost states of a kind."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]


def _nbytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(jnp.shape(x)) * jnp.result_type(x).itemsize for x in leaves)


def _aligned(lines: list[tuple[str, ...]], left: int) -> list[str]:
    """Rows as text, the first columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _step_cells(step: Step) -> tuple[str, ...]:
    activations = "?" if step.activations is None else _bytes(step.activations)
    sizes = map(_bytes, (step.weights, step.gradients, step.state))
    return (step.tier, *sizes, activations, _bytes(step.total))


def _cells(row: Row) -> tuple[str, ...]:
    sizes = (row.weights, row.projector, row.inner_state, row.without_galore)
    shape = "" if row.shape is None else "x".join(map(str, row.shape)) or "scalar"
    rank = "" if row.rank is None else str(row.rank)
    return (row.path, shape, row.side, rank, *map(_bytes, sizes))


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1024 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")
