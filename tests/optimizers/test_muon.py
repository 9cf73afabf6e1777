"""`galore_muon` against its equations, and its Newton-Schulz iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.optimizers import muon
from galore_jax.optimizers.muon import orthogonalise
from tests.optimizers.equations import DECAY, GAP, RANK, RATE, by_matrix, check, check_svd, run
from tests.problems import normal


def galore_state(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, galore_jax.GaLoreState))
    return next(x for x in nodes if isinstance(x, galore_jax.GaLoreState))


def newton_schulz(x):
    """Its polynomials, on the singular values themselves."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / np.sum(values**8) ** (1 / 8)
    for a, b, c in (
        (8.2987, -24.4305, 18.0903),
        (3.9152, -2.9211, 0.5592),
        (3.1746, -2.3804, 0.4978),
        (2.1895, -1.5672, 0.4079),
    ):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def outside_like_momentum(m, r, rest, momentum):
    """What is outside of the subspace, its columns in momentum's size."""
    ratio = np.linalg.norm(m, axis=0) / np.linalg.norm(r, axis=0)
    return rest * np.minimum(ratio, 1 / (1 - momentum))


@pytest.mark.parametrize("nesterov", [True, False])
def test_galore_muon(nesterov):
    tx = galore_jax.galore_muon(
        RATE,
        0.9,
        DECAY,
        rank=RANK,
        update_proj_gap=GAP,
        method="svd",
        moments="keep",
        nesterov=nesterov,
        neuron_b2=None,
    )
    params, states = run(tx)
    projectors = [galore_state(s).projector for s in states]

    def muon(w, grads, projector, tall):
        b = 0.0
        for t, g in enumerate(grads):
            p = projector(t)
            if t % GAP == 0:
                check_svd(p, g)
            r = p.T @ g
            b = 0.9 * b + r
            m = r + 0.9 * b if nesterov else b
            m = p @ m + outside_like_momentum(m, r, g - p @ r, 0.9)
            shape = 1.0 if tall else np.sqrt(14 / 8)
            w = w - RATE * (shape * newton_schulz(m) + DECAY * w)
        return w

    check(params, by_matrix(muon, projectors))


def test_galore_muon_by_neuron():
    """NorMuon: outputs count alike over steps, and the update has Muon's norm."""
    options = dict(rank=RANK, update_proj_gap=GAP, method="svd", moments="keep")
    params, states = run(galore_jax.galore_muon(RATE, 0.9, DECAY, neuron_b2=0.9, **options))
    projectors = [galore_state(s).projector for s in states]

    def muon(w, grads, projector, tall):
        b, nu = 0.0, 0.0
        for t, g in enumerate(grads):
            p = projector(t)
            r = p.T @ g
            b = 0.9 * b + r
            m = r + 0.9 * b
            m = p @ m + outside_like_momentum(m, r, g - p @ r, 0.9)
            u = newton_schulz(m) * (1.0 if tall else np.sqrt(14 / 8))
            u = u.T if tall else u  # inputs first
            nu = 0.9 * nu + 0.1 * np.mean(u**2, axis=0)
            new = u / np.sqrt(nu / (1 - 0.9 ** (t + 1)))
            new *= np.linalg.norm(u) / np.linalg.norm(new)
            w = w - RATE * ((new.T if tall else new) + DECAY * w)
        return w

    check(params, by_matrix(muon, projectors))


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 12), st.integers(1, 40), st.integers(0, 99),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e12]), st.floats(0.0, 1.5),
)  # fmt: skip
def test_newton_schulz_by_singular_values(m, n, seed, size, decay):
    """At any scale; where they are within a factor of 200 of the largest they end close to one."""
    left, _, right = np.linalg.svd(normal(seed, m, n).astype(np.float64), full_matrices=False)
    values = np.exp(-decay * np.arange(min(m, n)))
    x = (left * values) @ right
    got = np.asarray(orthogonalise(jnp.asarray(size * x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, newton_schulz(x), atol=1e-3)
    found = np.linalg.svd(got, compute_uv=False)
    reached = values > 0.005 * np.sum(values**8) ** (1 / 8)
    assert np.all(found <= 1.09) and np.all(found[: np.sum(reached)] > 0.91)


def test_large_stacks_are_orthogonalised_part_by_part(monkeypatch):
    x = jnp.asarray(normal(0, 7, 2, 24, 40))
    want = orthogonalise(x)
    for together in (1, 3 * 24 * 40, 2**24):
        monkeypatch.setattr(muon, "_AT_ONCE", together)
        np.testing.assert_allclose(muon._orthogonalise_stack(x), want, atol=1e-4)
    step = jax.jit(muon._orthogonalise_stack)
    monkeypatch.setattr(muon, "_AT_ONCE", 24 * 40)
    stack = jnp.zeros((200, 24, 40))
    temporaries = step.lower(stack).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < stack.nbytes / 4


def test_newton_schulz_of_zeros_and_of_low_rank():
    np.testing.assert_array_equal(orthogonalise(jnp.zeros((2, 3, 4))), 0)
    x = np.outer(normal(0, 6), normal(1, 9))
    np.testing.assert_allclose(
        orthogonalise(jnp.asarray(x)), x / np.linalg.norm(x), rtol=0.1, atol=1e-3
    )
