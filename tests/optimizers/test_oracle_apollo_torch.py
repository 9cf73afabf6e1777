"""APOLLO against apollo-torch, its authors' code, on the same projectors and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax.matrix.plan import plan
from galore_jax.optimizers.apollo import _gaussian
from tests.problems import normal

torch = pytest.importorskip("torch", reason="needs the oracles extra")
apollo_torch = pytest.importorskip("apollo_torch", reason="needs the oracles extra")
random_projector = pytest.importorskip("apollo_torch.random_projector")

pytestmark = pytest.mark.oracle

SHAPES = {"square": (10, 10), "tall": (20, 12), "wide": (12, 20)}  # (in, out)
STEPS, GAP, RANK, RATE, DECAY = 20, 7, 4, 1e-2, 0.1


def gradients(step):
    return {k: normal(50 * step + i, *s) for i, (k, s) in enumerate(SHAPES.items())}


def weights():
    return {k: normal(i, *s) for i, (k, s) in enumerate(SHAPES.items())}


def without_bias_correction(b1=0.9, b2=0.999, eps=1e-12):
    def update(updates, state, params=None):
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[0], updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state[1], updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), (mu, nu)

    return optax.GradientTransformation(
        lambda params: (optax.tree.zeros_like(params), optax.tree.zeros_like(params)), update
    )


def run_ours(inner, rank, **options):
    tx = optax.chain(
        galore_jax.scale_by_apollo(inner, rank=rank, update_proj_gap=GAP, **options),
        optax.scale(-RATE),
    )
    params = jax.tree.map(jnp.asarray, weights())
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(jax.tree.map(jnp.asarray, gradients(step)), state, params)
        # Theirs decays the weights after the update.
        params = jax.tree.map(lambda w, u: (w + u) * (1 - RATE * DECAY), params, updates)
    return params


def run_theirs(monkeypatch, rank, **options):
    """Their projectors replaced by ours, which are as random."""
    leaves = plan({k: jnp.zeros(s) for k, s in SHAPES.items()}, rank=rank)

    def ours(self, gradient, proj_type):
        leaf = leaves[self.order - 1]
        p = np.array(_gaussian(leaf, jnp.int32(0), jnp.int32(self.draw)))
        self.draw += 1
        self.ortho_matrix = torch.tensor(p.T.copy() if proj_type == "right" else p)

    def created(self, *args, init=random_projector.GradientProjector.__init__, **kwargs):
        init(self, *args, **kwargs)
        self.order, self.draw = self.seed, 0

    monkeypatch.setattr(random_projector.GradientProjector, "__init__", created)
    monkeypatch.setattr(random_projector.GradientProjector, "update_ortho_matrix", ours)
    layers = {k: torch.nn.Parameter(torch.tensor(w.T.copy())) for k, w in sorted(weights().items())}
    group = dict(params=list(layers.values()), rank=rank, update_proj_gap=GAP, proj="random")
    group |= dict(proj_type="std", **options.pop("group"))
    optimizer = apollo_torch.APOLLOAdamW([group], lr=RATE, eps=1e-12, weight_decay=DECAY, **options)
    for step in range(STEPS):
        for k, layer in layers.items():
            layer.grad = torch.tensor(gradients(step)[k].T.copy())
        optimizer.step()
    return {k: layer.detach().numpy().T for k, layer in layers.items()}


@pytest.mark.parametrize(("granularity", "rank"), [("channel", RANK), ("tensor", 1)])
@pytest.mark.parametrize("limited", [True, False])
def test_trajectories(monkeypatch, granularity, rank, limited):
    group = {"scale": 4.0, "scale_type": granularity}
    if limited:  # their limiter looks at updates before Adam's bias is corrected
        inner, options = without_bias_correction(), {"correct_bias": False}
    else:
        inner, options = optax.scale_by_adam(eps=1e-12), {"disable_nl": True}
    want = run_theirs(monkeypatch, rank, group=group, **options)
    got = run_ours(inner, rank, granularity=granularity, scale=2.0, gamma=1.01 if limited else 1e9)
    start = weights()
    for k in SHAPES:
        moved = np.linalg.norm(want[k] - start[k])
        assert np.linalg.norm(got[k] - want[k]) < 1e-4 * moved, k
