"""What a parameter becomes: its matrix view, the side that is projected, its rank.

`plan` looks at a tree of parameters once and gives each leaf a `Leaf` (projected) or a
reason why it stays as it is. Every other module works from that list, so the side of a
projection is decided here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import specs

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

# The paper projects attention and MLP matrices. Scales and biases of stacked layers are
# 2-D, (layers, features), but no matrices.
DEFAULT_EXCLUDE = (
    r"(?i)embed|(^|/)([^/]*norm(_?\d+)?|([^/]*_)?emb|"
    r"bias|scale|wte|wpe|vocab|(lm_?)?head|logits?(_?dense)?|score|classifier)(/|$)"
)

# Below this many numbers a leaf that stays unprojected is not worth a warning.
_LARGE = 2**16

Rank = int | float | Callable[[str, tuple[int, ...]], int | float]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A projected parameter seen as a stack of matrices.

    With `m` the product of the reduction axes, `n` of the output axes and `batch` the
    remaining ones, the matrix view is `batch + (m, n)`. For `x @ W` that is
    (inputs, outputs), as Flax stores kernels.
    """

    path: str
    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    side: str  # "in": P^T G with P (m, r). "out": G P with P (n, r). "both": two bases.
    rank: int
    dtype: Any  # dtype of the arithmetic and of low-rank arrays: at least float32

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return tuple(self.shape[a] for a in self.batch_axes)

    @property
    def m(self) -> int:
        """Rows of each matrix: inputs."""
        return math.prod(self.shape[a] for a in self.reduction_axes)

    @property
    def n(self) -> int:
        """Columns of each matrix: outputs."""
        return math.prod(self.shape[a] for a in self.output_axes)

    @property
    def projector_shape(self) -> tuple[int, ...]:
        """Shape of the stored basis; two-sided bases stand on top of each other."""
        rows = {"in": self.m, "out": self.n, "both": self.m + self.n}[self.side]
        return (*self.batch, rows, self.rank)

    @property
    def low_rank_shape(self) -> tuple[int, ...]:
        """Shape of the gradient in the subspace, and so of each moment."""
        r = self.rank
        return (
            *self.batch,
            *{"in": (r, self.n), "out": (self.m, r), "both": (r, r)}[self.side],
        )

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.reduction_axes + self.output_axes

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """View an array of the leaf's shape as `batch + (m, n)`."""
        if self._order != tuple(range(len(self.shape))):
            x = x.transpose(self._order)
        shape = (*self.batch, self.m, self.n)
        return x if x.shape == shape else x.reshape(shape)

    def from_matrix(self, x: jax.Array) -> jax.Array:
        """Undo `to_matrix`."""
        shape = tuple(self.shape[a] for a in self._order)
        x = x if x.shape == shape else x.reshape(shape)
        if self._order != tuple(range(len(self.shape))):
            x = x.transpose([self._order.index(a) for a in range(len(shape))])
        return x

    def matrix_at(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Take matrix number `index` (in the flattened batch) out of `x`, shape (m, n)."""
        for axis, i in zip(self.batch_axes, jnp.unravel_index(index, self.batch), strict=True):
            x = jax.lax.dynamic_slice_in_dim(x, i, 1, axis)
        return dataclasses.replace(self, shape=x.shape).to_matrix(x).reshape(self.m, self.n)

    @property
    def matrix(self) -> Leaf:
        """One of the stacked matrices, as (m, n)."""
        return dataclasses.replace(
            self, shape=(self.m, self.n), batch_axes=(), reduction_axes=(0,), output_axes=(1,)
        )

    @property
    def batch_leads(self) -> bool:
        """Whether the stacked axes come first, so that a scan takes them off one by one."""
        return self.batch_axes == tuple(range(len(self.batch_axes)))

    def below(self, axes: int) -> Leaf:
        """What is left of the leaf when scans have taken off its first `axes` stacked axes."""
        return dataclasses.replace(
            self,
            shape=self.shape[axes:],
            batch_axes=tuple(a - axes for a in self.batch_axes[axes:]),
            reduction_axes=tuple(a - axes for a in self.reduction_axes),
            output_axes=tuple(a - axes for a in self.output_axes),
        )


@dataclasses.dataclass(frozen=True)
class Unprojected:
    """A parameter that galore leaves alone, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str
    missed: bool = False  # would have been worth projecting, had there been a spec


Plan = list[Leaf | Unprojected]


class Sites(NamedTuple):
    """Where in a tree of parameters the projected leaves are."""

    treedef: Any
    at: list[int]  # their positions among the tree's leaves
    leaves: list[Leaf]

    def flatten(self, tree: Any) -> list[Any]:
        """All leaves of a tree like the parameters (MaskedNodes count as leaves)."""
        return self.treedef.flatten_up_to(tree)

    def pick(self, tree: Any) -> list[Any]:
        """The projected leaves of a tree like the parameters."""
        flat = self.flatten(tree)
        return [flat[i] for i in self.at]

    def put(self, low_rank: Iterable[Any], tree: Any) -> Any:
        """Replace the projected leaves of a tree like the parameters."""
        flat = list(self.flatten(tree))
        for i, x in zip(self.at, low_rank, strict=True):
            flat[i] = x
        return self.treedef.unflatten(flat)

    def only(self, values: Iterable[Any], tree: Any) -> Any:
        """The projected leaves of a tree like the parameters, and MaskedNodes elsewhere."""
        return self.put(values, jax.tree.map(lambda _: optax.MaskedNode(), tree))


def sites(plan: Plan, treedef: Any) -> Sites:
    """The projected leaves of a plan."""
    at = [i for i, leaf in enumerate(plan) if isinstance(leaf, Leaf)]
    return Sites(treedef, at, [leaf for leaf in plan if isinstance(leaf, Leaf)])


def bare(tree: Any) -> Any:
    """Take arrays out of the variables of Flax NNX.

    `nnx.Optimizer` calls `init` with variables and `update` with bare arrays; the state
    must not depend on which. A variable is known by its methods, so that the library need
    not import Flax; before 0.12 it had a `raw_value` and no `get_value`.
    """

    def is_variable(x):
        return hasattr(x, "get_metadata") and (hasattr(x, "get_value") or hasattr(x, "raw_value"))

    def value(x):
        return x.get_value() if hasattr(x, "get_value") else x.raw_value

    return jax.tree.map(lambda x: value(x) if is_variable(x) else x, tree, is_leaf=is_variable)


def owners(
    init: Callable[[optax.Params], optax.OptState], state: optax.OptState, params: optax.Params
) -> dict[int, int]:
    """Which parameter each array of an optimizer's state belongs to.

    Found as `optax.tree.map_params` does, by an init over placeholders, rather than by name: a
    parameter may be called `mu` or `count`.

    Returns:
        Positions of parameters by `id` of the state's arrays; absent for arrays of no leaf.
    """
    treedef = jax.tree.structure(params)
    positions = treedef.unflatten(range(treedef.num_leaves))
    found: dict[int, int] = {}
    optax.tree.map_params(
        init,
        lambda x, i: found.setdefault(id(x), i),
        state,
        positions,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return found


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
        _plan_leaf(specs.path_string(path), x, spec, rank, proj_type, excluded)
        for (path, x), spec in zip(leaves, found, strict=True)
    ]


def planner(
    rank: Rank, proj_type: str, exclude: str | None, weight_dimension_numbers: Any
) -> Callable[[optax.Params], Plan]:
    """Check the options that decide what is projected; `plan` with them filled in."""
    check_rank(rank)
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJ_TYPES)}, got {proj_type!r}")
    try:
        re.compile(exclude if exclude is not None else "")
    except (re.error, TypeError) as error:
        raise ValueError(
            f"exclude must be a regular expression or None, got {exclude!r}: {error}"
        ) from None
    return functools.partial(
        plan,
        rank=rank,
        proj_type=proj_type,
        exclude=exclude,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def warn_about(plan: Plan) -> None:
    """Warn when nothing is projected, or a large leaf is missed for want of a spec."""
    missed = [p for p in plan if isinstance(p, Unprojected) and p.missed]
    if missed:
        names = ", ".join(f"'{p.path}' {p.shape}" for p in missed[:3])
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        _warn(
            f"galore leaves {names}{more} unprojected: an array of three or more axes needs "
            "weight_dimension_numbers to say which axes form the matrix (for stacked layers: "
            "weight_dimension_numbers=galore_jax.last_two_axes)"
        )
    if plan and not any(isinstance(p, Leaf) for p in plan):
        reasons: dict[str, list[str]] = {}
        for p in plan:
            reasons.setdefault(p.reason, []).append(p.path)  # type: ignore[union-attr]
        text = "; ".join(f"{why} ({len(at)}, e.g. '{at[0]}')" for why, at in reasons.items())
        _warn(f"galore projects no leaf, so it saves no memory: {text}")


def _warn(message: str) -> None:
    # The caller of init is at no fixed depth below chain, masked, nnx.Optimizer, ...
    warnings.warn(message, UserWarning, stacklevel=2)


def _plan_leaf(path, x, spec, rank, proj_type, excluded) -> Leaf | Unprojected:
    shape = jnp.shape(x)
    if math.prod(shape) == 0:
        return Unprojected(path, shape, "empty")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return Unprojected(path, shape, f"{jnp.result_type(x)} is not a real floating dtype")
    if excluded is not None and excluded.search(path):
        return Unprojected(path, shape, "path matches exclude")
    if spec is None:
        missed = len(shape) >= 3 and math.prod(shape) >= _LARGE and min(shape[-2:]) > 1
        return Unprojected(path, shape, "not a matrix", missed)
    if isinstance(spec, specs.Skip):
        return Unprojected(path, shape, "weight_dimension_numbers is None")
    batch, reduction, output = specs.axes(path, shape, spec)
    leaf = Leaf(path, shape, batch, reduction, output, "in", 0, _float32_at_least(x))
    r = _rank(rank, path, shape, min(leaf.m, leaf.n))
    if min(leaf.m, leaf.n) <= r:
        return Unprojected(path, shape, f"smaller side {min(leaf.m, leaf.n)} <= rank {r}")
    return dataclasses.replace(leaf, side=_side(proj_type, leaf.m, leaf.n), rank=r)


def _float32_at_least(x) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


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


def _rank(rank: Rank, path: str, shape: tuple[int, ...], smaller: int) -> int:
    if callable(rank):
        rank = rank(path, shape)
        if callable(rank):
            raise TypeError(f"rank for leaf '{path}' must be a number, got {rank!r}")
        check_rank(rank, f" for leaf '{path}' {shape}")
    return max(1, int(rank * smaller)) if rank < 1 else int(rank)
