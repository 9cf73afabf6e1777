"""How an optimizer's state lies on a mesh, from how its parameters do.

What an array of the state is for follows from the plan, not from its shape: of a projector the
projected axis lies as the weight's, of moments the kept one, and the rank is never cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.matrix.trees import bare, owners, path_string, shapes
from galore_jax.matrix.view import MatrixView
from galore_jax.quantize import layout
from galore_jax.state import ask, is_state

# Smaller leaves are not worth the messages.
_WORTH_SPREADING = 2048

Names = tuple[str, ...]  # the mesh axes that an axis of an array is cut over


class Axes(NamedTuple):
    """The axes of an array of an optimizer's state."""

    shape: tuple[int, ...]  # of what it holds: scales of blocks go where the numbers go
    names: list[Names]  # those of the weight's axis that it is
    pieces: list[int]  # into how many equal parts it may be cut at most
    rows: int  # how many of them, the first ones, are stacked
    owner: int | None  # the parameter that it belongs to


class _Kind(NamedTuple):
    """What an array of the state may be, by axis."""

    shape: tuple[int, ...]
    names: tuple[Names | None, ...]  # None for the rank


def state_sharding(
    tx: optax.GradientTransformation, params: Any, shardings: Any, *, spread: bool = True
) -> Any:
    """How the state of an optimizer is to be sharded, given how its parameters are.

    With a weight of inputs and outputs, each cut over some axes of a mesh, a projector of its
    inputs is cut as they are, low-rank gradients and moments as its outputs, stacked axes as they
    are in the weight; of other leaves all state lies as the parameter. The rank is never cut, nor
    is a block of quantised numbers. Scalars are replicated. Hand the result to a jitted init, to
    the `out_shardings` of a step and to orbax::

        where = galore_jax.state_sharding(tx, params, shardings)
        opt_state = jax.jit(tx.init, out_shardings=where)(params)

    Without it a compiled init replicates its state: nothing that it computes depends on values
    of the parameters.

    Args:
        tx: any optimizer, with or without a `galore` in it.
        params: the parameters, or their shapes.
        shardings: a tree like them, or a prefix of one, of `NamedSharding`; or of
            `PartitionSpec` for the mesh of `jax.set_mesh`.
        spread: whether to cut leaves of 2,048 numbers and more over the mesh axes that are left
            over too, along stacked axes where they divide, else along the longest: a device then
            holds its share of the state on a mesh for data parallelism alone as well.

    Returns:
        A tree like `jax.eval_shape(tx.init, params)` of `NamedSharding`, or of `PartitionSpec`
        where those are given.

    Raises:
        TypeError: for shardings of another kind.
        ValueError: for `PartitionSpec` without a mesh, or of more axes than the leaf has.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> params = {"kernel": jnp.ones((64, 256))}
        >>> shardings = {"kernel": NamedSharding(mesh, P(None, "fsdp"))}
        >>> tx = galore_jax.galore_adamw(1e-3, rank=8)
        >>> where = galore_jax.state_sharding(tx, params, shardings, spread=False)
        >>> opt_state = jax.jit(tx.init, out_shardings=where)(params)
        >>> list(opt_state.inner_state[0].mu["kernel"].sharding.spec)
        [None, 'fsdp']

    References:
        Rajbhandari et al., `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020
    """
    like = shapes(bare(params))
    given, make, sizes = _read(shardings, like)
    parameters = jax.tree_util.tree_leaves_with_path(like)
    names = [
        _names(path_string(path), len(x.shape), spec)
        for (path, x), spec in zip(parameters, given, strict=True)
    ]
    return axes_of_state(tx, like, names, lambda axes: make(_spec(axes, sizes, spread)))


def axes_of_state(
    tx: optax.GradientTransformation,
    params: Any,
    names: list[list[Names]],
    place: Callable[[Axes], Any],
) -> Any:
    """What the axes of an optimizer's state are.

    Args:
        tx: the optimizer.
        params: the parameters' shapes, a tree of `jax.ShapeDtypeStruct`.
        names: by parameter and axis the names of its axes.
        place: what to make of the axes of an array of the state.

    Returns:
        A tree like the state of what was made.
    """
    state = jax.eval_shape(tx.init, params)
    leaves, state_def = jax.tree.flatten(state)
    owner, projectors = owners(tx.init, state, params), _projectors(state_def)
    views = {
        view.path: view for answer, *_ in ask(tx, params, state) for view in answer.where.views
    }
    parameters = jax.tree_util.tree_leaves_with_path(params)

    def one(i: int, x: jax.ShapeDtypeStruct) -> Any:
        if (mine := owner[i]) is None:
            return place(Axes(x.shape, [()] * len(x.shape), [1] * len(x.shape), 0, None))
        path, parameter = parameters[mine]
        view = views.get(path_string(path))
        kinds = _kinds(view, parameter.shape, names[mine], i in projectors)
        found = ((kind, pieces) for kind in kinds if (pieces := _pieces(x, kind)) is not None)
        kind, pieces = next(found, (_Kind(x.shape, ((),) * len(x.shape)), list(x.shape)))
        rows = 0 if view is None else len(view.batch)
        return place(Axes(kind.shape, [n or () for n in kind.names], pieces, rows, mine))

    return state_def.unflatten([one(i, x) for i, x in enumerate(leaves)])


