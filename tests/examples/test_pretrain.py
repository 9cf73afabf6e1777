"""The trainer end to end on a very small model: it learns, stops, resumes, names mistakes."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_jax
from examples import (
    checkpoints,
    command_line,
    export,
    hf,
    llama,
    optimizers,
    pretrain,
    streaming,
    training,
)
from examples import config as config_lib
from examples import data as data_lib
from examples.errors import UserError
from tests.small_run import FLAGS, GALORE, SMALL, metrics


def run(*args: str) -> int:
    """Train, with a small rank where the optimizer has one."""
    name = args[args.index("--optimizer") + 1] if "--optimizer" in args else "galore_adamw"
    galore = "rank" in optimizers.OPTIMIZERS[name].options
    return pretrain.main(["--data", "texts", *FLAGS, *(GALORE if galore else ()), *args])


def checkpoint(name: str, step: int, config: config_lib.Config) -> dict:
    """What the checkpoint of a step holds: state and position in the data."""
    setup = pretrain.setup(config)
    abstract = jax.eval_shape(lambda: training.new_state(setup.init(), setup.tx))
    assert checkpoints.choose(pathlib.Path(name)) == step
    data = iter(data_lib.load(config.data, vocab_size=300, seq_len=16, batch_size=4, seed=0).train)
    with checkpoints.opened(pathlib.Path(name), keep=10, data=data) as saver:
        return {"state": saver.restore(step, abstract), "data": data.get_state()}


# --- End to end ---


def test_run_learns_and_leaves_a_folder(folder, capsys):
    assert run("--steps", "60", "--run-dir", "one", "--prompt", "alpha", "--accumulate", "2") == 0
    out = capsys.readouterr().out
    assert "blocks/mlp/up/kernel" in out.replace(".", "/").replace("']['", "/")  # The summary.
    assert "sample:\nalpha" in out
    rows = metrics("one")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert abs(rows[0]["loss"] - np.log(300)) < 0.5
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["tokens"] == 60 * 4 * 16
    assert rows[5]["learning_rate"] == pytest.approx(0.03 * 5 / 6)
    assert rows[-1]["learning_rate"] < 0.0035
    evaluated = [row["step"] for row in rows if "val_loss" in row]
    assert evaluated == [*range(8, 60, 8), 60]
    saved = json.loads(pathlib.Path("one/config.json").read_text())
    assert saved["rank"] == 4 and saved["model"] == "tiny"
    assert pathlib.Path("one/loss.png").read_bytes().startswith(b"\x89PNG")
    steps = {path.name for path in pathlib.Path("one/checkpoints").iterdir()}
    assert steps == {"45", "60"}


@functools.cache
def small_problem():
    """Parameters, and the gradient of their loss at one batch, compiled once for all optimizers."""
    graph, params = llama.create(SMALL, seed=0)
    tokens = np.random.default_rng(0).integers(0, 300, (4, 17))

    def loss(params):
        return jnp.mean(nnx.merge(graph, params).losses(tokens[:, :-1], tokens[:, 1:]))

    return params, jax.jit(jax.value_and_grad(loss))


# Those that are made here of several parts, or have a rate of a kind of their own.
MADE = ("adafactor", "frugal", "galore_lion", "galore_sgd", "lion8bit", "muon", "optax_galore")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [*MADE, "scale_sgd", "sgd"])
def test_a_recipe_takes_steps_that_help(folder, optimizer):
    config = config_lib.from_recipe(
        "tiny", optimizer, 30, 4, rank=4, update_proj_gap=10, seq_len=16, vocab_size=300
    )
    params, gradient = small_problem()
    schedule = pretrain.learning_rate_schedule(config, config.learning_rate)
    tx = pretrain.make_optimizer(config, schedule)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    for _ in range(30):
        loss, grads = gradient(params)
        params, state = step(grads, state, params)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2
    assert step._cache_size() == 1


SUBSPACE = ["--tier", "subspace", "--accumulate", "2", "--projector-dtype", "int4"]
SUBSPACE += ["--param-dtype", "bfloat16", "--stochastic-rounding", "--method", "random"]
CARD = ["--recipe", "12gb", "--batch-size", "4", "--skip-nonfinite", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "data", "more"),
    [
        ("galore_lion8bit", "hf:texts", SUBSPACE),
        ("galore_muon8bit", "texts", CARD),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(folder, monkeypatch, optimizer, data, more):
    monkeypatch.setattr(streaming, "VALIDATION_DOCUMENTS", 3)
    flags = ["--data", data, "--optimizer", optimizer, "--steps", "20", "--save-every", "100"]
    flags += ["--sample-tokens", "0", *more]
    assert run(*flags, "--run-dir", "whole") == 0
    # Step 13 lies between the refreshes at 10 and 15, and between two logs.
    assert run(*flags, "--run-dir", "parts", "--stop-at", "13") == 0
    assert metrics("parts")[-1]["step"] == 13
    assert pretrain.main(["--resume", "parts"]) == 0
    assert pathlib.Path("whole/metrics.jsonl").read_text() == (
        pathlib.Path("parts/metrics.jsonl").read_text()
    )
    config = config_lib.read(pathlib.Path("whole"))
    whole, parts = checkpoint("whole", 20, config), checkpoint("parts", 20, config)
    assert int(whole["state"]["step"]) == 20 and whole["data"] == parts["data"]
    jax.tree.map(np.testing.assert_array_equal, whole["state"], parts["state"])
    export.export(pathlib.Path("whole"), pathlib.Path("exported"))
    params = galore_jax.dequantize_weights(whole["state"]["params"])
    jax.tree.map(np.testing.assert_array_equal, hf.load_hf("exported")[1], params)


@pytest.mark.slow
def test_tiers_train_alike(folder):
    """Refreshes after 0, 5 and 10 steps, clipped gradients, a chunked loss."""
    flags = ["--steps", "12", "--clip", "0.3", "--loss-chunk", "9600", "--sample-tokens", "0"]
    flags += ["--method", "svd"]  # Of one gradient, to rounding, one projector.
    for tier in ("full", "subspace", "layerwise"):
        # Which takes the norm of the gradient in all of them.
        skip = ["--skip-nonfinite", "1"] if tier == "layerwise" else []
        assert run(*flags, "--tier", tier, *skip, "--run-dir", tier) == 0
    rows = {name: metrics(name) for name in ("full", "subspace", "layerwise")}
    for name in ("subspace", "layerwise"):
        for key in ("loss", "val_loss", "learning_rate"):
            expected = [row[key] for row in rows["full"] if key in row]
            assert [r[key] for r in rows[name] if key in r] == pytest.approx(expected, rel=1e-5)
    norms = [row["grad_norm"] for row in rows["full"]]
    for name in ("subspace", "layerwise"):
        assert [row["grad_norm"] for row in rows[name]] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.3
    # And the weights, by the way that they have gone.
    _, start = llama.create(SMALL, seed=0)
    full, *others = (
        checkpoints.read_params(pathlib.Path(name), jax.eval_shape(lambda: start)) for name in rows
    )
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, full, start))
    for other in others:
        apart = optax.tree.norm(jax.tree.map(jnp.subtract, full, other))
        assert apart < 5e-3 * moved


def test_a_recipe_for_a_card_is_where_flags_start():
    """And the paper's for the model is where it starts."""
    config = command_line.parse(["--model", "7b", "--recipe", "12gb"])
    assert (config.optimizer, config.param_dtype, config.dtype) == (
        "galore_muon8bit", "int8", "bfloat16",
    )  # fmt: skip
    assert (config.tier, config.batch_size, config.accumulate) == ("layerwise", 1, 1)
    assert config.stochastic_rounding and config.clip == 0 and config.rank == 1 / 8
    assert config.update_proj_gap == 500 and config.learning_rate == pytest.approx(0.01)
    flags = ["--model", "7b", "--recipe", "24gb", "--batch-size", "2", "--lr", "0.1", "--rank", "8"]
    config = command_line.parse([*flags, "--no-stochastic-rounding", "--optimizer", "fira"])
    assert (config.batch_size, config.learning_rate, config.rank) == (2, 0.1, 8)
    assert config.optimizer == "fira" and not config.stochastic_rounding
    assert command_line.parse(["--model", "7b", "--recipe", "24gb"]).rank == 1024
    config = command_line.parse(["--recipe", "24gb", "--param-dtype", "float32"])
    assert config.param_dtype == "float32" and not config.stochastic_rounding
    config = command_line.parse(["--param-dtype", "int8", "--tier", "layerwise"])
    assert config.stochastic_rounding and config.recipe is None


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_no_state_is_of_half_precision_because_weights_are(name):
    """A mean of squares in bfloat16 ceases to move."""
    _, params = llama.create(dataclasses.replace(SMALL, param_dtype="bfloat16"), 0)
    params = jax.eval_shape(lambda: params)
    apart = {"embedding_learning_rate": 1e-4, "labels": optimizers.labels(params)}
    for more in ({},) if name == "scale_sgd" else ({}, apart):
        tx = optimizers.create(name, 1e-3, rank=4, update_proj_gap=2, scale=1.0, **more)
        state = jax.eval_shape(tx.init, params)
        kinds = {x.dtype.name for x in jax.tree.leaves(state)}
        assert not kinds & {"bfloat16", "float16"}
        assert name.endswith("8bit") or "uint8" not in kinds
        updates, new = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.map(lambda x: x.dtype, (updates, new)) == jax.tree.map(
            lambda x: x.dtype, (params, state)
        )


