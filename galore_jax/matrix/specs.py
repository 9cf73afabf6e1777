"""Weight dimension numbers: which axes of an array are the matrix.

A spec is any object with `reduction_axis` and `output_axis`, as Optax's are. The remaining
axes are stacked matrices.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.layouts import refuse_scalar, stacked_vectors
from galore_jax.matrix.trees import bare, keys, path_string


def last_two_axes(params: optax.Params) -> Any:
    """Weight dimension numbers by a rule of thumb: the last two axes are the matrix.

    Leading axes are stacked layers, each with its own projector, as `nn.scan`,
    `nnx.vmap` and `jax.lax.scan` store them: `(layers, in, out)`. For attention kernels with heads
    on an axis of their own, and for convolutions, this is wrong: see `matrix_axes`.

    Args:
        params: tree of parameters (only shapes are read).

    Returns:
        A tree with `optax.contrib.GaLoreDimensionNumbers(-2, -1)` for each leaf of two or
        more axes that is no vector of stacked layers, and None elsewhere, for
        `weight_dimension_numbers=`.

    Raises:
        TypeError: for a scalar, as from `optax.inject_hyperparams`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> galore_jax.last_two_axes({"kernel": jnp.ones((3, 8, 16)), "bias": jnp.ones(16)})
        {'bias': None, 'kernel': GaLoreDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    refuse_scalar("last_two_axes", params)
    spec = optax.contrib.GaLoreDimensionNumbers(-2, -1)
    params = bare(params)
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        spec if jnp.ndim(x) >= 2 and not vector else None
        for x, vector in zip(leaves, stacked_vectors(params), strict=True)
    )


class Skip:
    """Stands for an explicit None in a spec tree: do not project."""


def _is_spec(x: Any) -> bool:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def specs(params: optax.Params, given: Any) -> Iterator[Any]:
    """One spec per leaf: an object with axes, None (no matrix) or Skip (told not to)."""
    # A tree may be callable, as an Equinox module is.
    is_function = callable(given) and jax.tree_util.all_leaves([given])
    tree = given(params) if is_function else given
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if tree is None:
        spec = optax.contrib.GaLoreDimensionNumbers()
        vectors = stacked_vectors(params)
        matrices = [jnp.ndim(x) == 2 and not v for (_, x), v in zip(leaves, vectors, strict=True)]
        return (spec if matrix else None for matrix in matrices)
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
        by_path[keys(path)] = spec
    unused = {path for path, spec in by_path.items() if _is_spec(spec)}
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked):
        at = keys(path)
        prefix = next((at[:i] for i in range(len(at), -1, -1) if at[:i] in by_path), None)
        unused -= {prefix}
        if _is_masked(x):
            continue
        if prefix is None:
            raise ValueError(
                f"weight_dimension_numbers has no entry for leaf '{path_string(path)}' "
                f"{jnp.shape(x)}; its tree must match the parameters (or be a prefix of them), "
                "with None for leaves to leave alone"
            )
        spec = by_path[prefix]
        found.append(spec if _is_spec(spec) else Skip())
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


def axes(path: str, shape: tuple[int, ...], spec: Any):
    """Normalise a spec's axes to (batch, reduction, output) tuples."""

    def normalise(name):
        axes = getattr(spec, name)
        try:
            axes = (axes,) if isinstance(axes, numbers.Integral) else tuple(axes)
            axes = tuple(map(operator.index, axes))
        except TypeError:
            raise TypeError(
                f"weight_dimension_numbers: {name} must be an int or ints, got {axes!r} for leaf "
                f"'{path}' of shape {shape}"
            ) from None
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
