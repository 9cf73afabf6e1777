"""What a parameter becomes: its matrix view, the side that is projected, its rank.

`plan` looks at a tree of parameters once and gives each leaf a `Leaf` (projected) or a
reason why it stays as it is. Every other module works from that list, so the side of a
projection is decided here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

# The paper projects attention and MLP matrices. Scales and biases of stacked layers are
# 2-D, (layers, features), but no matrices.
DEFAULT_EXCLUDE = r"(?i)embed|norm|(^|/)(bias|scale|wte|wpe|vocab|(lm_?)?head|logits?(_?dense)?|score|classifier)(/|$)"

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
        return tuple(self.shape[a] for a in self.batch_axes)

    @property
    def m(self) -> int:
        return math.prod(self.shape[a] for a in self.reduction_axes)

    @property
    def n(self) -> int:
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


@dataclasses.dataclass(frozen=True)
class Unprojected:
    """A parameter that galore leaves alone, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str
    missed: bool = False  # would have been worth projecting, had there been a spec


Plan = list[Leaf | Unprojected]


def last_two_axes(params: optax.Params) -> Any:
    """Weight dimension numbers for scanned models: the last two axes are the matrix.

    Leading axes are stacked layers, each with its own projector, as `nn.scan`,
    `nnx.vmap` and `jax.lax.scan` store them: `(layers, in, out)`.

    Args:
        params: tree of parameters (only shapes are read).

    Returns:
        A tree with `optax.contrib.GaLoreDimensionNumbers(-2, -1)` for each leaf of two or
        more axes and None elsewhere, for `weight_dimension_numbers=`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> galore_jax.last_two_axes({"kernel": jnp.ones((3, 8, 16)), "bias": jnp.ones(16)})
        {'bias': None, 'kernel': GaLoreDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    spec = optax.contrib.GaLoreDimensionNumbers(-2, -1)
    return jax.tree.map(lambda p: spec if jnp.ndim(p) >= 2 else None, params)


def bare(tree: Any) -> Any:
    """Take arrays out of the variables of Flax NNX.

    `nnx.Optimizer` calls `init` with variables and `update` with bare arrays; the state
    must not depend on which. A variable is known by its methods, so that the library need
    not import Flax.
    """

    def is_variable(x):
        return hasattr(x, "get_value") and hasattr(x, "get_metadata")

    return jax.tree.map(
        lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable
    )


def path_string(path: Sequence[Any]) -> str:
    """`layers/0/kernel` for a key path."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def owner(path: Sequence[Any], names: dict[tuple[str, ...], int]) -> int | None:
    """Which parameter an array of an optimizer state belongs to, by the end of its path."""
    keys = _keys(path)
    return next((names[keys[i:]] for i in range(len(keys) + 1) if keys[i:] in names), None)