def factor_specs(view: MatrixView, spec: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
    """How the projector and the low-rank gradient of a weight lie, given how it does."""
    names = _names(view.path, len(view.shape), spec)
    kinds = (next(_kinds(view, view.shape, names, projector)) for projector in (True, False))
    p, low_rank = (PartitionSpec(*(n or None for n in kind.names)) for kind in kinds)
    return p, low_rank


def _read(shardings: Any, params: Any) -> tuple[list[Any], Any, dict[str, int]]:
    """By leaf its spec; what makes a result of one; the sizes of the mesh's axes."""

    def is_leaf(x):
        return isinstance(x, NamedSharding | PartitionSpec) or x is None

    whole = jax.tree.map(
        lambda s, part: jax.tree.map(lambda _: s, part), bare(shardings), params, is_leaf=is_leaf
    )
    flat = jax.tree.leaves(whole, is_leaf=is_leaf)
    kinds = {type(s) for s in flat}
    if kinds == {NamedSharding}:
        mesh = flat[0].mesh
        return [s.spec for s in flat], lambda spec: NamedSharding(mesh, spec), dict(mesh.shape)
    if kinds != {PartitionSpec}:
        raise TypeError(
            "state_sharding: shardings must be a tree like params of NamedShardings, or of "
            f"PartitionSpecs, got {', '.join(sorted(k.__name__ for k in kinds))}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            "state_sharding: PartitionSpecs do not say on which mesh. Call it under "
            "jax.set_mesh(mesh), or give NamedShardings"
        )
    return flat, lambda spec: spec, dict(mesh.shape)


def _projectors(state_def: Any) -> set[int]:
    """Positions of the arrays of a state that hold projectors."""
    numbered = state_def.unflatten(range(state_def.num_leaves))
    states = filter(is_state, jax.tree.leaves(numbered, is_leaf=is_state))
    return {i for state in states for i in jax.tree.leaves(state.projector)}


def _names(path: str, ndim: int, spec: PartitionSpec) -> list[Names]:
    """By axis of a parameter the mesh axes that it is cut over."""
    if len(spec) > ndim:
        raise ValueError(f"state_sharding: leaf '{path}' has {ndim} axes, fewer than {spec}")
    entries = [*spec, *[None] * (ndim - len(spec))]
    return [
        (x,) if isinstance(x, str) else tuple(x) if isinstance(x, tuple) else () for x in entries
    ]


def _kinds(
    view: MatrixView | None, shape: tuple[int, ...], names: list[Names], projector: bool
) -> Iterator[_Kind]:
    """What an array of the state that belongs to a parameter may be, the likeliest first."""

    def joined(axes: Sequence[int]) -> Names:
        return tuple(itertools.chain.from_iterable(names[a] for a in axes))

    if view is not None:
        batch = [names[a] for a in view.batch_axes]
        rows, columns = joined(view.reduction_axes), joined(view.output_axes)
        if projector:
            side = {"in": rows, "out": columns, "both": ()}[view.side]
            yield _Kind(view.projector_shape, (*batch, side, None))
            yield _Kind((*view.batch, view.rank), (*batch, None))  # indices
            return
        kept = {"in": (None, columns), "out": (rows, None), "both": (None, None)}[view.side]
        low_rank = _Kind(view.low_rank_shape, (*batch, *kept))
        yield low_rank
        yield from _factors(low_rank)
        yield _Kind((*view.batch, view.m, view.n), (*batch, rows, columns))
        yield _Kind(view.batch, (None,) * len(batch))  # of which all devices ask
    parameter = _Kind(shape, tuple(names))
    yield parameter
    yield from _factors(parameter)


def _factors(kind: _Kind) -> Iterator[_Kind]:
    """Means over the last axis, or the last but one, as Adafactor keeps them."""
    for axis in (-1, -2):
        if len(kind.shape) >= 2:
            left = list(range(len(kind.shape)))
            del left[axis]
            yield _Kind(tuple(kind.shape[a] for a in left), tuple(kind.names[a] for a in left))


def _spec(axes: Axes, sizes: dict[str, int], spread: bool) -> PartitionSpec:
    """Where an array goes: as what it is, and what mesh axes are left over where they fit."""
    cut: list[list[str]] = [[] for _ in axes.shape]
    used: set[str] = set()

    def put(axis: int, name: str) -> None:
        parts = math.prod(sizes[a] for a in cut[axis]) * sizes[name]
        if name not in used and axes.pieces[axis] % parts == 0:
            cut[axis].append(name)
            used.add(name)

    for axis, names in enumerate(axes.names):
        for name in names:
            put(axis, name)
    if spread and math.prod(axes.shape) >= _WORTH_SPREADING:
        stacked, rest = range(axes.rows), range(axes.rows, len(axes.shape))
        order = [*stacked, *sorted(rest, key=lambda axis: -axes.shape[axis])]
        for name, axis in itertools.product(sizes, order):
            put(axis, name)
    return PartitionSpec(*(tuple(c) if len(c) > 1 else c[0] if c else None for c in cut))


def _pieces(x: jax.ShapeDtypeStruct, kind: _Kind) -> list[int] | None:
    """By axis into how many equal parts an array may be cut at most; None if it is another kind.

    Codes have the shape that they stand for, but for two in a byte along the rank; scales have the
    number of blocks for the axis of the blocks.
    """
    if len(x.shape) != len(kind.shape):
        return None
    pieces = [1 if names is None else n for n, names in zip(kind.shape, kind.names, strict=True)]
    is_codes = x.dtype in (jnp.uint8, jnp.int8)
    if not kind.shape or (x.shape == kind.shape and not is_codes):
        return pieces
    axis, count, length = layout(kind.shape)
    scales, packed = list(kind.shape), list(kind.shape)
    scales[axis] = count
    packed[-1] = -(-packed[-1] // 2)
    if list(x.shape) not in ([packed, list(kind.shape)] if is_codes else [scales]):
        return None
    if kind.names[axis] is not None:
        pieces[axis] = count if count * length == kind.shape[axis] else 1
    return pieces
