"""The bare link, and the two places where importing the package touches Optax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from tests.problems import grads_like, params_like, train

SHAPES = {"a": (12, 24), "b": (24, 12)}


def test_optax_chain_is_ours_and_ours_without_a_mark_is_optaxs():
    assert optax.chain is galore_jax.chain
    params = params_like(SHAPES)
    links = optax.clip_by_global_norm(1.0), optax.adam(1e-2)
    a = train(galore_jax.chain(*links), params, 3)
    b = train(optax.transforms.chain(*links), params, 3)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_everything_after_the_mark_runs_in_the_subspace():
    params = params_like(SHAPES)
    a = optax.clip_by_global_norm(1.0)
    b, c = optax.scale_by_adam(), optax.scale(-1e-2)
    linked = optax.chain(a, galore_jax.galore(rank=4), b, c)
    wrapped = optax.chain(a, galore_jax.galore(optax.chain(b, c), rank=4))
    jax.tree.map(np.testing.assert_array_equal, train(linked, params, 3), train(wrapped, params, 3))


def test_a_chain_that_begins_with_8_bit_moments_is_the_wrapper_too():
    """Its links are another function's, for the sake of embeddings in half precision."""
    params = params_like({"kernel": (64, 96), "embedding": (100, 64)})
    links = (
        galore_jax.scale_by_adam8bit(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(lambda step: 1e-2 / (step + 1)),
    )
    linked = optax.chain(galore_jax.galore(rank=4), *links)
    wrapped = galore_jax.galore(optax.transforms.chain(*links), rank=4)
    (state,), want = linked.init(params), wrapped.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for a, b in zip(
        *(jax.tree.leaves(train(x, params, 3)) for x in (linked, wrapped)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_chain_in_a_chain_marks_its_own_links():
    params = params_like(SHAPES)
    low = optax.chain(galore_jax.galore(rank=4), optax.scale_by_adam())
    tx = optax.chain(low, optax.scale(-1e-2))
    state = tx.init(params)
    assert state[0][0].inner_state.mu["a"].shape == (4, 24)
    updates, _ = tx.update(grads_like(params, 0), state, params)
    assert updates["a"].shape == (12, 24)


@pytest.mark.parametrize(
    "tx",
    [
        galore_jax.galore(rank=4),
        optax.transforms.chain(galore_jax.galore(rank=4), optax.adam(1e-2)),
        optax.named_chain(("low", galore_jax.galore(rank=4)), ("adam", optax.adam(1e-2))),
    ],
)
def test_a_mark_that_reaches_a_foreign_chain_says_what_works(tx):
    with pytest.raises(ValueError, match=r"chain\(galore\(.*galore\(optax.adamw"):
        tx.init(params_like(SHAPES))


def test_a_mark_needs_an_optimizer_after_it_and_only_one_mark():
    with pytest.raises(ValueError, match="nothing follows galore"):
        optax.chain(optax.clip_by_global_norm(1.0), galore_jax.galore(rank=4))
    with pytest.raises(ValueError, match="two bare galore"):
        optax.chain(galore_jax.galore(rank=4), galore_jax.galore(rank=2), optax.adam(1e-2))


def test_the_import_touches_only_what_it_says():
    code = """
import optax
before, methods = dict(vars(optax)), dict(vars(optax.MultiSteps))
import galore_jax
changed = {k for k, v in vars(optax).items() if before.get(k) is not v}
methods = {k for k, v in vars(optax.MultiSteps).items() if methods.get(k) is not v}
assert changed == {"chain"} and methods == {"update", "gradient_transformation"}, (changed, methods)
import sys
assert not {"flax", "orbax", "torch", "grain"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_multi_steps_around_other_optimizers_is_unchanged():
    params = params_like(SHAPES)
    original = optax.MultiSteps.update.__wrapped__
    tx = optax.MultiSteps(optax.adamw(1e-2), 3)
    a, b, p = tx.init(params), tx.init(params), params
    for step in range(6):
        grads = grads_like(params, step)
        ours, a = tx.update(grads, a, p)
        theirs, b = original(tx, grads, b, p)
        jax.tree.map(np.testing.assert_array_equal, (ours, a), (theirs, b))
        p = optax.apply_updates(p, ours)


def test_multi_steps_without_galore_does_what_it_always_did():
    """As a link it takes the extra arguments that it takes by itself."""
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau())
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.full(3, 2.0)}
    alone, link = optax.MultiSteps(tx, 2), optax.MultiSteps(tx, 2).gradient_transformation()
    state = alone.init(params)
    got, want = (t.update(grads, state, params, value=0.5)[0] for t in (link, alone))
    np.testing.assert_array_equal(got["w"], want["w"])
