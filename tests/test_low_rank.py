"""LoRA, ReLoRA and low-rank weights as ways to write the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import low_rank
from examples import llama, lora, optimizers, training
from tests.small_run import SMALL

RANK = 4
KINDS = ("lora", "relora", "low_rank", "refactored")


def model():
    return llama.create(SMALL, seed=0)


def kernels(params):
    """The blocks' kernels, multiplied out, by path."""
    found = jax.tree_util.tree_leaves_with_path(lora.assemble(params))
    return {jax.tree_util.keystr(path): x for path, x in found if optimizers.is_kernel(path)}


def factorised(kind):
    graph, params = model()
    return graph, params, low_rank.factorise(kind, params, RANK, jax.random.key(1))


def test_only_the_blocks_kernels_are_factors():
    _, params = model()
    assert len(kernels(params)) == 7
    labels = low_rank.labels(factorised("lora")[2])
    flat = jax.tree.leaves(labels)
    assert flat.count("fixed") == 7 and flat.count("kernel") == 14
    assert {labels["embed"]["embedding"], labels["lm_head"]["kernel"]} == {"other"}


@pytest.mark.parametrize("kind", ["lora", "relora"])
def test_adapters_begin_as_the_model_itself(kind):
    _, params, written = factorised(kind)
    for (path, w), got in zip(kernels(params).items(), kernels(written).values(), strict=True):
        np.testing.assert_array_equal(got, w, err_msg=path)
    apart = [x["a"] for x in jax.tree.leaves(written, is_leaf=lora.is_factors)
             if lora.is_factors(x)]  # fmt: skip
    assert len({np.asarray(a).tobytes() for a in apart}) == 7
    assert np.std(apart[0]) == pytest.approx(apart[0].shape[-2] ** -0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["low_rank", "refactored"])
def test_low_rank_weights_begin_as_the_nearest_of_their_rank(kind):
    _, params, written = factorised(kind)
    for w, got in zip(kernels(params).values(), kernels(written).values(), strict=True):
        u, s, vt = np.linalg.svd(np.asarray(w), full_matrices=False)
        best = (u[..., :RANK] * s[..., None, :RANK]) @ vt[..., :RANK, :]
        np.testing.assert_allclose(got, best, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_fixed_weight_gets_neither_gradient_nor_state(kind):
    graph, _, params = factorised(kind)
    labels = low_rank.labels(params)
    tx = training_optimizer(labels)
    model_of = lambda p: nnx.merge(graph, lora.assemble(p))  # noqa: E731
    step = training.make_train_step(model_of, tx, lambda _: 0.01)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (4, 17)))
    state = training.new_state(jax.tree.map(jnp.copy, params), tx)
    kept = sum(x.size for x in jax.tree.leaves(state["opt_state"]) if x.ndim)
    trained = [
        x.size
        for x, label in zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
        if label != "fixed"
    ]
    assert kept == 2 * sum(trained)
    losses = []
    for _ in range(20):
        state, figures = step(state, tokens)
        losses.append(float(figures["loss"]))
    assert losses[-1] < losses[0] - 0.2
    for path, x in jax.tree_util.tree_leaves_with_path(state["params"]):
        if getattr(path[-1], "key", None) == "base":
            before = params
            for key in path:
                before = before[key.key]
            np.testing.assert_array_equal(x, before)


def training_optimizer(labels):
    return optimizers.create("adamw", 0.01, labels=labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", low_rank.RESTARTING)
def test_a_restart_leaves_the_model_and_renews_its_factors(kind):
    _, _, params = factorised(kind)
    params = jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    tx = training_optimizer(low_rank.labels(params))
    state = training.new_state(params, tx) | {"step": jnp.asarray(7)}
    grads = jax.tree.map(jnp.ones_like, params)
    state["opt_state"] = tx.update(grads, state["opt_state"], params)[1]
    before = jax.tree.map(np.asarray, state)
    restart = low_rank.make_restart(kind, seed=0, gap=7)
    assert restart(0, state) is state and restart(8, state) is state
    after = restart(7, state)
    for old, new in zip(kernels(before["params"]).values(), kernels(after["params"]).values(),
                        strict=True):  # fmt: skip
        np.testing.assert_allclose(new, old, atol=1e-5)
    zeroed = {"relora": {"mu", "nu"}, "refactored": {"mu"}}[kind]
    seen = set()
    for path, x in jax.tree_util.tree_leaves_with_path(after["opt_state"]):
        names = [getattr(k, "name", getattr(k, "key", None)) for k in path]
        which = {"mu", "nu"} & set(names)
        if not which or not x.ndim:
            continue
        factor = "blocks" in names and "kernel" in names
        assert np.any(np.asarray(x)) != (factor and which <= zeroed), names
        seen |= which if factor else set()
    assert seen == {"mu", "nu"}
    factors = [x for x in jax.tree.leaves(after["params"], is_leaf=lora.is_factors)
               if lora.is_factors(x)]  # fmt: skip
    for x in factors:
        if kind == "relora":
            assert not np.any(x["b"]) and np.any(x["a"])
        else:  # balanced
            a, b = np.asarray(x["a"]), np.asarray(x["b"])
            np.testing.assert_allclose(a.mT @ a, b @ b.mT, atol=1e-4)


def test_the_rate_warms_up_after_each_restart():
    rate = low_rank.rewarmed(optax.constant_schedule(1.0), 20)
    assert [float(rate(t)) for t in (0, 19, 20, 21, 22, 39, 40)] == [1, 1, 0.5, 1, 1, 1, 0.5]


def test_flags_that_do_not_go_together(folder, capsys):
    for flags, says in (
        (["--weights", "lora", "--tier", "layerwise"], "--tier full"),
        (["--weights", "low_rank", "--rank", "999"], "--rank 999"),
    ):
        assert low_rank.main(["--data", "texts", *flags, "--run-dir", says.strip("-")]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        low_rank.main(["--weights", "full"])
