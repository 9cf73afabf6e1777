"""The compiled training step, and exact evaluation."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import llama

State = dict  # params, opt_state, step: everything a step reads and writes.


def new_state(params: dict, tx: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return {"params": params, "opt_state": tx.init(params), "step": jnp.zeros([], jnp.int32)}


def make_train_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int = 1,
) -> Callable[[State, jax.Array], tuple[State, dict]]:
    """One optimizer step as one compiled function, its state updated in place.

    Args:
      graph: static part of the model, from `llama.create`.
      tx: the optimizer.
      schedule: the learning rate by step, only to report it.
      accumulate: number of equal microbatches a batch is cut into. Their gradients are averaged
        in float32, so the result is that of the whole batch, with a share of its activations.

    Returns:
      `train_step(state, tokens)` with tokens int32 (batch, seq_len + 1): the new state and the
      metrics of the step. `state` is donated: use the returned one.
    """

    def loss_fn(params: dict, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))

    def mean_gradient(params: dict, tokens: jax.Array) -> tuple[jax.Array, dict]:
        if accumulate == 1:
            return jax.value_and_grad(loss_fn)(params, tokens)

        def add(total, microbatch):
            part = jax.value_and_grad(loss_fn)(params, microbatch)
            return jax.tree.map(lambda t, p: t + p.astype(t.dtype) / accumulate, total, part), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        # Every accumulate-th row, so that a batch sharded over devices stays sharded.
        microbatches = jnp.stack([tokens[i::accumulate] for i in range(accumulate)])
        return jax.lax.scan(add, (jnp.zeros([]), zeros), microbatches)[0]

    def train_step(state: State, tokens: jax.Array) -> tuple[State, dict]:
        params, step = state["params"], state["step"]
        loss, grads = mean_gradient(params, tokens)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(step),
        }
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state, "step": step + 1}, metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(graph: nnx.GraphDef) -> Callable[..., jax.Array]:
    """`eval_step(params, tokens, mask)`: summed loss of the targets that count, by sequence."""

    @jax.jit
    def eval_step(params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        losses = llama.token_losses(nnx.merge(graph, params)(tokens[:, :-1]), tokens[:, 1:])
        return jnp.sum(jnp.where(mask, losses, 0.0), axis=-1)

    return eval_step


def evaluate(
    eval_step: Callable[..., jax.Array],
    params: dict,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
) -> dict[str, float]:
    """Loss per token and its exponential over (tokens, mask) batches.

    The sum of all token losses over the number of tokens: a mean of batch means would give the
    tokens of a short last batch more weight.
    """
    total, count = 0.0, 0
    for tokens, mask in batches:
        # Summed in float64 beyond a sequence: millions of float32 terms would lose digits.
        total += float(np.sum(np.asarray(eval_step(params, tokens, mask)), dtype=np.float64))
        count += int(mask.sum())
    loss = total / count
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"val_loss": loss, "val_perplexity": perplexity, "val_tokens": count}
