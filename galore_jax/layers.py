"""Training layer by layer: each layer's weights change as soon as its gradient is known.

`layerwise` runs the blocks of a model; `value_and_update` differentiates a loss that uses it
and updates the stacked weights and optimizer state in place, in the reverse loop over layers.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import dependence
from galore_jax.ordering import reads_first
from galore_jax.parts import Arrays, in_parts

Block = Callable[[Any, Any], Any]


class _Call(NamedTuple):
    """The arguments of a `layerwise`."""

    block: Block
    params: Any
    x: Any


class _Reached(Exception):  # noqa: N818 (not an error)
    """Leaves a loss at its `layerwise`."""


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


def value_and_update(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    clip_norm: float | None = None,
    refresh: bool = True,
) -> Callable[..., tuple[Any, Any, Any]]:
    """One training step that never holds more than one layer's gradient.

    The loss runs its blocks through `galore_jax.layerwise`. A forward pass keeps the input of
    each block; a reverse loop then takes one layer at a time: recompute its activations,
    differentiate, update its slice of the weights and of the optimizer state where they lie.
    Embeddings, heads and norms are updated before and after. The result is that of

        loss, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

    to rounding, and `opt_state` is the same, from `tx.init(params)`. Call it under a `jit` that
    donates params and opt_state, or nothing is in place.

    It works with every optimizer that treats leaves separately; one that mixes them is refused
    when it is traced. For clipping by the global norm there is `clip_norm`. An optimizer that
    takes means over a leaf (trust ratios, Adafactor's clipping) sees each layer of a stacked leaf
    as a leaf, which nothing checks.

    Args:
        loss_fn: `loss_fn(params, *args, **kwargs) -> loss`, or (loss, aux) with `has_aux`; it
            calls `layerwise` once, not within another `jit`, `checkpoint` or `scan`, on a
            subtree of `params`. The block closes over no parameters.
        tx: the optimizer.
        has_aux: whether `loss_fn` returns something beside the loss.
        clip_norm: clip the gradient to this global norm, in place of an
            `optax.clip_by_global_norm` in `tx`. The norm is known only when the last layer is
            done, so the backward pass runs twice.
        refresh: whether projectors may be refreshed; False compiles a plain step, for the steps
            between 0, T, 2T, ...

    Returns:
        `f(params, opt_state, *args, rounding_key=None, **kwargs) -> (loss, params, opt_state)`,
        ((loss, aux), ...) with `has_aux`. Given a `rounding_key`, bfloat16 weights are rounded
        stochastically, as by `galore_jax.apply_updates`.

    Raises:
        ValueError: when called, for a loss without a `layerwise` or with several, for one whose
            parameters are not slices of `params`, and for an optimizer that mixes leaves.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> params = {"blocks": {"kernel": jnp.stack([jnp.eye(8, 8)] * 3)}, "head": jnp.ones(8)}
        >>> def loss_fn(params, x):
        ...     x = galore_jax.layerwise(lambda p, x: x + x @ p["kernel"], params["blocks"], x)
        ...     return jnp.mean((x @ params["head"] - 1) ** 2)
        >>> tx = galore_jax.galore_adamw(
        ...     0.01, rank=2, weight_dimension_numbers=galore_jax.last_two_axes)
        >>> step = jax.jit(galore_jax.value_and_update(loss_fn, tx), donate_argnums=(0, 1))
        >>> opt_state, x = tx.init(params), jax.random.normal(jax.random.key(0), (32, 8))
        >>> for _ in range(3):
        ...     loss, params, opt_state = step(params, opt_state, x)
        ...     print(f"{loss:.0f}")
        411
        394
        377

    References:
        Lv et al., `LOMO <https://arxiv.org/abs/2306.09782>`_, 2023; Zhao et al., `GaLore
        <https://arxiv.org/abs/2403.03507>`_, 2024, per-layer weight updates
    """
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm!r}")

    @functools.wraps(loss_fn)
    def value_and_updated(params, opt_state, *args, rounding_key=None, **kwargs):
        model = _split(lambda p: loss_fn(p, *args, **kwargs), params, has_aux)
        optimizer = in_parts(tx, params, opt_state, refresh, rounding_key)
        # By position: in the parameters' leaves, in the state's.
        weights = dict(enumerate(jax.tree.leaves(params)))
        state = dict(enumerate(jax.tree.leaves(opt_state)))
        rest = {i: weights[i] for i in model.rest}
        stack = {i: weights[i] for i in model.stacked}
        layers = jnp.shape(weights[model.stacked[0]])[0]

        # Forward, keeping the blocks' inputs.
        x, before_vjp = jax.vjp(model.before, rest)
        block = model.block()
        x, inputs = jax.lax.scan(lambda x, p: (block(p, x), x), x, stack)
        loss, after_vjp, aux = jax.vjp(model.after, rest, x, has_aux=True)

        def reverse(dx, stack, carry, visit):
            """From the last layer to the first, with the gradient of each."""

            def body(k, state):
                dx, stack, carry = state
                i = layers - 1 - k
                p, x = jax.tree.map(lambda a: _row(a, i), (stack, inputs))
                dp, dx = jax.vjp(block, p, x)[1](dx)
                return visit(i, dp, dx, stack, carry)

            return jax.lax.fori_loop(0, layers, body, (dx, stack, carry))

        def gradient_norm():
            d_after, dx = after_vjp(jnp.ones_like(loss))

            def visit(i, dp, dx, stack, squares):
                return dx, stack, squares + _sum_of_squares(dp)

            dx, _, squares = reverse(dx, stack, jnp.zeros([]), visit)
            d_rest = jax.tree.map(jnp.add, d_after, before_vjp(dx)[0])
            return jnp.sqrt(squares + _sum_of_squares(d_rest))

        # The backward pass is linear in its seed.
        seed = jnp.ones_like(loss)
        if clip_norm is not None:
            norm = gradient_norm()
            seed = jnp.where(norm < clip_norm, 1, clip_norm / norm).astype(loss.dtype)
        d_after, dx = after_vjp(seed)

        # The output head, before the layers: its gradient need not outlive them.
        first = {i: d_after[i] for i in model.rest if i not in model.used_before}
        done, _ = optimizer.step(first, weights, state)
        dx, done = jax.lax.optimization_barrier((dx, done))

        # The layers, each updated where it lies.
        def visit(i, dp, dx, stack, owned):
            def update(weights, state, dp, dx):
                grads = {j: g[None] for j, g in dp.items()}
                given = state | {j: _slice(a, i) for j, a in fixed.items()}
                new_weights, new_state = optimizer.step(grads, weights, given, layer=i)[0]
                return (new_weights, {j: new_state[j] for j in state}), dx

            p, mine = jax.tree.map(lambda a: _slice(a, i), (stack, owned))
            new, dx = reads_first(
                update, lambda p, mine, dp, dx: ((p, mine), dx), loss, p, mine, dp, dx
            )
            put = functools.partial(_put_slice, index=i)
            return dx, *jax.tree.map(put, (stack, owned), new)

        # State that a step leaves alone, as projectors without a refresh, stays out of the loop:
        # carried, it would be copied.
        owned = optimizer.of(stack, state)
        optimizer.check_rows(owned, layers)
        same = optimizer.unchanged(*jax.tree.map(lambda a: a[:1], (stack, owned)))
        fixed = {j: owned.pop(j) for j in same}
        dx, *done_layers = reverse(dx, stack, owned, visit)

        # Embeddings, when the gradient has come back to them.
        last = {i: g + d_after[i] for i, g in before_vjp(dx)[0].items() if i in model.used_before}
        done_last, shared = optimizer.step(last, weights, state)
        for new_weights, new_state in (done, done_layers, done_last, ({}, shared)):
            weights |= new_weights
            state |= new_state
        params = jax.tree.structure(params).unflatten(weights.values())
        opt_state = jax.tree.structure(opt_state).unflatten(state.values())
        return ((loss, aux) if has_aux else loss), params, opt_state

    return value_and_updated


class _Model(NamedTuple):
    """A loss, taken apart at its `layerwise`."""

    stacked: list[int]  # positions of the blocks' leaves among the parameters
    rest: list[int]  # and of all others
    used_before: set[int]  # those of the rest that the first block's input depends on
    before: Callable[[Arrays], Any]  # from the rest to the input of the first block
    block: Callable[[], Callable[[Arrays, Any], Any]]  # call it when `before` has been traced
    after: Callable[[Arrays, Any], Any]  # from the rest and the last output to (loss, aux)


def _split(loss_fn: Callable[[Any], Any], params: Any, has_aux: bool) -> _Model:
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
    return _Model(stacked, rest, used_before, before, block, after)


def _sum_of_squares(tree: Any) -> jax.Array:
    """In float32 at least."""
    wide = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(tree))
    return sum((jnp.sum(jnp.square(x)) for x in wide), jnp.zeros([]))


def _row(a: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, i, keepdims=False)


def _slice(a: jax.Array, i: jax.Array) -> jax.Array:
    """Layer i of an array, its layer axis kept: axes are numbered as in the whole stack."""
    return jax.lax.dynamic_slice_in_dim(a, i, 1)


def _put_slice(a: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, new, index, 0)
