"""Each member against its paper's equations, written out in numpy for one matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.optimizers import muon
from galore_jax.optimizers.muon import orthogonalise
from tests.problems import grads_like, low_rank_gradient, normal, params_like, train

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


@pytest.mark.parametrize("gamma", [1.01, 1e6])
def test_fira(gamma):
    tx = galore_jax.fira(
        RATE, weight_decay=DECAY, rank=RANK, gamma=gamma, update_proj_gap=GAP, method="svd"
    )
    params, states = run(tx)
    binds = []

    def fira(w, grads, projector, tall):
        del tall
        adam, last = Adam(), None
        for t, g in enumerate(grads):
            p = projector(t)
            if t % GAP == 0:
                check_svd(p, g)
            r = p.T @ g
            n = adam(r)
            phi = np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0)
            rest = phi * (g - p @ r)
            s, last_now = limited(rest, last, gamma)
            binds.append(last is not None and np.linalg.norm(rest) > gamma * last)
            last = last_now
            w = w - RATE * (0.25 * (p @ n + s) + DECAY * w)
        return w

    want = by_matrix(fira, [s[0].projector for s in states])
    check(params, want)
    assert any(binds) == (gamma < 2) and not all(binds)


def test_frugal_signs_what_is_outside():
    inner = optax.adamw(RATE, weight_decay=DECAY)
    tx = galore_jax.galore(
        inner, residual=optax.sign_sgd(0.003), rank=RANK, update_proj_gap=GAP, moments="reset"
    )
    params, states = run(tx, GAP)  # up to the first reset

    def frugal(w, grads, projector, tall):
        del tall
        adam = Adam()
        for t, g in enumerate(grads[:GAP]):
            p = projector(t)
            r = p.T @ g
            rest = g - p @ r
            w = w - RATE * (0.25 * p @ adam(r) + DECAY * w) - 0.003 * np.sign(rest)
        return w

    check(params, by_matrix(frugal, [s.projector for s in states]))


def gaussian(name, shape, layer, draw):
    """The projector APOLLO draws, which it does not keep."""
    from galore_jax.matrix.plan import plan
    from galore_jax.optimizers.apollo import _gaussian

    params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
    leaf = next(x for x in plan(params, rank=RANK) if x.path == name)
    return np.asarray(_gaussian(leaf, jnp.asarray(layer), jnp.asarray(draw)), np.float64)


@pytest.mark.parametrize("gamma", [1.01, 1e6])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo(granularity, gamma):
    tx = galore_jax.apollo(
        RATE, weight_decay=DECAY, rank=RANK, update_proj_gap=GAP, granularity=granularity,
        scale=1.5, gamma=gamma,
    )  # fmt: skip
    params, _ = run(tx)
    projectors = [
        {name: gaussian(name, SHAPES[name], 0, t // GAP) for name in SHAPES} for t in range(STEPS)
    ]
    assert not np.allclose(projectors[0]["wide"], projectors[GAP]["wide"])

    def apollo(w, grads, projector, tall):
        del tall
        adam, last = Adam(), None
        for t, g in enumerate(grads):
            p = projector(t)
            r = p.T @ g
            n = adam(r)
            axis = 0 if granularity == "channel" else None
            s = np.linalg.norm(n, axis=axis) / np.linalg.norm(r, axis=axis)
            u, last = limited(g * s, last, gamma)
            w = w - RATE * (1.5 * u + DECAY * w)
        return w

    check(params, by_matrix(apollo, projectors))


def test_apollos_random_projectors_are_gaussian_and_of_each_layer():
    draws = np.stack([gaussian("wide", SHAPES["wide"], layer, 0) for layer in range(200)])
    assert np.std(draws) == pytest.approx(RANK**-0.5, rel=0.05)
    assert len({d.tobytes() for d in draws}) == 200


def test_apollo_mini_is_apollo_of_rank_one():
    options = dict(rank=1, scale=128**0.5, granularity="tensor")
    want, _ = run(galore_jax.apollo(RATE, **options))
    got, states = run(galore_jax.apollo_mini(RATE))
    check(got, want, 0)
    kept = sum(x.size for x in jax.tree.leaves(states[0]))
    assert kept == 2 * 2 * 14 + 2 + 2  # two moments, two norms, two counts


def test_apollo_with_the_gradients_own_subspace():
    tx = galore_jax.apollo(RATE, rank=RANK, update_proj_gap=GAP, method="svd", gamma=1e6)
    params, states = run(tx)

    def apollo(w, grads, projector, tall):
        del tall
        adam = Adam()
        for t, g in enumerate(grads):
            p = projector(t)
            if t % GAP == 0:
                check_svd(p, g)
            r = p.T @ g
            n = adam(r)
            w = w - RATE * g * (np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0))
        return w

    check(params, by_matrix(apollo, [s[0].projector for s in states]))


def test_ldadam():
    b1, b2, rho = 0.9, 0.99, 0.8
    tx = galore_jax.ldadam(RATE, b1, b2, weight_decay=DECAY, rank=RANK, rho=rho)
    params, states = run(tx)

    def ldadam(w, grads, projector, tall):
        del tall
        adam, error, old = Adam(b1, b2), 0.0, None
        for t, g in enumerate(grads):
            a, p = g + error, projector(t)
            lifted = 0.0 if old is None else old @ adam.mu
            if old is None:
                check_svd(p, a)
            else:
                b = rho * old @ adam.mu_hat + (1 - rho) * a
                q = np.linalg.qr(b @ (b.T @ old))[0]
                np.testing.assert_allclose(p @ p.T, q @ q.T, atol=1e-3)
                c = p.T @ old
                spread = c**2 @ (adam.nu_hat - adam.mu_hat**2) + (c @ adam.mu_hat) ** 2
                adam.nu = (1 - b2**adam.t) * np.abs(spread)
                adam.mu = c @ adam.mu
            n = adam(p.T @ a)
            x = a + b1 / (1 - b1) * lifted
            error, old = x - p @ (p.T @ x), p
            w = w - RATE * (p @ n + DECAY * w)
        return w

    check(params, by_matrix(ldadam, [s[0].galore.projector for s in states]), 1e-4)


def test_ldadams_account_is_what_the_subspace_did_not_show():
    """Without momentum, updates' sources and the error add up to all gradients so far."""
    params = params_like(SHAPES)
    tx = galore_jax.scale_by_ldadam(b1=0.0, rank=RANK)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(4):
        before = state
        _, state = update(jax.tree.map(jnp.asarray, gradients(t)), state, params)
        for k in SHAPES:
            whole = gradients(t)[k] + np.asarray(before.error[k])
            p = np.asarray(state.galore.projector[k])
            shown = p @ p.T @ whole if k == "wide" else whole @ p @ p.T
            np.testing.assert_allclose(shown + state.error[k], whole, atol=1e-5)


