"""Training layer by layer: each layer's weights change as soon as its gradient is known.

The loss runs its blocks by `layerwise`; `value_and_update` differentiates it and updates the
stacked weights and optimizer state in place, in the reverse loop over layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.compiler import in_one_piece
from galore_jax.control import each_its_own, mean_over, names_of
from galore_jax.int8 import dequantize_weights, is_int8
from galore_jax.layers.alike import check_layers_alike
from galore_jax.layers.model import split
from galore_jax.layers.optimizer import in_parts
from galore_jax.matrix.trees import bare
from galore_jax.multiples import raised_in
from galore_jax.precision import wide


def value_and_update(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    clip_norm: float | None = None,
    refresh: bool = True,
    axis_name: str | Sequence[str] | None = None,
) -> Callable[..., tuple[Any, Any, Any]]:
    """One training step that never holds more than one layer's gradient.

    The loss runs its blocks through `galore_jax.layerwise`. A forward pass keeps the input of
    each block; a reverse loop then takes one layer at a time: recompute its activations,
    differentiate, update its slice of the weights and of the optimizer state where they lie.
    Embeddings, heads and norms are updated before and after. The result is that of::

        loss, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

    to rounding, and `opt_state` is the same, from `tx.init(params)`. Call it under a `jit` that
    donates params and opt_state, or nothing is in place.

    It works with every optimizer that treats leaves, and layers of a stacked leaf, separately; one
    that mixes them (global norms, trust ratios, block root mean squares) is refused when it is
    traced. Links that follow the loss, as `optax.contrib.reduce_on_plateau`, get it as
    `value`. For clipping by the global norm there is `clip_norm`.

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
        axis_name: under a `shard_map` the mapped axis, or axes, over which devices share a batch:
            the loss and each gradient, before it is used, are averaged over it. () where each
            device trains a model of its own.

    Returns:
        `f(params, opt_state, *args, rounding_key=None, **kwargs) -> (loss, params, opt_state)`,
        ((loss, aux), ...) with `has_aux`. Given a `rounding_key`, weights of bfloat16 and those in
        codes (`galore_jax.quantize_weights`, decoded a layer at a time) are rounded stochastically,
        as by `galore_jax.apply_updates`.

    Raises:
        ValueError: when called, for a loss without a `layerwise` or with several, for one whose
            parameters are not slices of `params`, for an optimizer that mixes leaves, and under a
            `shard_map` without `axis_name`.

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
        names = names_of(axis_name, "galore_jax.value_and_update", needed=True)
        reduced = functools.partial(mean_over, names=names)
        own = functools.partial(each_its_own, names=names)
        # Traced under a `jit`, and used for shapes alone: codes are decoded layer by layer.
        plain = dequantize_weights(params)
        model = split(lambda p: loss_fn(p, *args, **kwargs), own(plain), has_aux)
        try:
            optimizer = in_parts(tx, plain, opt_state, refresh, rounding_key)
        except Exception as error:  # whatever a link raises for what it does not expect
            if (name := raised_in(error)) is None:
                raise
            raise ValueError(
                f"value_and_update: '{name}' takes no part of the parameters alone ({error}). "
                "Use another link, or galore_jax.value_and_grad"
            ) from error
        # By position: in the parameters' leaves, in the state's.
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_int8)
        weights = dict(enumerate(leaves))
        state = dict(enumerate(jax.tree.leaves(opt_state)))
        rest = {i: weights[i] for i in model.rest}
        stack = {i: weights[i] for i in model.stacked}
        layers = weights[model.stacked[0]].shape[0]
        owned = optimizer.of(stack, state)
        optimizer.check_rows(owned, layers)
        check_layers_alike(tx, bare(plain), model.stacked, optimizer.paths)

        # Forward, keeping the blocks' inputs.
        rest = dequantize_weights(own(rest))
        x, before_vjp = jax.vjp(model.before, rest)
        block = model.block()
        x, inputs = jax.lax.scan(lambda x, p: (block(dequantize_weights(p), x), x), x, own(stack))
        loss, after_vjp, aux = jax.vjp(model.after, rest, x, has_aux=True)
        loss, seed = reduced(loss), jnp.ones_like(loss)

        def reverse(dx, stack, carry, visit):
            """From the last layer to the first, with the gradient of each."""

            def body(k, state):
                dx, stack, carry = state
                i = layers - 1 - k
                p, x = jax.tree.map(lambda a: _row(a, i), (stack, inputs))
                dp, dx = jax.vjp(block, dequantize_weights(own(p)), x)[1](dx)
                return visit(i, dp, dx, stack, carry)

            return jax.lax.fori_loop(0, layers, body, (dx, stack, carry))

        def gradient_norm():
            d_after, dx = after_vjp(seed)

            def visit(i, dp, dx, stack, squares):
                return dx, stack, squares + _sum_of_squares(reduced(dp))

            dx, _, squares = reverse(dx, stack, jnp.zeros([]), visit)
            d_rest = jax.tree.map(jnp.add, d_after, before_vjp(dx)[0])
            return jnp.sqrt(squares + _sum_of_squares(reduced(d_rest)))

        # The backward pass is linear in its seed.
        factor = jnp.ones([], loss.dtype)
        if clip_norm is not None:
            norm = gradient_norm()
            factor = jnp.where(norm < clip_norm, 1, clip_norm / norm).astype(loss.dtype)
        d_after, dx = after_vjp(factor * seed)

        # The output head, before the layers: its gradient need not outlive them.
        first = reduced({i: d_after[i] for i in model.rest if i not in model.used_before})
        done, _ = optimizer.step(first, weights, state, value=loss)
        dx, done = jax.lax.optimization_barrier((dx, done))

        # The layers, each updated where it lies.
        def visit(i, dp, dx, stack, owned):
            def update(weights, state, dp, dx):
                grads = {j: g[None] for j, g in reduced(dp).items()}
                given = state | {j: _slice(a, i) for j, a in fixed.items()}
                new_weights, new_state = optimizer.step(grads, weights, given, i, loss)[0]
                return (new_weights, {j: new_state[j] for j in state}), dx

            p, mine = jax.tree.map(lambda a: _slice(a, i), (stack, owned))
            new, dx = in_one_piece(
                update, loss, p, mine, dp, dx, otherwise=lambda p, mine, dp, dx: ((p, mine), dx)
            )
            put = functools.partial(_put_slice, index=i)
            return dx, *jax.tree.map(put, (stack, owned), new)

        # State that a step leaves alone, as projectors without a refresh, stays out of the loop:
        # carried, it would be copied.
        same = optimizer.unchanged(*jax.tree.map(lambda a: a[:1], (stack, owned)))
        fixed = {j: owned.pop(j) for j in same}
        dx, *done_layers = reverse(dx, stack, owned, visit)

        # Embeddings, when the gradient has come back to them.
        last = {i: g + d_after[i] for i, g in before_vjp(dx)[0].items() if i in model.used_before}
        done_last, shared = optimizer.step(reduced(last), weights, state, value=loss)
        for new_weights, new_state in (done, done_layers, done_last, ({}, shared)):
            weights |= new_weights
            state |= new_state
        params = treedef.unflatten(weights.values())
        opt_state = jax.tree.structure(opt_state).unflatten(state.values())
        return ((loss, aux) if has_aux else loss), params, opt_state

    return value_and_updated


def _sum_of_squares(tree: Any) -> jax.Array:
    """In float32 at least."""
    return sum((jnp.sum(jnp.square(wide(x))) for x in jax.tree.leaves(tree)), jnp.zeros([]))


def _row(a: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, i, keepdims=False)


def _slice(a: jax.Array, i: jax.Array) -> jax.Array:
    """Layer i of an array, its layer axis kept: axes are numbered as in the whole stack."""
    return jax.lax.dynamic_slice_in_dim(a, i, 1)


def _put_slice(a: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, new, index, 0)
