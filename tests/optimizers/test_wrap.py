"""What stands behind every optimizer of the family: decay and learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.optimizers.wrap import with_rate
from tests.problems import normal, params_like


def test_bfloat16_updates_are_decayed_and_scaled_in_float32():
    """One rounding, at the end; the state is that of Optax's chain."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_like({"w": (30, 20)}))
    u = jnp.asarray(normal(1, 30, 20), jnp.bfloat16)
    rate = optax.linear_schedule(0.3, 0.1, 4)
    tx = with_rate(optax.trace(0.9), rate, 0.01, None)
    links = optax.trace(0.9), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(rate)
    state = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(optax.chain(*links).init(params))
    got, state = tx.update({"w": u}, state, params)
    want = -0.3 * (np.float32(u) + np.float32(0.01) * np.float32(params["w"]))
    np.testing.assert_array_equal(got["w"], jnp.asarray(want, jnp.bfloat16))
    assert state[2].count == 1
