"""Weight dimension numbers for the layouts in use, told by paths and shapes together.

A kernel of three or more axes may be a stack of matrices (layers, experts), one matrix with an axis
split in two (heads and their channels), or a convolution. Which of these it is, names and siblings
say; which axis is which, shapes. Where they do not, nothing is guessed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.trees import bare, keys, path_string
from galore_jax.warn import warn

# A leaf of so many numbers that stays unprojected is worth a warning.
LARGE = 2**16

# What has a number for each feature, however many axes layers and heads add.
_VECTOR = re.compile(r"(?i)^(b|g|gamma|beta|offset|.*(bias(es)?|scale|norm)(_?\d+)?|ln(_.*)?)$")
_NORM = re.compile(r"(?i)^(.*norm(alization)?(_?\d+)?|ln(_.*)?)$")
_BESIDE = re.compile(r"(?i)embed|wte|wpe|vocab|head")
_TABLE = re.compile(r"(?i)embedding(_?table)?$")
# Between the width of a model and heads of attention.
_ATTENTION = re.compile(
    r"(?i)(^|[/_])(w?(q|k|v|o|qkv|kv)|query|key|value|out(put)?|attn_vec)"
    r"(_?(proj(ection)?|einsum|kernel|dense|linear|[ab]))?(/|$)"
)
# Two or three matrices in one array.
_FUSED = re.compile(r"(?i)(^|[/_])(qkv|kv|gat(e|ing)|wi)")
# Of these what has more than two axes is one matrix for each expert.
_EXPERTS = re.compile(
    r"(?i)moe|expert|mlp|ffn|ffw|feed_?forward|(^|[/_])(gate|up|down|fc_?\d?)(_?proj)?(/|$)"
)
_CONVOLUTION = re.compile(r"(?i)conv|patch_?embed")


class _Leaf(NamedTuple):
    at: int | None  # its place among the tree's leaves; None for one that a mask has hidden
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]  # those that are not known to be stacks


def matrix_axes(
    params: optax.Params,
    *,
    stacked: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    r"""Weight dimension numbers for the layouts of JAX's model libraries.

    =============================================== ==========================
    leaf                                            its matrix
    =============================================== ==========================
    two axes                                        (in, out)
    stacked layers or experts                       one for each
    attention, (d, heads, c) or (heads, d, c)       d by heads c
    attention's output, (heads, c, d)               heads c by d
    two or three of them in one, as (2, d, f)       one for each
    convolution, (h, w, in, out) or (out, in, h, w) h w in by out
    biases, norms, scales, however stacked          none: they are vectors
    =============================================== ==========================

    Layers are found by what is beside a leaf: in a part of the tree that is stacked, as by
    `nn.scan`, `nnx.vmap`, Haiku's `layer_stack` or MaxText's scan axis, all leaves share the first
    or the second axis, and norms and biases have two. A large leaf that no rule knows is left
    alone, with a warning that says what to write.

    Args:
        params: tree of parameters (only paths, shapes and dtypes are read).
        stacked: regular expression, for paths as in `layers/attention/query/kernel`: these leaves
            have stacked layers along their first axis, whatever is beside them.
        overrides: from regular expressions for paths to what their leaves get: an object with
            `reduction_axis` and `output_axis`, or None for no matrix. The first match counts.

    Returns:
        A tree of `optax.contrib.GaLoreDimensionNumbers` and None, for `weight_dimension_numbers=`,
        which takes the function too.

    Raises:
        TypeError: for a scalar, as from `optax.inject_hyperparams`.
        ValueError: for an expression that matches no leaf.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> query, out = jnp.ones((512, 8, 64)), jnp.ones((8, 64, 512))
        >>> axes = galore_jax.matrix_axes({"query": {"kernel": query}, "out": {"kernel": out}})
        >>> axes["query"]["kernel"]
        GaLoreDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
        >>> axes["out"]["kernel"]
        GaLoreDimensionNumbers(reduction_axis=(0, 1), output_axis=(2,))
    """
    refuse_scalar("matrix_axes", params)
    params = bare(params)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [path_string(path) for path, _ in paths]
    given = _given(names, overrides or {})
    if stacked is not None:
        _must_match("stacked", stacked, names)
    found = {i: given.get(i) for i in range(len(names))}
    unknown = []
    for leaf in _without_stacks(_leaves(params)):
        at = leaf.at
        if at is None or at in given:
            continue
        name = names[at]
        if stacked is not None and re.search(stacked, name) and 0 in leaf.axes:
            leaf = leaf._replace(axes=tuple(a for a in leaf.axes if a != 0))
        # A single letter may be any matrix's name, or a bias's, which has lost its layers by now.
        vector = _is_vector(leaf) and len(leaf.keys[-1]) > 1
        if len(leaf.axes) < 2 or vector or (len(leaf.axes) > 2 and _TABLE.search(name)):
            continue
        matrix = _matrix(leaf)
        if matrix is not None:
            found[at] = optax.contrib.GaLoreDimensionNumbers(*matrix)
        elif math.prod(leaf.shape) >= LARGE:
            unknown.append(f"'{name}' {leaf.shape}")
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        warn(
            f"matrix_axes does not know which axes of {', '.join(unknown[:3])}{more} form the "
            "matrix, and leaves them alone. Say it: stacked='<expression for their paths>' where "
            "the first axis is that of layers, or overrides={'<expression>': "
            "optax.contrib.GaLoreDimensionNumbers(reduction_axis=..., output_axis=...)}, or None "
            "there for no matrix"
        )
    return treedef.unflatten(found.values())


def refuse_scalar(name: str, params: Any) -> None:
    """Raise where a rule for parameters is called as a schedule."""
    if isinstance(params, jax.Array) and params.ndim == 0:
        raise TypeError(
            f"{name} takes parameters and got a scalar. optax.inject_hyperparams takes "
            "callables for schedules: pass static_args=('rank', 'weight_dimension_numbers')"
        )


def stacked_vectors(params: optax.Params) -> list[bool]:
    """Which leaves are vectors of several layers, one on the other."""
    found = {x.at: len(x.axes) < 2 <= len(x.shape) for x in _without_stacks(_leaves(params))}
    return [found[i] for i in range(len(jax.tree.leaves(params)))]


def _leaves(params: optax.Params) -> list[_Leaf]:
    """All leaves, and those in whose place `optax.masked` and the like have put a MaskedNode."""

    def masked(x):
        return isinstance(x, optax.MaskedNode)

    found, places = [], itertools.count()
    for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=masked):
        shape = () if masked(x) else jnp.shape(x)
        # Haiku's keys are paths themselves.
        parts = (part for key in keys(path) for part in key.split("/") if part not in ("~", ""))
        at = None if masked(x) else next(places)
        found.append(_Leaf(at, tuple(parts) or ("",), shape, tuple(range(len(shape)))))
    return found


def _must_match(name: str, expression: str, paths: Sequence[str]) -> None:
    if paths and not any(re.search(expression, path) for path in paths):
        raise ValueError(
            f"matrix_axes: {name} {expression!r} matches no path; there are {', '.join(paths[:5])}"
            + (", ..." if len(paths) > 5 else "")
        )


def _given(paths: Sequence[str], overrides: Mapping[str, Any]) -> dict[int, Any]:
    """What the user says of leaves, by their place."""
    found = {}
    for expression, spec in reversed(list(overrides.items())):
        _must_match("overrides", expression, paths)
        found |= {i: spec for i, path in enumerate(paths) if re.search(expression, path)}
    return found


def _is_vector(leaf: _Leaf) -> bool:
    """Whether a leaf's name is that of a vector."""
    *_, parent, last = "", "", *leaf.keys
    return bool(_VECTOR.match(last) or _NORM.match(parent))


