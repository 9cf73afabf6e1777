"""What these tests share: some data, an optimizer, loops of our own, and how near is near."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax

STEPS, TOLERANCE = 5, 1e-5
X = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32) * 0.8 ** np.arange(
    16, dtype=np.float32
)
Y = np.sin(X[:, :8])


def optimizer(**options):
    """A refresh at steps 0 and 3, clipping in front."""
    galore = galore_jax.galore(**dict(rank=4, update_proj_gap=3, method="svd") | options)
    return optax.chain(optax.clip_by_global_norm(1.0), galore, optax.adamw(1e-2, weight_decay=0.1))


def full_gradients(loss_fn, tx, params, *args):
    """Losses of the loop that everyone writes."""

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return _run(step, params, tx.init(params))


def in_the_subspace(loss_fn, tx, params, *args, apply_updates=optax.apply_updates):
    """Losses with gradients in the subspace."""

    @jax.jit
    def step(params, state):
        loss, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, *args)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state, loss

    return _run(step, params, tx.init(params))


def _run(step, params, state):
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses


def check_near(got, want):
    """Equal losses, and falling ones."""
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    assert want[-1] < want[0]


def mean_square(y):
    return jnp.mean((y - Y) ** 2)
