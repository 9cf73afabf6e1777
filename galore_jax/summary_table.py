"""Where an optimizer's memory goes, leaf by leaf, before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.int8 import dequantize_weights, is_int8
from galore_jax.layers.update import value_and_update
from galore_jax.matrix.trees import owners, path_string, unboxed
from galore_jax.matrix.view import MatrixView
from galore_jax.optimizers.ldadam import LDAdamState
from galore_jax.projector.storage import from_tree
from galore_jax.state import Answer, GaLoreState, Told, ask, in_multi_steps
from galore_jax.subspace.gradients import value_and_grad


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
        left = [row for row in self.rows if row.rank is None]
        weights, state = (
            sum(getattr(row, field) for row in left) / max(1, getattr(self.total, field))
            for field in ("weights", "state")
        )
        note = f"optimizer state {_bytes(self.total.state)}"
        if len(left) < len(self.rows):
            share = self.total.state / max(1, self.total.without_galore)
            note += (
                f" = {share:.1%} of the {_bytes(self.total.without_galore)} that the same "
                "optimizer keeps without GaLore"
                f"\nnot projected: {weights:.1%} of the weights, with {state:.1%} of the state"
            )
        else:
            note += f", {self.total.state / max(1, self.total.weights):.1%} of the weights' bytes"
        head = ("step", "weights", "gradients", "state", "activations", "total")
        steps = _aligned([head, *map(_step_cells, self.steps)], left=1)
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1], note, "", *steps])

    __repr__ = __str__

    def fits(self, gib: float) -> tuple[str, ...]:
        """The ways to take a step that a card of so many GiB has room for, by this estimate."""
        return tuple(step.tier for step in self.steps if step.total <= gib * 2**30)


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
    gradients or moments of leaves that go another way, is under `(other)`. An optimizer without
    either, such as `optax.adamw` or `muon8bit`, has rows of what it keeps for each leaf, and steps
    with full gradients alone. All of it is computed from shapes, so a 7B model can be summarised on
    a laptop.

    Then an estimate of what a training step holds, for gradients in full (`jax.value_and_grad`),
    in the subspace (`galore_jax.value_and_grad`) and layer by layer
    (`galore_jax.value_and_update`, one layer's gradient at a time): weights, gradients,
    optimizer state and, with `loss_fn`, what the forward pass keeps for the backward pass. A way
    that the optimizer does not allow is not listed; nor, with `loss_fn`, one that the model does
    not. What a compiler adds for its work is not in it: for LLaMA of 60M to 7B, in all three ways,
    totals are from 14 % below to 1 % above the compiled step's on a CPU (`benchmarks/memory.py`).

    Args:
        tx: a transformation, with `galore` in it or not: an alias, a chain, inside MultiSteps, ...
        params: the parameters, or their shapes from `jax.eval_shape`.
        loss_fn: `loss_fn(params, *args) -> loss`, for the estimate of activations.
        *args: its other arguments, a batch, or their shapes.

    Returns:
        A `Summary`: print it, read `rows`, `total` and `steps` (bytes), or ask which ways to take
        a step fit into a card, `summary(...).fits(16)` for one of 16 GiB.

    Raises:
        ValueError: where the update of `tx` does not reach a `galore` that it has a state of.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> params = jax.eval_shape(lambda: {"kernel": jnp.zeros((512, 2048)),
        ...                                  "bias": jnp.zeros(2048)})
        >>> print(galore_jax.summary(galore_jax.galore_adamw(1e-3, rank=128), params))
        leaf     shape     side                  rank  weights  projector  inner state     full
        ---------------------------------------------------------------------------------------
        bias     2048      path matches exclude         8.0 KB        0 B      16.0 KB  16.0 KB
        kernel   512x2048  in                     128   4.0 MB   256.0 KB       2.0 MB   8.0 MB
        (other)            not per leaf                    0 B        0 B         12 B      4 B
        ---------------------------------------------------------------------------------------
        total                                           4.0 MB   256.0 KB       2.0 MB   8.0 MB
        optimizer state 2.3 MB = 28.3% of the 8.0 MB that the same optimizer keeps without GaLore
        not projected: 0.2% of the weights, with 0.7% of the state
        <BLANKLINE>
        step       weights  gradients   state  activations    total
        full        4.0 MB     4.0 MB  2.3 MB            ?  10.3 MB
        subspace    4.0 MB     1.0 MB  2.3 MB            ?   7.3 MB
        layerwise   4.0 MB     4.0 MB  2.3 MB            ?  10.3 MB
    """
    with warnings.catch_warnings():  # the table says what init would warn of
        warnings.simplefilter("ignore", UserWarning)
        state = jax.eval_shape(lambda p: tx.init(dequantize_weights(p)), params)
    whole = jax.eval_shape(dequantize_weights, params)
    told = ask(tx, whole, state)
    rows = []
    other = other_full = _nbytes(state) - sum(_nbytes(galore.state) for galore in told)
    # An error is kept because of the projection; accumulators and other leaves' moments are not.
    other_full -= sum(_nbytes(x.error) for x in _instances(LDAdamState, state))
    for galore in told:
        more, rest, rest_full = _rows(galore.answer, galore.state)
        rows += more
        other += rest
        other_full += rest_full
    if not told:
        rows, other = _rows_without(tx, unboxed(whole))
        other_full = other
    steps = _steps(tx, rows, told, state, params, whole, loss_fn, args)
    spared = _spared(params)
    rows = [dataclasses.replace(r, weights=r.weights - spared.get(r.path, 0)) for r in rows]
    elsewhere = _nbytes(params) - sum(row.weights for row in rows)
    rows.append(Row("(other)", None, "not per leaf", None, elsewhere, 0, other, other_full))
    fields = ("weights", "projector", "inner_state", "without_galore")
    sums = {f: sum(getattr(r, f) for r in rows) for f in fields}
    total = Row("total", None, "", None, **sums)
    return Summary(tuple(rows), total, steps)