# --- The step and the evaluation ---


@pytest.mark.slow
def test_accumulation_is_the_whole_batch():
    config = dataclasses.replace(SMALL, init_scale=0.1)
    tokens = np.random.default_rng(0).integers(0, 300, (8, 17))
    results = []
    for accumulate in (1, 4):
        graph, params = llama.create(config, seed=0)
        tx = optax.sgd(1.0)
        step = training.make_train_step(
            llama.from_graph(graph), tx, optax.constant_schedule(1.0), accumulate
        )
        results.append(step(training.new_state(params, tx), tokens))
    (whole, figures), (parts, other) = results
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        whole["params"],
        parts["params"],
    )
    assert figures["loss"] == pytest.approx(float(other["loss"]), rel=1e-6)
    assert figures["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-5)


@pytest.mark.slow
def test_accumulation_adds_bfloat16_gradients_in_float32():
    """512 equal microbatches: in bfloat16 the sum would stop growing half way."""
    config = dataclasses.replace(SMALL, param_dtype="bfloat16", init_scale=0.1, layers=1)
    row = np.random.default_rng(0).integers(0, 300, (1, 5))
    norms = []
    for rows, accumulate in ((1, 1), (512, 512)):
        graph, params = llama.create(config, seed=0)
        tx = optax.sgd(0.1)
        step = training.make_train_step(
            llama.from_graph(graph), tx, optax.constant_schedule(0.1), accumulate
        )
        state, figures = step(training.new_state(params, tx), np.repeat(row, rows, axis=0))
        norms.append(float(figures["grad_norm"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("bfloat16")}
    # The plain norm is itself of bfloat16 gradients.
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tier", "seed", "least", "most"),
    [
        ("full", None, 0.0, 0.0),
        ("full", 0, 0.2, 0.9),
        ("subspace", 0, 0.2, 0.9),
        ("layerwise", 0, 0.2, 0.9),
    ],
)
def test_stochastic_rounding_makes_small_steps_count(tier, seed, least, most):
    """Six steps of 0.0005 on norm scales of 1.0, with neighbours 0.004 away in bfloat16."""
    few = "blocks/attention/q/kernel"  # Each one makes a program longer.
    tx = optimizers.create("galore_lion", 5e-4, rank=4, method="random", target=few)
    config = dataclasses.replace(SMALL, param_dtype="bfloat16", remat=tier == "layerwise")
    graph, params = llama.create(config, seed=0)
    key = None if seed is None else jax.random.key(seed)
    step = training.make_train_step(
        llama.from_graph(graph), tx, lambda _: 5e-4, tier=tier, rounding_key=key
    )
    state = training.new_state(params, tx)
    for _ in range(6):
        state, _ = step(state, np.random.default_rng(0).integers(0, 300, (4, 17)))
    scale = state["params"]["final_norm"]["scale"]
    assert scale.dtype == jnp.bfloat16
    assert least <= float(jnp.mean(scale != 1.0, dtype=jnp.float32)) <= most


@pytest.mark.slow
@pytest.mark.parametrize("length", [30, 50, 100])
def test_perplexity_is_weighted_by_tokens(length):
    """Against numpy, sequence by sequence, with a last batch that is mostly not there."""
    graph, params = llama.create(dataclasses.replace(SMALL, init_scale=0.3), seed=0)
    tokens = np.random.default_rng(0).integers(0, 300, length).astype(np.uint32)
    total = 0.0
    for start in range(0, length - 1, 16):
        piece = tokens[start : start + 17].astype(np.int32)
        scores = np.asarray(nnx.merge(graph, params)(piece[None, :-1])[0], np.float64)
        logs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        total -= logs[np.arange(len(piece) - 1), piece[1:]].sum()
    held_out = data_lib.validation_batches(tokens, 16, 3)
    figures = training.evaluate(training.make_eval_step(llama.from_graph(graph)), params, held_out)
    assert figures["val_tokens"] == length - 1
    assert figures["val_loss"] == pytest.approx(total / (length - 1), rel=1e-6)
    assert figures["val_perplexity"] == pytest.approx(np.exp(total / (length - 1)), rel=1e-5)


def test_state_is_donated():
    graph, params = llama.create(SMALL, seed=0)
    tx = optax.adam(1e-3)
    step = training.make_train_step(llama.from_graph(graph), tx, optax.constant_schedule(1e-3))
    state = training.new_state(params, tx)
    step(state, np.zeros((2, 17), np.int32))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state["params"]))


