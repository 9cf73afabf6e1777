"""The compiled training step, and exact evaluation."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import galore_jax
from examples import llama
from examples.watching import value_and_norm

# params, opt_state, step, skipped, skipped_in_a_row: everything a step reads and writes.
State = dict
# Where the gradients are: whole, in the subspace, or of one layer at a time.
Tier = Literal["full", "subspace", "layerwise"]
# From parameters to the model, as by `llama.from_graph`.
ModelOf = Callable[[dict], Any]
# From the model, a batch and perhaps a `watch` to the mean loss.
Loss = Callable[..., jax.Array]


def next_token_loss(
    model: llama.Llama, tokens: jax.Array, watch: jax.Array | None = None
) -> jax.Array:
    """The mean loss of tokens int32 (batch, seq_len + 1), each after those before it."""
    return jnp.mean(model.losses(tokens[:, :-1], tokens[:, 1:], watch))


def new_state(params: dict, tx: optax.GradientTransformation) -> State:
    """The state before the first step; on a mesh, under a `jit` that says where it is to lie."""
    counters = ("step", "skipped", "skipped_in_a_row")
    return {"params": params, "opt_state": tx.init(params)} | {
        name: jnp.zeros([], jnp.int32) for name in counters
    }


def make_train_step(
    model_of: ModelOf,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int = 1,
    *,
    tier: Tier = "full",
    clip: float | None = None,
    rounding_key: jax.Array | None = None,
    skip_nonfinite: bool = False,
    grad_norm: Literal["exact", "subspace"] = "exact",
    shardings: State | None = None,
    loss_of: Loss = next_token_loss,
) -> Callable[..., tuple[State, dict]]:
    """One optimizer step as one compiled function, its state updated in place.

    The state is the same in all tiers, and so is what they compute.

    Args:
      model_of: from parameters to the model; with `remat` for layerwise.
      tx: the optimizer.
      schedule: the learning rate by step, only to report it.
      accumulate: number of equal microbatches a batch is cut into; 1 for layerwise. Their
        gradients are averaged in float32, so the result is that of the whole batch, with a
        share of its activations. (In the subspace the first one alone decides new projectors.)
      tier: full gradients, gradients in the subspace, or layer by layer.
      clip: largest global norm of the gradient, for layerwise, where no link of `tx` can see it.
      rounding_key: rounds bfloat16 weights at random, with a key of its own for each step;
        without, they are rounded to nearest.
      skip_nonfinite: leaves weights and optimizer state as they are in a step whose loss or
        gradient is not finite, and counts it. Layer by layer that has to be known before, which
        takes a backward pass more, that of `clip`.
      grad_norm: what is measured of a gradient in the subspace, see `galore_jax.value_and_grad`.
      shardings: of the state, which it keeps; by default it is on one device.
      loss_of: the loss of a model and a batch.

    Returns:
      `train_step(state, batch)`, where the first axis of all arrays of a batch is its rows: the new
      state and the metrics of the step, of which layerwise has a `grad_norm` with `skip_nonfinite`
      alone. With `look=True`, which is another program, there are those of `galore_jax.metrics`
      among them, of which layerwise has what the states tell. `state` is donated: use the returned
      one.
    """

    def loss_fn(params: dict, batch: Any) -> jax.Array:
        return loss_of(model_of(params), batch)

    def full_gradient(params: dict, opt_state: Any, batch: Any) -> tuple[jax.Array, dict]:
        if accumulate == 1:
            return jax.value_and_grad(loss_fn)(params, batch)

        def add(total, microbatch):
            part = jax.value_and_grad(loss_fn)(params, microbatch)
            return jax.tree.map(lambda t, p: t + p.astype(t.dtype) / accumulate, total, part), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        # Every accumulate-th row, so that a batch sharded over devices stays sharded.
        microbatches = jax.tree.map(
            lambda x: jnp.stack([x[i::accumulate] for i in range(accumulate)]), batch
        )
        return jax.lax.scan(add, (jnp.zeros([]), zeros), microbatches)[0]

    def key_of(state: State) -> jax.Array | None:
        return None if rounding_key is None else jax.random.fold_in(rounding_key, state["step"])

    def whole_step(state: State, batch: Any, look: bool) -> tuple[jax.Array, Any, Any, dict]:
        params, opt_state = state["params"], state["opt_state"]
        gradient = full_gradient
        if tier == "subspace":
            gradient = galore_jax.value_and_grad(
                loss_fn, tx, microbatches=accumulate, norm=grad_norm
            )
        loss, grads = gradient(params, opt_state, batch)
        norm = optax.tree.norm(grads)

        def update(params: dict, opt_state: Any, grads: Any) -> tuple[Any, Any, dict]:
            updates, new = tx.update(grads, opt_state, params)
            seen = {"params": params, "updates": updates, "before": opt_state}
            figures = galore_jax.metrics(new, grads, tx, **seen) if look else {}
            return galore_jax.apply_updates(params, updates, key_of(state)), new, figures

        def leave(params: dict, opt_state: Any, grads: Any) -> tuple[Any, Any, dict]:
            *_, figures = jax.eval_shape(update, params, opt_state, grads)
            return params, opt_state, dict.fromkeys(figures, jnp.full([], jnp.nan))

        before = params, opt_state
        if not skip_nonfinite:
            params, opt_state, figures = update(*before, grads)
        elif tier == "full":
            # The last of a row of elementwise operations, which all are one and in place.
            finite = is_finite(loss, norm)
            *after, figures = update(*before, grads)
            params, opt_state = jax.tree.map(
                lambda a, b: jnp.where(finite, a, b), tuple(after), before
            )
        else:
            # Weights change layer by layer: a choice behind that would keep them twice.
            params, opt_state, figures = jax.lax.cond(
                is_finite(loss, norm), update, leave, *before, grads
            )
        return loss, params, opt_state, {"grad_norm": norm} | figures

    def layerwise_step(state: State, batch: Any, look: bool) -> tuple[jax.Array, Any, Any, dict]:
        loss, params, opt_state, measured = layer_by_layer(state, batch)
        if look:
            before = state["opt_state"]
            measured |= galore_jax.metrics(opt_state, None, tx, params=params, before=before)
        return loss, params, opt_state, measured

    def layer_by_layer(state: State, batch: Any) -> tuple[jax.Array, Any, Any, dict]:
        before, key = (state["params"], state["opt_state"]), key_of(state)
        if not skip_nonfinite:
            step = galore_jax.value_and_update(loss_fn, tx, clip_norm=clip)
            return *step(*before, batch, rounding_key=key), {}
        loss, norm = value_and_norm(model_of, state["params"], batch, loss_of)
        share = 1.0 if clip is None else jnp.where(norm < clip, 1.0, clip / norm)

        def update(params: dict, opt_state: Any) -> tuple[Any, Any]:
            step = galore_jax.value_and_update(lambda *args: share * loss_fn(*args), tx)
            return step(params, opt_state, batch, rounding_key=key)[1:]

        after = jax.lax.cond(is_finite(loss, norm), update, lambda *old: old, *before)
        return loss, *after, {"grad_norm": norm}

    def train_step(state: State, batch: Any, *, look: bool = False) -> tuple[State, dict]:
        one_step = layerwise_step if tier == "layerwise" else whole_step
        loss, params, opt_state, measured = one_step(state, batch, look)
        # The optimizer has not counted the steps that were skipped.
        rate = schedule(state["step"] - state["skipped"])
        metrics = {"loss": loss, "learning_rate": rate} | measured
        counts = {name: state[name] for name in ("skipped", "skipped_in_a_row")}
        if skip_nonfinite:
            skipped = 1 - is_finite(loss, measured["grad_norm"]).astype(jnp.int32)
            counts = {
                "skipped": state["skipped"] + skipped,
                "skipped_in_a_row": skipped * (state["skipped_in_a_row"] + 1),
            }
            metrics |= counts
        new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        return new | counts, metrics

    out = None if shardings is None else (shardings, None)
    return jax.jit(train_step, donate_argnums=0, static_argnames="look", out_shardings=out)


def looks(done: int, log_every: int, update_proj_gap: int) -> bool:
    """Whether a step behind so many is one to look at: one that is logged, or that refreshes."""
    return (done + 1) % log_every == 0 or done % update_proj_gap == 0


def logged(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step that say something: an overlap does not where nothing was refreshed."""

    def says(name: str) -> bool:
        what, _, leaf = name.partition("/")
        if what == "refreshed":
            return False
        return what != "subspace_overlap" or row[f"refreshed/{leaf}" if leaf else "refreshed"] > 0

    return {name: value for name, value in row.items() if says(name)}