def _spared(params: optax.Params) -> dict[str, int]:
    """By path, the bytes that weights in codes take less than arrays would."""
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(params), is_leaf=is_int8)
    codes = ((path, x) for path, x in leaves if is_int8(x))
    return {path_string(p): _nbytes(jax.eval_shape(x.decoded)) - _nbytes(x) for p, x in codes}


def _steps(tx, rows, told: list[Told], state, given, params, loss_fn, args) -> tuple[Step, ...]:
    views = [view for galore in told for view in galore.answer.where.views]
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
    projected = {view: by_path[view.path or "(params)"] for view in views}
    alone = full - sum(projected.values())  # embeddings, heads, norms
    low_rank = sum(math.prod(x.low_rank_shape) * jnp.dtype(x.dtype).itemsize for x in views)
    layer = sum(size // x.batch[0] if x.batch else size for x, size in projected.items())
    gradients = {"full": full, "subspace": alone + low_rank, "layerwise": alone + layer}
    if not told or any(galore.answer.needs for galore in told) or in_multi_steps(state):
        del gradients["subspace"]
    if not told:  # which of its leaves are stacks of layers is not known
        del gradients["layerwise"]
    if any(map(is_int8, jax.tree.leaves(given, is_leaf=is_int8))):
        del gradients["full"]
    if loss_fn is not None:
        for tier, step in (("subspace", value_and_grad), ("layerwise", value_and_update)):
            if tier in gradients and not _is_taken(step(loss_fn, tx), given, state, *args):
                del gradients[tier]
    kept = _nbytes(state)
    weights = _nbytes(given)
    return tuple(Step(tier, weights, g, kept, saved) for tier, g in gradients.items())


def _is_taken(step: Callable[..., Any], *args: Any) -> bool:
    """Whether a way to take a step refuses nothing when it is traced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            jax.eval_shape(step, *args)
    except (TypeError, ValueError):
        return False
    return True


def _rows(answer: Answer, state: GaLoreState) -> tuple[list[Row], int, int]:
    """Rows of one galore, and the bytes of its state that belong to no leaf."""
    init, params, where = answer.inner.init, answer.params, answer.where
    inner, rest = _state_bytes(init, state.inner_state, params)
    full, rest_full = _state_bytes(init, jax.eval_shape(init, params), params)
    redrawn = isinstance(state.projector, optax.EmptyState)  # never stored
    stored = {} if redrawn else dict(zip(where.at, from_tree(where, state.projector), strict=True))
    rows = []
    for i, (leaf, w) in enumerate(zip(answer.plan, jax.tree.leaves(params), strict=True)):
        projected = isinstance(leaf, MatrixView)
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


def _rows_without(tx: Any, params: Any) -> tuple[list[Row], int]:
    """The same for an optimizer that has no galore in it."""

    def accumulates(x):
        return isinstance(x, optax.MultiStepsState)

    def init(params):  # but for accumulated gradients, which belong to no leaf in any table
        return jax.tree.map(
            lambda x: x._replace(acc_grads=()) if accumulates(x) else x,
            tx.init(params),
            is_leaf=accumulates,
        )

    kept, _ = _state_bytes(init, jax.eval_shape(init, params), params)
    rest = _nbytes(jax.eval_shape(tx.init, params)) - sum(kept.values())
    rows = []
    for i, (path, w) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name, size = path_string(path) or "(params)", kept.get(i, 0)
        rows.append(Row(name, w.shape, "no galore", None, _nbytes(w), 0, size, size))
    return rows, rest


def _state_bytes(init: Any, state: Any, params: Any) -> tuple[dict[int, int], int]:
    by_leaf, rest = {}, 0
    for owner, x in zip(owners(init, state, params), jax.tree.leaves(state), strict=True):
        if owner is None:
            rest += _nbytes(x)
        else:
            by_leaf[owner] = by_leaf.get(owner, 0) + _nbytes(x)
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