# --- The command line ---


def test_recipes_are_the_defaults():
    config = command_line.parse(["--model", "1b"])
    assert (config.rank, config.steps, config.warmup) == (512, 100_000, 10_000)
    assert (config.learning_rate, config.batch_size, config.accumulate) == (0.01, 512, 32)
    config = command_line.parse(["--model", "7b", "--steps", "300", "--optimizer", "adamw"])
    assert (config.update_proj_gap, config.warmup, config.clip) == (500, 30, 1.0)
    assert config.learning_rate == pytest.approx(0.005 / 4)
    assert command_line.parse(["--rank", "7", "--lr", "0.5"]).learning_rate == 0.5


def test_mistakes_end_without_a_traceback(folder, capsys):
    def message(*args: str, data: tuple[str, ...] = ("--data", "texts")) -> str:
        try:
            code = pretrain.main([*data, *FLAGS, *(() if "--optimizer" in args else GALORE), *args])
        except SystemExit as stop:  # How tyro ends.
            code = stop.code
        assert code == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    assert "--model" in (text := message("--model", "tinny")) and "60m" in text
    assert "--optimizer" in message("--optimizer", "adam")
    assert "--steps" in message("--steps", "many")
    assert "--learning-rat" in message("--learning-rat", "3")
    assert "missing.txt" in message(data=("--data", "missing.txt"))
    pathlib.Path("short.txt").write_text("short")
    assert "--seq-len" in message(data=("--data", "short.txt"))
    assert "--accumulate 3" in message("--accumulate", "3")
    assert "--warmup" in message("--steps", "5", "--warmup", "5")
    assert "--rank is 0" in message("--rank", "0")
    assert "--resume" in message("--resume", "nowhere", data=())
    assert "galore_adamw8bit" in message("--tier", "subspace", "--optimizer", "adamw")
    for optimizer, *unused in (
        ("adamw", "--rank", "5"),
        ("apollo", "--stagger"),
        ("apollo_mini", "--moments", "reset"),
        ("ldadam", "--projector-dtype", "int8"),
        ("galore_muon", "--scale", "0.5"),
        ("galore_sgd", "--weight-decay", "0.1"),
        ("scale_sgd", "--random-from", "3"),
    ):
        text = message("--optimizer", optimizer, *unused)
        assert text.startswith(f"error: {' '.join(unused)}") and f"--optimizer {optimizer}" in text
    assert "of its own" in message("--optimizer", "scale_sgd", "--embedding-learning-rate", "1e-3")
    text = message("--tier", "layerwise", "--accumulate", "2")
    assert "--accumulate 2" in text and "--accumulate 1" in text
    assert "adafactor" in message("--tier", "layerwise", "--optimizer", "galore_adafactor")
    assert "--param-dtype float32" in message("--stochastic-rounding")
    assert "--tier full" in message("--param-dtype", "int8")
    assert "--moments rotate" in message("--optimizer", "galore_adamw8bit", "--moments", "rotate")
    assert run("--steps", "2", "--run-dir", "there", "--sample-tokens", "0") == 0
    assert "--run-dir" in message("--run-dir", "there")
    flags = ("--resume", "there")
    with pytest.raises(UserError, match="--rank: the run to resume has 4, not 8"):
        command_line.parse([*flags, "--rank", "8"])
    for text in pathlib.Path("texts").iterdir():
        text.write_text(text.read_text() + " zeta")
    assert pretrain.main(flags) == 2 and "text has changed" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(folder, capsys):
    assert run("--steps", "9", "--lr", "1e30", "--optimizer", "sgd", "--clip", "0") == 2
    assert "Lower --learning-rate" in capsys.readouterr().err
