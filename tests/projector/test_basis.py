"""Every way to compute a projector gives an orthonormal basis of the leading directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_jax.projector.basis import METHODS, align_signs, at_step, methods

EXACT = ("svd", "eigh")


def matrix(rng, k, c, power=0.7):
    """A k by c matrix whose singular values fall as j^-power."""
    s = min(k, c)
    u = np.linalg.qr(rng.standard_normal((k, s)))[0]
    v = np.linalg.qr(rng.standard_normal((c, s)))[0]
    return (u * np.arange(1.0, s + 1) ** -power) @ v.T


def basis(name, a, rank, previous=None):
    previous = jnp.eye(a.shape[0], rank) if previous is None else previous
    return np.asarray(compiled(name, rank)(jnp.asarray(a), previous))


@functools.cache
def compiled(name, rank):
    return jax.jit(lambda a, previous: METHODS[name](a, rank, previous, lambda: jax.random.key(0)))


def energy(p, a):
    return np.sum((p.T @ a) ** 2)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_the_randomized_basis_has_the_derivative_of_the_exact_one(shape):
    rng = np.random.default_rng(0)
    a, da = matrix(rng, *shape, power=2), rng.standard_normal(shape)
    results = {}
    for name in ("eigh", "randomized"):

        def basis(a, name=name):
            p = METHODS[name](a, 4, jnp.zeros((shape[0], 4)), lambda: jax.random.key(0))
            return p @ p.T  # whatever the signs

        results[name] = jax.jvp(basis, (jnp.asarray(a),), (jnp.asarray(da),))
    for exact, found in zip(*results.values(), strict=True):
        np.testing.assert_allclose(found, exact, atol=2e-3 * np.max(np.abs(exact)))


def test_svd_is_orthonormal_where_the_decomposition_is_nearly_so(monkeypatch):
    a = matrix(np.random.default_rng(0), 30, 50).astype(np.float32)
    exact = np.linalg.svd(a)
    noise = 1e-4 * np.random.default_rng(1).standard_normal(exact[0].shape).astype(np.float32)
    monkeypatch.setattr(jnp.linalg, "svd", lambda *_, **__: (jnp.asarray(exact[0] + noise), 0, 0))
    p = np.asarray(METHODS["svd"](jnp.asarray(a), 8, jnp.zeros((30, 8)), lambda: jax.random.key(0)))
    np.testing.assert_allclose(p.T @ p, np.eye(8), atol=2e-6)
    np.testing.assert_allclose(p, exact[0][:, :8], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_orthonormal_for_all_shapes(name, data):
    k, c = data.draw(st.integers(2, 24)), data.draw(st.integers(2, 24))
    rank = data.draw(st.integers(1, min(k, c) - 1))
    a = matrix(np.random.default_rng(data.draw(st.integers(0, 99))), k, c).astype(np.float32)
    p = basis(name, a, rank)
    assert p.shape == (k, rank)
    np.testing.assert_allclose(p.T @ p, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (96, 96)])
@pytest.mark.parametrize(
    ("name", "least"), [("eigh", 0.99999), ("randomized", 0.999), ("subspace", 0.95)]
)
def test_captured_energy_against_numpys_svd(name, least, shape):
    a = matrix(np.random.default_rng(0), *shape).astype(np.float32)
    best = np.sum(np.linalg.svd(a.astype(np.float64), compute_uv=False)[:16] ** 2)
    rng = np.random.default_rng(1)
    warm = np.linalg.qr(np.linalg.svd(a)[0][:, :16] + 0.05 * rng.standard_normal((shape[0], 16)))[0]
    assert least < energy(basis(name, a, 16, jnp.asarray(warm, jnp.float32)), a) / best < 1.00001


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_give_numpys_singular_vectors(name):
    a = matrix(np.random.default_rng(3), 20, 30).astype(np.float32)
    ours, numpys = basis(name, a, 6), np.linalg.svd(a)[0][:, :6]
    np.testing.assert_allclose(np.abs(np.sum(ours * numpys, axis=0)), 1.0, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank_of_a", [0, 2])
def test_orthonormal_where_the_gradient_has_less_rank(name, rank_of_a):
    rng = np.random.default_rng(0)
    for k, c in ((12, 20), (20, 12)):
        a = rng.standard_normal((k, rank_of_a)) @ rng.standard_normal((rank_of_a, c))
        p = basis(name, a.astype(np.float32), 6)
        np.testing.assert_allclose(p.T @ p, np.eye(6), atol=1e-5)
        if rank_of_a and name in (*EXACT, "randomized", "subspace"):
            assert energy(p, a) > 0.999 * np.sum(a**2)


def test_subspace_iteration_converges_to_the_leading_subspace():
    a = matrix(np.random.default_rng(0), 40, 60, power=2.0).astype(np.float32)
    p = jnp.eye(40, 5)
    for _ in range(30):
        p = METHODS["subspace"](jnp.asarray(a), 5, p, lambda: None)
    u = np.linalg.svd(a)[0][:, :5]
    np.testing.assert_allclose(np.linalg.svd(u.T @ np.asarray(p))[1], 1.0, atol=1e-4)


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_aligned_signs_do_not_depend_on_the_signs_given(seed):
    rng = np.random.default_rng(seed)
    p = np.linalg.qr(rng.standard_normal((10, 4)))[0]
    previous = np.linalg.qr(rng.standard_normal((10, 4)))[0]
    flips = rng.choice([-1.0, 1.0], size=4)
    a = align_signs(jnp.asarray(p), jnp.asarray(previous))
    b = align_signs(jnp.asarray(p * flips), jnp.asarray(previous))
    np.testing.assert_allclose(a, b)
    np.testing.assert_allclose(np.abs(a), np.abs(p), rtol=1e-6)


def test_a_basis_keeps_the_signs_of_its_predecessor():
    rng = np.random.default_rng(0)
    previous = np.linalg.qr(rng.standard_normal((200, 8)))[0]
    p = np.linalg.qr(previous + 0.01 * rng.standard_normal((200, 8)))[0]
    aligned = align_signs(jnp.asarray(-p), jnp.asarray(previous))
    assert np.all(np.sum(np.asarray(aligned) * previous, axis=0) > 0.9)


def test_a_schedule_takes_each_method_from_its_step():
    a = jnp.asarray(matrix(np.random.default_rng(0), 8, 12).astype(np.float32))
    schedule = methods({5: "random", 0: "svd", 9: "eigh"})
    assert schedule == ((0, "svd"), (5, "random"), (9, "eigh"))
    for step, name in [(0, "svd"), (4, "svd"), (5, "random"), (8, "random"), (9, "eigh")]:
        args = a, 3, jnp.eye(8, 3), lambda: jax.random.key(0)
        got = jax.jit(lambda step, args=args: at_step(schedule, step)(*args))(step)
        np.testing.assert_allclose(got, METHODS[name](*args), atol=1e-5)


@pytest.mark.parametrize(
    ("given_methods", "message"),
    [
        ("pca", "method must be one of svd, .*, got 'pca'"),
        ({0: "svd", 5: "pca"}, "method must be one of .*, got 'pca'"),
        ({5: "svd"}, r"begins at step 0.*got \{5: 'svd'\}"),
        ({0: "svd", -1: "random"}, "ints >= 0, got -1"),
        ({0: "svd", 0.5: "random"}, "ints >= 0, got 0.5"),
    ],
)
def test_wrong_schedules_are_refused(given_methods, message):
    with pytest.raises(ValueError, match=message):
        methods(given_methods)
