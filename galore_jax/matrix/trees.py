"""Trees like the parameters: paths, bare arrays, and the leaves that are projected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.int8 import dequantize_weights, is_int8
from galore_jax.matrix.view import MatrixView


def keys(path: Sequence[Any]) -> tuple[str, ...]:
    """A key path as strings, the same for dicts, dataclasses and NNX states."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_string(path: Sequence[Any]) -> str:
    """`layers/0/kernel` for a key path."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def is_boxed(x: Any) -> bool:
    """Whether a node is a variable of Flax NNX, or an array in a box of Linen, with metadata.

    Known by its methods, so that the library need not import Flax; before 0.12 a variable had a
    `raw_value` and no `get_value`.
    """
    if is_int8(x):
        return False
    variable = hasattr(x, "get_metadata") and (hasattr(x, "get_value") or hasattr(x, "raw_value"))
    return variable or (hasattr(x, "unbox") and hasattr(x, "replace_boxed"))


def bare(tree: Any) -> Any:
    """Arrays in the place of variables of Flax NNX, boxes of Linen and weights in codes.

    `nnx.Optimizer` calls `init` with variables and `update` with bare arrays; the state must not
    depend on which, nor a leaf's path on whether it is in a box.
    """
    return dequantize_weights(unboxed(tree))


def unboxed(tree: Any) -> Any:
    """Take what is in the variables of Flax NNX and the boxes of Linen out of them."""

    def value(x):
        if hasattr(x, "unbox"):
            # Not by `unbox`, which on a mesh constrains the array too.
            return x.value if hasattr(x, "value") else x.unbox()
        return x.get_value() if hasattr(x, "get_value") else x.raw_value

    return jax.tree.map(lambda x: value(x) if is_boxed(x) else x, tree, is_leaf=is_boxed)


def shapes(tree: Any) -> Any:
    """Shapes and dtypes of the arrays of a tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


class Sites(NamedTuple):
    """Where in a tree of parameters the projected leaves are."""

    treedef: Any
    at: list[int]  # their positions among the tree's leaves
    views: tuple[MatrixView, ...]

    def flatten(self, tree: Any) -> list[Any]:
        """All leaves of a tree like the parameters (MaskedNodes count as leaves)."""
        return self.treedef.flatten_up_to(tree)

    def pick(self, tree: Any) -> list[Any]:
        """The projected leaves of a tree like the parameters."""
        flat = self.flatten(tree)
        return [flat[i] for i in self.at]

    def put(
        self, values: Iterable[Any], tree: Any, others: Callable[[Any], Any] = lambda x: x
    ) -> Any:
        """Replace the projected leaves of a tree like the parameters, and change the others."""
        projected = dict(zip(self.at, values, strict=True))
        leaves = enumerate(self.flatten(tree))
        return self.treedef.unflatten(
            [projected[i] if i in projected else others(x) for i, x in leaves]
        )

    def only(self, values: Iterable[Any]) -> Any:
        """A tree with these for the projected leaves, and MaskedNodes elsewhere."""
        nothing = self.treedef.unflatten([None] * self.treedef.num_leaves)
        return self.put(values, nothing, lambda _: optax.MaskedNode())


def owners(
    init: Callable[[optax.Params], optax.OptState], state: optax.OptState, params: optax.Params
) -> list[int | None]:
    """Which parameter each array of an optimizer's state belongs to.

    Found as `optax.tree.map_params` does, by an init over placeholders, rather than by name: a
    parameter may be called `mu` or `count`.

    Returns:
        For each leaf of the state the position of its parameter, None where it has none.
    """
    treedef, state_def = jax.tree.structure(params), jax.tree.structure(state)
    found: list[int | None] = [None] * state_def.num_leaves

    def note(at: Any, parameter: int) -> None:
        if not isinstance(at, optax.MaskedNode):
            found[at] = parameter

    optax.tree.map_params(
        init,
        note,
        state_def.unflatten(range(state_def.num_leaves)),
        treedef.unflatten(range(treedef.num_leaves)),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return found