def _name(leaf: _Leaf) -> str:
    """The part of a path that says what a leaf is."""
    return "/".join(leaf.keys[-3:])


def _without_stacks(leaves: list[_Leaf], depth: int = 0) -> list[_Leaf]:
    """Take from leaves the axes that all in their part of the tree share."""
    while (place := _shared(leaves)) is not None:
        leaves = [x._replace(axes=x.axes[:place] + x.axes[place + 1 :]) for x in leaves]
    parts: dict[str | None, list[_Leaf]] = {}
    for leaf in leaves:
        parts.setdefault(leaf.keys[depth] if depth < len(leaf.keys) else None, []).append(leaf)
    alone = [x for x in parts.pop(None, []) if x.at is not None]
    return alone + [x for part in parts.values() for x in _without_stacks(part, depth + 1)]


def _shared(leaves: Sequence[_Leaf]) -> int | None:
    """The place of an axis that all leaves are stacked along: their first or second, or none."""
    if len({x.keys[:-1] for x in leaves}) == 1 and _ATTENTION.search("/".join(leaves[0].keys[-2:])):
        return None  # A bias of heads and channels is no stack of biases.
    there = [x for x in leaves if x.at is not None]
    vectors, kernels = ([x for x in leaves if _is_vector(x) is which] for which in (True, False))
    told = any(len(x.axes) == 2 for x in vectors)
    if any(x.at is None for x in vectors):  # Their names are left.
        modules = {x.keys[:-1] for x in there}
        told = told or (len(modules) > 1 and all(len(x.axes) > 2 for x in there))
    if not told or not any(len(x.axes) > 2 for x in kernels):
        return None
    for place in (0, 1):
        # The second of the two axes of an embedding beside the blocks is a model's width.
        if all(len(x.axes) > 1 + (place and bool(_BESIDE.search(x.keys[-1]))) for x in there) and (
            len({x.shape[x.axes[place]] for x in there}) == 1
        ):
            return place
    return None


def _matrix(leaf: _Leaf) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Reduction and output axes, None where they are not known."""
    axes, name = leaf.axes, _name(leaf)
    size = {a: leaf.shape[a] for a in axes}
    if len(axes) == 2:
        return axes[:1], axes[1:]
    if _FUSED.search(name) and size[axes[0]] in (2, 3):
        return _matrix(leaf._replace(axes=axes[1:]))
    if _CONVOLUTION.search(name) or (len(axes) == 4 and size[axes[0]] == size[axes[1]] <= 16):
        # Kernels of convolutions are smaller than their channels.
        before, after = (math.prod(size[a] for a in part) for part in (axes[:-2], axes[2:]))
        return (axes[:-1], axes[-1:]) if before <= after else (axes[1:], axes[:1])
    experts = _EXPERTS.search(name)
    if _FUSED.search(name) and size[axes[1]] in (2, 3) and not (experts and len(axes) > 3):
        return axes[:1], axes[1:]
    if experts:
        return axes[-2:-1], axes[-1:]
    if len(axes) > 3:
        return None
    widest = max(axes, key=size.__getitem__)
    if _ATTENTION.search(name) and sum(s == size[widest] for s in size.values()) == 1:
        others = tuple(a for a in axes if a != widest)
        return (others, (widest,)) if widest == max(axes) else ((widest,), others)
    return None
