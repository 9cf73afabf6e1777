"""`alice` against the one of `pytorch-optimizer`, from a common state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax
from tests.problems import normal

torch = pytest.importorskip("torch", reason="needs the oracles extra")
theirs = pytest.importorskip("pytorch_optimizer", reason="needs the oracles extra")

pytestmark = pytest.mark.oracle

M, N, RANK, GAP, RATE = 8, 14, 3, 6, 0.02
BETAS = (0.8, 0.9, 0.3)


@pytest.mark.parametrize("gamma", [1.01, 1e6])
def test_alice_is_theirs_up_to_the_first_exchange(gamma):
    """Which is to the same subspace, when all directions are leading ones."""
    start, basis = normal(0, M, N), np.linalg.qr(normal(1, M, RANK))[0]
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = theirs.Alice(
        [weight], RATE, BETAS, alpha=0.5, alpha_c=0.4, update_interval=GAP, rank=RANK, gamma=gamma,
        leading_basis=RANK,
    )  # fmt: skip
    zeros = {"Q": (RANK, RANK), "m": (RANK, N), "v": (RANK, N), "p": (N,), "phi": (1,)}
    optimizer.state[weight] = {k: torch.zeros(s) for k, s in zeros.items()}
    optimizer.state[weight]["U"] = torch.tensor(basis)

    tx = galore_jax.scale_by_alice(RANK, GAP, *BETAS, leading=1.0, gamma=gamma)
    params, update = jnp.asarray(start), jax.jit(tx.update)
    state = tx.init(params)._replace(count=1, basis=jnp.asarray(basis))  # they count from one
    for step in range(1, GAP + 1):
        g = normal(step + 1, M, N)
        updates, state = update(jnp.asarray(g), state)
        weight.grad = torch.tensor(g)
        optimizer.step()
        if step < GAP:  # whereupon the columns' signs are arbitrary
            params = params - 0.5 * RATE * updates
            np.testing.assert_allclose(params, weight.detach().numpy(), atol=2e-5)
    got, want = np.asarray(state.basis), optimizer.state[weight]["U"].numpy()
    assert not np.allclose(want @ want.T, basis @ basis.T, atol=0.1)
    np.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-4)
