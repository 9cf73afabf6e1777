"""Which parameters are projected, on which side and to which rank.

`plan` looks at a tree of parameters once and gives each leaf a `MatrixView` (projected) or a
reason why it stays as it is. Every other module works from that list, so the side of a
projection is decided here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.matrix import specs
from galore_jax.matrix.layouts import LARGE
from galore_jax.matrix.trees import Sites, path_string
from galore_jax.matrix.view import MatrixView
from galore_jax.precision import wide_dtype
from galore_jax.warn import warn

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

# The paper projects attention and MLP matrices.
_HEADS = (
    r"([^/]*_)?head(_?\d+)?|(to_)?logits?(_?dense)?|score|classifier|predictions?|qa_outputs"
    r"|vocab_proj(ection)?|unembed(ding)?|embed_out"
)
_TABLES = (
    r"([^/]*_)?(embed(ding|der)?s?|embs?)(_?\d+)?|embed(ding)?_(tokens?|positions?|in|table)"
    r"|[^/]*embed_tokens?[^/]*|wte|wpe|vocab|positions?"
)
# Scales and biases of stacked layers are 2-D, (layers, features), but no matrices.
_VECTORS = r"[^/]*norm(_?\d+)?|ln(_[^/]*)?|([^/]*_)?(bias|scale)"
_LEAF = r"kernel|weights?|w|b|g|embeddings?|table|bias|scale|gamma|beta|offset|value"
# Of a head everything is one, of tables and norms what they hold themselves: a linear layer within
# is a matrix. `output` is a head where nothing is around it.
DEFAULT_EXCLUDE = (
    rf"(?i)(^|/)(({_HEADS})(/|$)|({_TABLES}|{_VECTORS})(/({_LEAF}))?$)"
    rf"|^(params/)?output(_layer|_proj(ection)?)?(/({_LEAF}))?$"
)

_SAY_AXES = (
    "weight_dimension_numbers says which axes form the matrix, galore_jax.matrix_axes for the "
    "layouts in use"
)
_LESS_RANK = "a share of that side, as rank=0.25, fits every matrix"

Rank = int | float | Callable[[str, tuple[int, ...]], int | float]


@dataclasses.dataclass(frozen=True)
class Unprojected:
    """A parameter that galore leaves alone, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str
    advice: str = ""  # for a large leaf: how it would be projected


Plan = list[MatrixView | Unprojected]


def plan(
    params: optax.Params,
    *,
    rank: Rank,
    proj_type: str = "std",
    exclude: str | None = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
) -> Plan:
    """Decide for each leaf of `params`, in flattening order, what becomes of it."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = specs.specs(params, weight_dimension_numbers)
    excluded = None if exclude is None else re.compile(exclude)
    return [
        _plan_leaf(path_string(path), x, spec, rank, proj_type, excluded)
        for (path, x), spec in zip(leaves, found, strict=True)
    ]


def sites(plan: Plan, treedef: Any) -> Sites:
    """Where the projected leaves of a plan are."""
    at = [i for i, leaf in enumerate(plan) if isinstance(leaf, MatrixView)]
    return Sites(treedef, at, tuple(plan[i] for i in at))  # type: ignore[arg-type]


def warn_about(plan: Plan) -> None:
    """Warn when nothing is projected, or large leaves are not that could be."""
    missed: dict[str, list[Unprojected]] = {}
    for p in plan:
        if isinstance(p, Unprojected) and p.advice:
            missed.setdefault(p.advice, []).append(p)
    parts = []
    for advice, leaves in missed.items():
        names = ", ".join(f"'{p.path}' {p.shape}" for p in leaves[:3])
        more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
        parts.append(f"{names}{more}: {leaves[0].reason}; {advice}")
    if plan and not any(isinstance(p, MatrixView) for p in plan):
        reasons: dict[str, list[str]] = {}
        for p in plan:
            reasons.setdefault(p.reason, []).append(p.path)  # type: ignore[union-attr]
        text = "; ".join(f"{why} ({len(at)}, e.g. '{at[0]}')" for why, at in reasons.items())
        warn(". ".join([f"galore projects no leaf, so it saves no memory: {text}", *parts]))
    elif parts:
        warn(". ".join(["galore leaves large arrays unprojected, with full moments", *parts]))


def _plan_leaf(path, x, spec, rank, proj_type, excluded) -> MatrixView | Unprojected:
    shape = jnp.shape(x)
    large = math.prod(shape) >= LARGE
    if math.prod(shape) == 0:
        return Unprojected(path, shape, "empty")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return Unprojected(path, shape, f"{jnp.result_type(x)} is not a real floating dtype")
    if excluded is not None and excluded.search(path):
        return Unprojected(path, shape, "path matches exclude")
    if spec is None:
        many = len(shape) >= 3 and large and min(shape[-2:]) > 1
        return Unprojected(path, shape, "not a matrix", _SAY_AXES if many else "")
    if isinstance(spec, specs.Skip):
        return Unprojected(path, shape, "weight_dimension_numbers is None")
    batch, reduction, output = specs.axes(path, shape, spec)
    view = MatrixView(path, shape, batch, reduction, output, "in", 0, wide_dtype(x))
    r = rank_of(rank, path, shape, min(view.m, view.n))
    if min(view.m, view.n) <= r:
        reason = f"smaller side {min(view.m, view.n)} <= rank {r}"
        return Unprojected(path, shape, reason, _LESS_RANK if large else "")
    return dataclasses.replace(view, side=_side(proj_type, view.m, view.n), rank=r)


def _side(proj_type: str, m: int, n: int) -> str:
    """Carry galore-torch's sides, named for weights (out, in), over to (in, out)."""
    smaller = "in" if m <= n else "out"
    larger = "out" if m <= n else "in"
    return {
        "std": smaller,
        "reverse_std": larger,
        "right": "in",
        "left": "out",
        "full": "both",
    }[proj_type]


def check_rank(rank: Any, where: str = "") -> None:
    """Raise unless `rank` is a positive int, a fraction in (0, 1) or a callable."""
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"rank{where} is a JAX array; it decides shapes, so it must be a Python number. "
            "Under optax.inject_hyperparams pass static_args=('rank',)"
        )
    good = callable(rank) or (
        not isinstance(rank, bool | np.bool_)
        and (
            (isinstance(rank, numbers.Integral) and int(rank) >= 1)
            or (isinstance(rank, float | np.floating) and 0 < rank < 1)
        )
    )
    if not good:
        error = ValueError if isinstance(rank, numbers.Real) else TypeError
        raise error(
            f"rank{where} must be a positive int, a fraction of the smaller side in (0, 1) or a "
            f"callable (path, shape) -> either, got {rank!r}"
        )


def rank_of(rank: Rank, path: str, shape: tuple[int, ...], smaller: int) -> int:
    """A rank as a number, for a matrix whose smaller side is known."""
    if callable(rank):
        rank = rank(path, shape)
        if callable(rank):
            raise TypeError(f"rank for leaf '{path}' must be a number, got {rank!r}")
        check_rank(rank, f" for leaf '{path}' {shape}")
    return max(1, int(rank * smaller)) if rank < 1 else int(rank)
