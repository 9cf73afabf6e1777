"""The norm of a gradient that never exists as a whole.

Layer by layer a step has changed the first weights before it has seen the last gradient, so whether
a gradient is finite has to be known before. A number beside some weights, which the model does not
use, is given their gradient's square for a gradient of its own; the weights' own ends there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def watched(weights: Any, watch: jax.Array) -> Any:
    """The weights. `watch`, any scalar, has the sum of squares of their gradient for its own."""
    return weights


def _squares(_, gradient: Any) -> tuple[None, jax.Array]:
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradient)]
    return None, jnp.sum(jnp.stack(squares))


watched.defvjp(lambda weights, watch: (weights, None), _squares)


def value_and_norm(
    model_of: Callable[[dict], Any], params: dict, batch: Any, loss_of: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The mean loss of a batch, and the norm of its gradient, which is held a layer at a time.

    Args:
      model_of: from parameters to a model with `remat`.
      params: its parameters.
      batch: what the loss takes beside the model.
      loss_of: the loss of a model, a batch and a `watch` for its layers' weights.
    """
    blocks = params["blocks"]

    def loss_fn(watch: dict) -> jax.Array:
        others = {name: tree for name, tree in params.items() if name != "blocks"}
        others = jax.tree.map(lambda x: watched(x, watch["others"]), others)
        return loss_of(model_of({"blocks": blocks} | others), batch, watch["layers"])

    layers = jax.tree.leaves(blocks)[0].shape[0]
    loss, squares = jax.value_and_grad(loss_fn)(
        {"others": jnp.zeros([]), "layers": jnp.zeros(layers)}
    )
    return loss, jnp.sqrt(squares["others"] + jnp.sum(squares["layers"]))