def owners(params: optax.Params) -> dict[tuple[str, ...], int]:
    """Position of each parameter by its path, for `owner`."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {_keys(path): i for i, (path, _) in enumerate(paths)}


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
    specs = _specs(params, weight_dimension_numbers)
    excluded = re.compile(exclude) if exclude is not None else None
    return [
        _plan_leaf(path_string(path), x, spec, rank, proj_type, excluded)
        for (path, x), spec in zip(leaves, specs, strict=True)
    ]


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
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return Unprojected(path, shape, f"{jnp.result_type(x)} is not a real floating dtype")
    if excluded is not None and excluded.search(path):
        return Unprojected(path, shape, "path matches exclude")
    if spec is None:
        missed = len(shape) >= 3 and math.prod(shape) >= _LARGE and min(shape[-2:]) > 1
        return Unprojected(path, shape, "not a matrix", missed)
    if isinstance(spec, _Skip):
        return Unprojected(path, shape, "weight_dimension_numbers is None")
    batch, reduction, output = _axes(path, shape, spec)
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
        not isinstance(rank, bool)
        and (
            (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank < 1)
        )
    )
    if not good:
        error = ValueError if isinstance(rank, (int, float)) else TypeError
        raise error(
            f"rank{where} must be a positive int, a fraction of the smaller side in (0, 1) or a "
            f"callable (path, shape) -> int, got {rank!r}"
        )


def _rank(rank: Rank, path: str, shape: tuple[int, ...], smaller: int) -> int:
    if callable(rank):
        rank = rank(path, shape)
        if callable(rank):
            raise TypeError(f"rank for leaf '{path}' must be a number, got {rank!r}")
        check_rank(rank, f" for leaf '{path}' {shape}")
    return max(1, int(rank * smaller)) if isinstance(rank, float) else rank


class _Skip:
    """Stands for an explicit None in a spec tree: do not project."""


def _is_spec(x: Any) -> bool:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _specs(params: optax.Params, given: Any) -> Iterator[Any]:
    """One spec per leaf: an object with axes, None (no matrix) or _Skip (told not to)."""
    tree = given(params) if callable(given) else given
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if tree is None:
        spec = optax.contrib.GaLoreDimensionNumbers()
        return (spec if jnp.ndim(x) == 2 else None for _, x in leaves)
    if _is_spec(tree):
        return (tree if jnp.ndim(x) >= 2 else None for _, x in leaves)
    # By path rather than by structure: under nnx.Optimizer the parameters arrive as an
    # nnx.State where the user wrote a dict, and masks put MaskedNodes in place of leaves.
    by_path: dict[tuple[str, ...], Any] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: x is None or _is_spec(x) or _is_masked(x)
    ):
        if not (spec is None or _is_spec(spec) or _is_masked(spec)):
            raise TypeError(
                "weight_dimension_numbers must hold objects with reduction_axis and output_axis "
                f"or None, got {spec!r} at '{path_string(path)}'"
            )
        by_path[_keys(path)] = spec
    unused = set(by_path)
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked):
        keys = _keys(path)
        prefix = next((keys[:i] for i in range(len(keys), -1, -1) if keys[:i] in by_path), None)
        unused.discard(prefix)  # type: ignore[arg-type]
        if _is_masked(x):
            continue
        if prefix is None:
            raise ValueError(
                f"weight_dimension_numbers has no entry for leaf '{path_string(path)}' "
                f"{jnp.shape(x)}; its tree must match the parameters (or be a prefix of them), "
                "with None for leaves to leave alone"
            )
        spec = by_path[prefix]
        found.append(spec if _is_spec(spec) else _Skip())
    # A subtree that holds no parameter (an empty dict, a masked branch) needs no match.
    if unused and leaves and not _has_masked(params):
        raise ValueError(
            "weight_dimension_numbers has entries that match no parameter: "
            + ", ".join(f"'{'/'.join(k)}'" for k in sorted(unused))
        )
    return iter(found)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _has_masked(tree: Any) -> bool:
    return any(map(_is_masked, jax.tree.leaves(tree, is_leaf=_is_masked)))


def _keys(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _axes(path: str, shape: tuple[int, ...], spec: Any):
    """Normalise a spec's axes to (batch, reduction, output) tuples."""

    def normalise(name):
        axes = getattr(spec, name)
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        for a in axes:
            if not -len(shape) <= a < len(shape):
                raise ValueError(
                    f"weight_dimension_numbers: {name} {a} is out of range for leaf '{path}' "
                    f"of shape {shape}"
                )
        return tuple(a % len(shape) for a in axes)

    reduction, output = normalise("reduction_axis"), normalise("output_axis")
    named = reduction + output
    if len(set(named)) < len(named) or not reduction or not output:
        raise ValueError(
            f"weight_dimension_numbers: reduction_axis {spec.reduction_axis} and output_axis "
            f"{spec.output_axis} must be disjoint and not empty, for leaf '{path}' of shape {shape}"
        )
    return tuple(a for a in range(len(shape)) if a not in named), reduction, output
