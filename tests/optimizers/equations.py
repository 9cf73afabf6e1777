"""What a member is held against: its paper's equations in numpy, for one matrix at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.problems import low_rank_gradient, params_like

RANK, GAP, STEPS, RATE, DECAY = 3, 4, 10, 0.02, 0.1
SHAPES = {"wide": (8, 14), "tall": (14, 8)}


def gradients(step):
    return {k: low_rank_gradient(100 * step + i, *s) for i, (k, s) in enumerate(SHAPES.items())}


def run(tx, steps=STEPS):
    """Weights after training, and the states along the way."""
    params = params_like(SHAPES)
    state, states = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(jax.tree.map(jnp.asarray, gradients(step)), state, params)
        params = optax.apply_updates(params, updates)
        states.append(state)
    return params, states


def by_matrix(fn, projectors):
    """Run `fn(weight, gradients, projector of a step)` on both shapes, inputs on the left."""
    out = {}
    for name, w in params_like(SHAPES).items():
        flip = name == "tall"  # whose outputs are projected
        wide = np.asarray(w, np.float64).T if flip else np.asarray(w, np.float64)
        grads = [gradients(t)[name].astype(np.float64) for t in range(STEPS)]
        grads = [g.T if flip else g for g in grads]
        new = fn(wide, grads, lambda t, k=name: np.asarray(projectors[t][k], np.float64), flip)
        out[name] = new.T if flip else new
    return out


def check(params, want, tolerance=1e-5):
    for name in SHAPES:
        np.testing.assert_allclose(params[name], want[name], atol=tolerance)


class Adam:
    """Adam's direction, in numpy."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.t, self.mu, self.nu = 0, 0.0, 0.0

    def __call__(self, g):
        self.t += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * g
        self.nu = self.b2 * self.nu + (1 - self.b2) * g**2
        return self.mu_hat / (np.sqrt(self.nu_hat) + self.eps)

    @property
    def mu_hat(self):
        return self.mu / (1 - self.b1**self.t) if self.t else self.mu

    @property
    def nu_hat(self):
        return self.nu / (1 - self.b2**self.t) if self.t else self.nu


def limited(update, last, gamma):
    """Fira's limiter: the update, and its norm for the next step."""
    norm = np.linalg.norm(update)
    if last is not None and norm > gamma * last:
        update = update * (gamma * last / norm)
    return update, np.linalg.norm(update)


def check_svd(p, gradient):
    """A projector is the gradient's leading singular vectors, to signs."""
    u = np.linalg.svd(gradient)[0][:, :RANK]
    np.testing.assert_allclose(p @ p.T, u @ u.T, atol=1e-4)
