"""A loss taken apart at its `layerwise`: what comes before the blocks, a block, what follows."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import dependence

Arrays = dict[int, Any]  # by position in a flattened tree
Block = Callable[[Any, Any], Any]


class _Call(NamedTuple):
    """The arguments of a `layerwise`."""

    block: Block
    params: Any
    x: Any


class _Reached(BaseException):
    """Leaves a loss at its `layerwise`; not an error, which a loss might handle."""


@dataclasses.dataclass
class _Visitor:
    """What to do at a `layerwise`: leave the loss there, or go on with `output`."""

    output: Any = None
    calls: list[_Call] = dataclasses.field(default_factory=list)


_visitor: contextvars.ContextVar[_Visitor | None] = contextvars.ContextVar(
    "galore_jax_visitor", default=None
)


def layerwise(block: Block, params: Any, x: Any) -> Any:
    """Run the stacked blocks of a model one after the other.

    The value of `x = block(p, x)` over the slices p of `params`, first to last, as by
    `jax.lax.scan`, with each block's activations recomputed in the backward pass
    (`jax.checkpoint`), so that a block's input is all that is kept. Inside
    `galore_jax.value_and_update` it marks the layers that are updated one by one.

    Args:
        block: `block(params of one layer, x) -> x`. It may close over what is not trained, such
            as positions and masks; parameters have to come by its argument.
        params: tree of arrays with a leading layer axis.
        x: array or tree, the input of the first block.

    Returns:
        The output of the last block.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> kernels = jnp.stack([2 * jnp.eye(4), 3 * jnp.eye(4)])
        >>> galore_jax.layerwise(lambda w, x: x @ w, kernels, jnp.ones(4))
        Array([6., 6., 6., 6.], dtype=float32)
    """
    visitor = _visitor.get()
    if visitor is not None:
        visitor.calls.append(_Call(block, params, x))
        if visitor.output is None:
            raise _Reached
        return visitor.output
    # A scan already keeps XLA from merging the recomputation with the forward pass.
    body = jax.checkpoint(lambda x, p: (block(p, x), None), prevent_cse=False)
    return jax.lax.scan(body, x, params)[0]


class Model(NamedTuple):
    """A loss, taken apart at its `layerwise`."""

    stacked: list[int]  # positions of the blocks' leaves among the parameters
    rest: list[int]  # and of all others
    used_before: set[int]  # those of the rest that the first block's input depends on
    before: Callable[[Arrays], Any]  # from the rest to the input of the first block
    block: Callable[[], Callable[[Arrays, Any], Any]]  # call it when `before` has been traced
    after: Callable[[Arrays, Any], Any]  # from the rest and the last output to (loss, aux)


def split(loss_fn: Callable[[Any], Any], params: Any, has_aux: bool) -> Model:
    """Take a loss of parameters alone apart at its `layerwise`."""
    leaves, treedef = jax.tree.flatten(params)
    found: list[_Call] = []

    def visiting(values, output):
        """Run the loss with these leaves; its value, and the `layerwise` that it came to."""
        flat = [values.get(i, x) for i, x in enumerate(leaves)]
        visitor = _Visitor(output)
        token = _visitor.set(visitor)
        try:
            return loss_fn(treedef.unflatten(flat)), visitor.calls
        except _Reached:
            return None, visitor.calls
        finally:
            _visitor.reset(token)

    jax.eval_shape(lambda: found.extend(visiting({}, None)[1]))
    if not found:
        raise ValueError(
            "value_and_update: the loss calls no galore_jax.layerwise, so there are no layers to "
            "update one by one. Run the blocks with it (and give the loss itself, not under "
            "another jit), or use galore_jax.value_and_grad"
        )
    position = {id(x): i for i, x in enumerate(leaves)}
    if len(position) < len(leaves):
        raise ValueError(
            "value_and_update: one array stands at two places in params; give each leaf its own "
            "(jnp.copy), or call the step under jax.jit"
        )
    blocks, block_def = jax.tree.flatten(found[0].params)
    stacked = [position.get(id(x), -1) for x in blocks]
    if -1 in stacked or not stacked:
        raise ValueError(
            "value_and_update: the parameters given to galore_jax.layerwise must be leaves of "
            "params as they are, stacked on a first axis; an array of shape "
            f"{jnp.shape(blocks[stacked.index(-1)]) if stacked else ()} is none of them (a cast, "
            "layers that were stacked inside the loss, or a loss under another jit?)"
        )
    rest = [i for i in range(len(leaves)) if i not in stacked]
    calls: list[_Call] = []

    def before(values):
        calls[:] = visiting(values, None)[1]
        return calls[0].x

    def block():
        run = calls[0].block
        return lambda p, x: run(block_def.unflatten([p[i] for i in stacked]), x)

    def after(values, x):
        value, visited = visiting(values, x)
        if len(visited) > 1:
            raise ValueError(
                "value_and_update: the loss calls galore_jax.layerwise more than once; update "
                "one stack layer by layer and run the others with jax.lax.scan"
            )
        return value if has_aux else (value, None)

    depends = dependence.trace(before, {i: leaves[i] for i in rest}).depends
    used_before = {rest[k] for k in dependence.used(depends)}
    return Model(stacked, rest, used_before, before, block, after)