def galore_state(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, galore_jax.GaLoreState))
    return next(x for x in nodes if isinstance(x, galore_jax.GaLoreState))


def newton_schulz(x):
    """Its polynomials, on the singular values themselves."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / np.sum(values**8) ** (1 / 8)
    for a, b, c in (
        (7.7110, -22.1138, 16.2487),
        (3.2153, -2.4112, 0.5013),
        (2.2183, -1.5940, 0.4107),
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
    """At any scale; where they are within a factor of 50 of the largest they end close to one."""
    left, _, right = np.linalg.svd(normal(seed, m, n).astype(np.float64), full_matrices=False)
    values = np.exp(-decay * np.arange(min(m, n)))
    x = (left * values) @ right
    got = np.asarray(orthogonalise(jnp.asarray(size * x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, newton_schulz(x), atol=2e-4)
    found = np.linalg.svd(got, compute_uv=False)
    reached = values > 0.02 * np.sum(values**8) ** (1 / 8)
    assert np.all(found <= 1.1) and np.all(found[: np.sum(reached)] > 0.9)


def test_large_stacks_are_orthogonalised_part_by_part(monkeypatch):
    x = jnp.asarray(normal(0, 7, 2, 24, 40))
    want = orthogonalise(x)
    for together in (1, 3 * 24 * 40, 2**24):
        monkeypatch.setattr(muon, "_AT_ONCE", together)
        np.testing.assert_allclose(muon._orthogonalise_stack(x), want, atol=1e-5)
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


def check_switch(new, gram, old, g, leading, b3):
    """The leading Ritz vectors of what is tracked are in a new basis, the rest is beside all."""
    np.testing.assert_allclose(new.T @ new, np.eye(RANK), atol=1e-5)
    tracked = b3 * old @ gram @ old.T + (1 - b3) * g @ g.T
    q = np.linalg.qr(tracked @ old)[0]
    ritz = q @ np.linalg.eigh(q.T @ tracked @ q)[1][:, ::-1]
    kept = ritz[:, :leading]
    np.testing.assert_allclose(np.abs(np.sum(kept * new[:, :leading], 0)), 1, atol=1e-4)
    np.testing.assert_allclose(ritz.T @ new[:, leading:], 0, atol=1e-4)


@pytest.mark.parametrize(
    ("leading", "b3", "gamma"), [(0.34, 0.9, 1e6), (1.0, 0.9, 1.01), (0.0, 0.0, 1.01)]
)
def test_alice(leading, b3, gamma):
    b1, b2 = 0.8, 0.9
    options = dict(rank=RANK, update_proj_gap=GAP, leading=leading, gamma=gamma)
    tx = galore_jax.alice(RATE, b1, b2, b3, weight_decay=DECAY, scale=0.5, **options)
    params, states = run(tx)
    inner = [s.inner_states["alice"].inner_state[0][0] for s in states]
    binds = []

    def alice(w, grads, basis, tall):
        gram, m, v, p, last = 0.0, 0.0, 0.0, 0.0, None
        for t, g in enumerate(grads):
            u = basis(t)
            if t and t % GAP == 0:
                check_switch(u, gram, basis(t - 1), g, round(leading * RANK), b3)
            elif t:
                np.testing.assert_array_equal(u, basis(t - 1))
            s = u.T @ g
            gram = b3 * gram + (1 - b3) * s @ s.T
            m, v = b1 * m + (1 - b1) * s, b2 * v + (1 - b2) * s**2
            p = b1 * p + (1 - b1) * (np.sum(g**2, 0) - np.sum(s**2, 0))
            c = np.sqrt(8 - RANK) * (g - u @ s) / np.sqrt(p)
            binds.append(last is not None and np.linalg.norm(c) > gamma * last)
            c, last = limited(c, last, gamma)
            w = w - RATE * (0.5 * (u @ (m / (np.sqrt(v) + 1e-8)) + 0.4 * c) + DECAY * w)
        return w

    check(params, by_matrix(alice, [s.basis for s in inner]), 1e-4)
    assert any(binds) == (gamma < 2)


def test_alice_follows_the_gradients_directions():
    """Gradients of one subspace are found, through T steps with noise, and signs do not flip."""
    directions = np.linalg.qr(normal(0, 12, 3))[0]
    tx = galore_jax.scale_by_alice(4, update_proj_gap=2, leading=0.75)
    state, update = tx.init(jnp.zeros((12, 30))), jax.jit(tx.update)
    for t in range(9):
        g = directions @ normal(t + 1, 3, 30) + 0.01 * normal(t + 50, 12, 30)
        old, (_, state) = state, update(jnp.asarray(g), state)
    found = np.asarray(state.basis)[:, :3]
    np.testing.assert_allclose(np.linalg.norm(directions.T @ found, axis=0), 1, atol=1e-3)
    assert np.all(np.sum(found * np.asarray(old.basis)[:, :3], axis=0) > 0)


def test_alice_and_gradients_that_show_nothing():
    """Zeros move nothing, and a basis is found after them; what is not finite changes none."""
    tx = galore_jax.scale_by_alice(2, update_proj_gap=1)
    good = jnp.asarray(normal(0, 6, 9))
    out, state = tx.update(0 * good, tx.init(good))
    assert not np.any(out)
    _, state = tx.update(good, state)
    np.testing.assert_allclose(state.basis.T @ state.basis, np.eye(2), atol=1e-5)
    _, after = tx.update(jnp.nan * good, state)
    np.testing.assert_array_equal(after.basis, state.basis)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 6, 6)])
@pytest.mark.parametrize("rank", [5, 6, 20])
def test_alice_where_the_complement_is_small_or_none(shape, rank):
    """What cannot be drawn from it is taken from the directions that are not leading ones."""
    tx = galore_jax.scale_by_alice(rank, update_proj_gap=1, leading=0.2)
    state = tx.init(jnp.zeros(shape))
    for step in range(2):
        out, state = tx.update(jnp.asarray(normal(step, *shape)), state)
    r = min(rank, 6)
    basis = np.asarray(state.basis)
    assert out.shape == shape and basis.shape[-2:] == (6, r)
    assert np.any(state.limit.norm) == (r < 6)
    products = np.swapaxes(basis, -1, -2) @ basis
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(r), products.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank"),
        (dict(rank=lambda path, shape: 2), "rank must be an int or a share here"),
        (dict(rank=2, leading=1.5), "leading must be a share"),
        (dict(rank=2, leading=jnp.ones([])), r"static_args=\('rank', 'leading'\)"),
        (dict(rank=2, update_proj_gap=0), "update_proj_gap"),
    ],
)
def test_alices_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        galore_jax.alice(0.1, **options)


def folded(x, width):
    """Means of neighbours on the last axis, and what repeats them."""
    starts = range(0, x.shape[-1], width)
    means = np.stack([x[..., i : i + width].mean(-1) for i in starts], -1)
    return means, lambda m: np.repeat(m, width, -1)[..., : x.shape[-1]]


@pytest.mark.parametrize(("level", "gamma"), [(0, 1e6), (2, 1e6), (1, 1.01)])
def test_foam(level, gamma):
    tx = galore_jax.foam(RATE, weight_decay=DECAY, level=level, scale=0.5, gamma=gamma)
    params, states = run(tx)
    assert states[0].inner_states["foam"].inner_state[0][0].mu["wide"].shape == (
        8,
        -(-14 // 2**level),
    )
    binds = []

    def foam(w, grads, projector, tall):
        del projector
        adam, last = Adam(), None
        for g in [g.T if tall else g for g in grads]:
            mean, repeat = folded(g, 2**level)
            adam(mean)
            rest = g - repeat(mean)
            m, v = repeat(adam.mu_hat) + rest, repeat(adam.nu_hat) + rest**2
            u = m / (np.sqrt(v) + 1e-8)
            binds.append(last is not None and np.linalg.norm(u) > gamma * last)
            u, last = limited(u, last, gamma)
            w = w - RATE * (0.5 * (u.T if tall else u) + DECAY * w)
        return w

    check(params, by_matrix(foam, None))
    assert any(binds) == (gamma < 2)
    if level == 0:  # Nothing is folded: Adam.
        check(params, run(optax.adamw(RATE * 0.5, weight_decay=2 * DECAY))[0])


def test_racs():
    tx = galore_jax.racs(RATE, 0.9, DECAY, scale=0.05, gamma=1.01)
    params, states = run(tx)
    numbers = [x.size for x in jax.tree.leaves(states[0].inner_states["racs"])]
    assert sum(numbers) == 2 * (8 + 14 + 1)

    def racs(w, grads, projector, tall):
        del projector
        rows, columns, last = 0.0, 0.0, None
        for g in [g.T if tall else g for g in grads]:
            q = np.ones(len(g))
            for _ in range(5):
                s = (g**2).T @ q / (q @ q)
                q = g**2 @ s / (s @ s)
            rows, columns = 0.9 * rows + 0.1 * q, 0.9 * columns + 0.1 * s
            u = g / np.sqrt(np.outer(rows, columns))
            u, last = limited(u, last, 1.01)
            w = w - RATE * (0.05 * (u.T if tall else u) + DECAY * w)
        return w

    check(params, by_matrix(racs, None))


@pytest.mark.parametrize("factor", [1e-17, 1e-6, 1e17])
def test_racs_at_any_size_of_gradient(factor):
    """Squares of squares neither vanish nor overflow, and a row or column of zeros stays."""
    g = jnp.asarray(low_rank_gradient(0, 8, 14)).at[2].set(0).at[:, 3].set(0)
    tx = galore_jax.scale_by_row_and_column()
    want, _ = tx.update(g, tx.init(g))
    got, state = tx.update(factor * g, tx.init(g))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert not np.any(got[2]) and not np.any(got[:, 3])
    again, _ = tx.update(0 * g, state)
    assert not np.any(again)


@pytest.mark.parametrize(
    "make", [functools.partial(galore_jax.alice, rank=2), galore_jax.foam, galore_jax.racs]
)
def test_what_is_no_matrix_takes_adamws_steps(make):
    params = params_like({"w": (8, 14), "bias": (14,), "head": (6, 10)})
    got, _ = train(make(RATE, weight_decay=DECAY, adam_learning_rate=0.005), params, 5)
    want, _ = train(optax.adamw(0.005, weight_decay=DECAY), params, 5)
    for name in ("bias", "head"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-6)


@pytest.mark.parametrize("level", [-1, 1.5, True])
def test_foams_level_is_a_whole_number(level):
    with pytest.raises(ValueError, match="level must be a whole number"):
        galore_jax.foam(0.1, level=level)


def test_scale():
    shapes = {"embed": (10, 6), "mlp": (2, 6, 8), "norm": (2, 6), "lm_head": (6, 10)}
    params = params_like(shapes)
    tx = galore_jax.scale_sgd(RATE, 0.9, DECAY, adam_learning_rate=0.005)
    got, state = train(tx, params, 5)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 60 + 2 * 12
    want = {k: np.asarray(w, np.float64) for k, w in params.items()}
    momentum, adam = 0.0, Adam()
    for t in range(5):
        grads = {k: np.asarray(g, np.float64) for k, g in grads_like(params, t).items()}
        momentum = 0.9 * momentum + 0.1 * grads["lm_head"]
        grads["lm_head"] = momentum
        for k in shapes:
            g = grads[k]
            if k == "norm":
                want[k] = want[k] - 0.005 * (adam(g) + DECAY * want[k])
                continue
            columns = g / np.sqrt(np.mean(g**2, axis=-2, keepdims=True))
            want[k] = want[k] - RATE * (columns + DECAY * want[k])
    for k in shapes:
        np.testing.assert_allclose(got[k], want[k], atol=1e-5)


def test_scale_wants_to_know_the_output_layer():
    with pytest.raises(ValueError, match=r"output_layer.*the paths are kernel"):
        galore_jax.scale_sgd(0.1).init({"kernel": jnp.ones((4, 4))})
    tied = galore_jax.scale_sgd(0.1, output_layer="embed")
    tied.init({"embed": jnp.ones((4, 4)), "mlp": jnp.ones((4, 4))})
