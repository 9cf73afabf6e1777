"""Trajectories against galore-torch, the paper's code, on the same weights and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax.matrix.plan import plan
from galore_jax.projector.project import bases

torch = pytest.importorskip("torch", reason="needs the oracles extra")
galore_torch = pytest.importorskip("galore_torch", reason="needs the oracles extra")

pytestmark = pytest.mark.oracle

SIDES = ("std", "reverse_std", "left", "right", "full")
SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16)}  # (in, out)
STEPS, GAP, RANK, LR, DECAY = 30, 15, 4, 1e-2, 0.1


def gradients(seed=0):
    """Gradients with a clear spectrum, so that subspaces are well defined."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        yield {
            name: (rng.standard_normal((m, min(m, n))) * 0.5 ** np.arange(min(m, n))).astype(
                np.float32
            )
            @ rng.standard_normal((min(m, n), n)).astype(np.float32)
            for name, (m, n) in SHAPES.items()
        }


def weights(seed=1):
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


def run_ours(tx):
    """Train, keeping the projectors of every step."""
    params, projectors = jax.tree.map(jnp.asarray, weights()), []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grads in gradients():
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        projectors.append(jax.tree.map(np.asarray, state.projector))
    return params, projectors


def run_theirs(optimizer_class, proj_type, projectors, **kwargs):
    """Train with galore-torch, its singular vectors' signs set to ours at each refresh."""
    layers = {k: torch.nn.Parameter(torch.tensor(w.T.copy())) for k, w in weights().items()}
    group = dict(
        params=list(layers.values()),
        rank=RANK,
        update_proj_gap=GAP,
        scale=0.25,
        proj_type=proj_type,
    )
    optimizer = optimizer_class([group], **kwargs)
    leaves = {leaf.path: leaf for leaf in plan(weights(), rank=RANK, proj_type=proj_type)}
    step = 0

    class AlignedProjector(galore_torch.galore_projector.GaLoreProjector):
        def get_orthogonal_matrix(self, matrix, rank, type):
            found = super().get_orthogonal_matrix(matrix, rank, type)
            name = next(k for k, p in layers.items() if p.grad is matrix)
            p_in, p_out = bases(leaves[name], jnp.asarray(projectors[step][name]))
            if type == "full":
                left, right = found
                return [align(left.T, p_out).T, align(right, p_in)]
            return align(found, p_in) if type == "right" else align(found.T, p_out).T

    def align(rows, ours):
        signs = np.sign(np.sum(rows.numpy() * np.asarray(ours).T, axis=1, keepdims=True))
        return rows * torch.tensor(signs)

    for grads in gradients():
        for k, p in layers.items():
            p.grad = torch.tensor(grads[k].T.copy())
            state = optimizer.state[p]
            if "projector" not in state:
                state["projector"] = AlignedProjector(
                    RANK, update_proj_gap=GAP, scale=0.25, proj_type=proj_type
                )
                if optimizer_class.__name__ == "AdamW":
                    state["step"] = 0
        optimizer.step()
        step += 1
    return {k: p.detach().numpy().T for k, p in layers.items()}


def assert_same_weights(ours, theirs, tolerance):
    for k in SHAPES:
        moved = np.linalg.norm(np.asarray(ours[k]) - weights()[k])
        assert moved > 0.1  # a comparison of weights that hardly moved would show nothing
        assert np.linalg.norm(ours[k] - theirs[k]) / np.linalg.norm(theirs[k]) < tolerance, k


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("proj_type", SIDES)
def test_adamw(proj_type, method):
    eps = 1e-8  # small enough that correcting it for bias or not makes no difference
    ours, projectors = run_ours(
        galore_jax.galore_adamw(
            LR,
            eps=eps,
            weight_decay=DECAY,
            rank=RANK,
            update_proj_gap=GAP,
            proj_type=proj_type,
            method=method,
        )
    )
    theirs = run_theirs(
        galore_torch.GaLoreAdamW,
        proj_type,
        projectors,
        lr=LR,
        eps=eps,
        weight_decay=DECAY,
        no_deprecation_warning=True,
    )
    assert_same_weights(ours, theirs, 1e-3)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("proj_type", SIDES)
def test_adafactor(proj_type, momentum):
    ours, projectors = run_ours(
        galore_jax.galore_adafactor(
            0.05,
            min_dim_size_to_factor=1,
            momentum=momentum,
            rank=RANK,
            update_proj_gap=GAP,
            proj_type=proj_type,
        )
    )
    theirs = run_theirs(
        galore_torch.GaLoreAdafactor,
        proj_type,
        projectors,
        lr=0.05,
        beta1=momentum,
        relative_step=False,
    )
    assert_same_weights(ours, theirs, 1e-3)
