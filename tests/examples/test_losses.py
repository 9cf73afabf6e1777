"""The loss that never sees the logits of a whole vocabulary, against the one that does."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

import galore_jax
from examples import llama, losses, training


def test_token_losses_are_cross_entropies():
    scores = np.random.default_rng(0).normal(size=(2, 3, 5)) * 30
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    picked = np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    expected = np.log(np.sum(np.exp(scores), axis=-1)) - picked  # In float64.
    actual = losses.token_losses(jnp.asarray(scores, jnp.float32), targets)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    shifted = losses.token_losses(jnp.asarray(scores + 1000.0, jnp.float32), targets)
    np.testing.assert_allclose(shifted, expected, atol=1e-3)  # No overflow.


def problem(batch, time, words, hidden, size=1.0, seed=0):
    """Hidden states, a head, targets, and a cotangent."""
    rng = np.random.default_rng(seed)
    x, head, g = (
        jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
        for shape, scale in (
            ((batch, time, hidden), size),
            ((hidden, words), 1),
            ((batch, time), 1),
        )
    )
    return x, head, jnp.asarray(rng.integers(0, words, (batch, time))), g


def plain(x, head, targets):
    return losses.token_losses(jnp.dot(x, head), targets)


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.integers(1, 3),
    time=st.integers(1, 5),
    words=st.integers(1, 40),
    chunk=st.integers(1, 45),
    axis=st.sampled_from([0, 1]),
    size=st.sampled_from([0.1, 1.0, 300.0]),
)
def test_chunks_change_nothing(batch, time, words, chunk, axis, size):
    """Losses and gradients, also of logits that a plain exponential would overflow."""
    x, head, targets, g = problem(batch, time, words, 4, size)

    def chunked(x, head, targets):
        head = head if axis else head.T
        return losses.chunked_losses(x, head, targets, chunk=chunk, axis=axis)

    @jax.jit
    def both():
        results = []
        for f in (plain, chunked):
            value, vjp = jax.vjp(lambda x, head, f=f: f(x, head, targets), x, head)
            results.append((value, *vjp(g)))
        return results

    for a, b in zip(*both(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(size, 1.0))


def test_bfloat16_is_as_exact_in_chunks():
    """The head's gradient of 4096 tokens; added up in bfloat16 it would be off by some percent."""
    x, head, targets, _ = problem(4, 1024, 256, 32)
    head = 0.2 * head
    x, head = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)

    def gradient(loss, x, head):
        return jax.grad(lambda head: jnp.mean(loss(x, head, targets)))(head)

    def chunked(x, head, targets):
        return losses.chunked_losses(x, head, targets, chunk=100)

    exact = gradient(plain, x.astype(jnp.float32), head.astype(jnp.float32))
    errors = [
        float(optax.tree.norm(gradient(f, x, head).astype(jnp.float32) - exact))
        for f in (plain, chunked)
    ]
    assert gradient(chunked, x, head).dtype == jnp.bfloat16
    assert errors[1] < 1.05 * errors[0]
    assert errors[1] < 5e-3 * float(optax.tree.norm(exact))


SGD = optax.sgd(0.1)
CONFIG = llama.LlamaConfig(97, 32, 48, heads=4, layers=2, init_scale=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_model_with_a_chunked_loss(tied):
    ids = np.random.default_rng(1).integers(0, 97, (2, 17))
    values = []
    for words in (97, 40):
        config = dataclasses.replace(CONFIG, tied=tied, loss_chunk=words * ids[:, 1:].size)
        graph, params = llama.create(config, seed=0)

        def loss(params, graph=graph):
            return jnp.mean(nnx.merge(graph, params).losses(ids[:, :-1], ids[:, 1:]))

        values.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tier", "tied"),
    [("full", True), ("subspace", False), ("eval", False)],
)
def test_logits_of_all_tokens_never_exist(tier, tied):
    words, tokens = 4096, jax.ShapeDtypeStruct((4, 65), jnp.int32)
    figures = []
    for chunk in (words, 512):
        config = dataclasses.replace(
            CONFIG, vocab_size=words, loss_chunk=256 * chunk, tied=tied, remat=True
        )
        graph, params = llama.create(config, 0)
        if tier == "eval":
            mask = jax.ShapeDtypeStruct((4, 64), bool)
            lowered = training.make_eval_step(llama.from_graph(graph)).lower(params, tokens, mask)
        else:
            options = {"weight_dimension_numbers": galore_jax.last_two_axes, "method": "random"}
            options["exclude"] = "^(?!.*mlp/up)"  # One kernel, for a shorter program.
            tx = galore_jax.galore_sgd(0.1, rank=4, **options) if tier == "subspace" else SGD
            step = training.make_train_step(llama.from_graph(graph), tx, lambda _: 0.1, tier=tier)
            lowered = step.lower(training.new_state(params, tx), tokens)
        compiled = lowered.compile()
        whole = any(f"[{n},{words}]" in compiled.as_text() for n in ("256", "4,64"))
        figures.append((whole, compiled.memory_analysis().temp_size_in_bytes))
    (before, plain_bytes), (after, chunked_bytes) = figures
    assert before and not after
    assert chunked_bytes < plain_bytes - 0.6 * (4 * 64 * words * 4)