def is_finite(loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Whether a step may be taken: the loss is a finite number, and the gradient's norm is."""
    return jnp.isfinite(loss) & jnp.isfinite(norm)


def make_eval_step(model_of: ModelOf) -> Callable[..., jax.Array]:
    """`eval_step(params, tokens, mask)`: summed loss of the targets that count, by sequence."""

    @jax.jit
    def eval_step(params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        losses = model_of(params).losses(tokens[:, :-1], tokens[:, 1:])
        return jnp.sum(jnp.where(mask, losses, 0.0), axis=-1)

    return eval_step


def evaluate(
    eval_step: Callable[..., jax.Array],
    params: dict,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    place: Callable[[np.ndarray], Any] = lambda rows: rows,
) -> dict[str, float]:
    """Loss per token and its exponential over (tokens, mask) batches.

    The sum of all token losses over the number of tokens: a mean of batch means would give the
    tokens of a short last batch more weight.
    """
    total, count = 0.0, 0
    for tokens, mask in batches:
        # Summed in float64 beyond a sequence: millions of float32 terms would lose digits.
        losses = eval_step(params, place(tokens), place(mask))
        losses = multihost_utils.process_allgather(losses, tiled=True)
        total += float(np.sum(losses, dtype=np.float64))
        count += int(mask.sum())
    loss = total / count
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"val_loss": loss, "val_perplexity": perplexity, "val_tokens": count}
