"""What a run writes of its subspace, for people and for TensorBoard."""

import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from examples import events, pretrain, training
from tests.examples.bigram import FLAGS, Bigram
from tests.models import OPTIONS, batches, plain
from tests.problems import once_but
from tests.small_run import metrics

DIAGNOSTICS = ["--diagnostics", "--update-proj-gap", "5", "--rank", "4"]
DIAGNOSTICS += ["--optimizer", "galore_adamw"]


def projected(config):
    """A table that is projected, refreshed at steps 1, 6 and 11, and logged at 3, 6, 9, 12."""
    schedule = pretrain.learning_rate_schedule(config, 0.1)
    tx = galore_jax.galore_adamw(schedule, rank=4, update_proj_gap=5, method="random", exclude=None)

    def init():
        return {"table": 0.02 * jax.random.normal(jax.random.key(0), (300, 300))}

    return pretrain.Setup(lambda p: Bigram(p["table"]), init, tx, schedule)


def run(*flags):
    return pretrain.main([*FLAGS, *DIAGNOSTICS, *flags], projected)


def written(name):
    """Steps and figures in the event files of a run, from the format's lengths and messages."""
    message = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    found = []
    for path in pathlib.Path(name, events.FOLDER).iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = message.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("summary"):
                figures = {x.tag: x.simple_value for x in event.summary.value}
                found.append((event.step, figures))
    return found


def test_steps_that_are_looked_at(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(begun)
    assert run("--run-dir", str(tmp_path / "one")) == 0
    rows = metrics(str(tmp_path / "one"))
    assert [row["step"] for row in rows] == list(range(1, 13))
    with_energy = [row["step"] for row in rows if "captured_energy/table" in row]
    assert with_energy == [1, 3, 6, 9, 11, 12]
    # The first refresh has no subspace before it.
    assert [row["step"] for row in rows if "subspace_overlap/table" in row] == [6, 11]
    assert not any(key.startswith("refreshed") for row in rows for key in row)
    assert all(0 < row["captured_energy"] < 0.5 for row in rows if "captured_energy" in row)
    assert any("tokens_per_second" in row for row in rows)
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert "captured_energy" in summary and "captured_energy/table" not in summary


def test_no_step_is_twice_in_the_event_files(begun, tmp_path, monkeypatch):
    """Also of a run that was killed behind its checkpoint, and of rows that it lost."""
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(begun)
    name = str(tmp_path / "one")
    assert run("--run-dir", name, "--tensorboard", "--stop-at", "8") == 0
    assert [step for step, _ in written(name)] == list(range(1, 9))
    lost = pathlib.Path(name, "metrics.jsonl")
    lost.write_text(lost.read_text() + json.dumps({"step": 9, "loss": 0.0}) + '\n{"step": 1')
    assert pretrain.main(["--resume", name], projected) == 0
    found, rows = written(name), metrics(name)
    assert [step for step, _ in found] == list(range(1, 13))
    for (_, figures), row in zip(found, rows, strict=True):
        assert figures == pytest.approx({k: x for k, x in row.items() if k != "step"}, rel=1e-6)


def test_without_its_library_the_flag_says_what_to_install(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(begun)
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX.event_file_writer", None)
    assert run("--run-dir", str(tmp_path / "one"), "--tensorboard") == 2
    assert "pip install tensorboardX, or leave the flag out" in capsys.readouterr().err


CASES = [("full", False), ("full", True), ("subspace", True), ("layerwise", False)]


@pytest.mark.parametrize(("tier", "skips"), once_but([], CASES))
def test_a_step_that_is_looked_at_is_the_same_step(tier, skips):
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, method="random", **OPTIONS)
    step = training.make_train_step(
        lambda p: p,
        tx,
        optax.constant_schedule(1e-2),
        tier=tier,
        skip_nonfinite=skips,
        loss_of=lambda params, x, watch=None: loss_fn(params, x),
    )
    results = []
    for look in (False, True):
        state = training.new_state(jax.tree.map(jnp.copy, params), tx)
        results.append(step(state, batches(1)[0], look=look))
    (state, plainly), (other, looked) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, other)
    more = {name.partition("/")[0] for name in set(looked) - set(plainly)}
    wanted = {"subspace_overlap", "refreshed", "state_bytes"}
    wanted |= {"update_to_weight"} if tier != "layerwise" else set()
    assert more == wanted | ({"captured_energy"} if tier == "full" else set())
    if skips:
        bad = jnp.full_like(batches(1)[0], jnp.nan)
        _, figures = step(other, bad, look=True)
        assert figures["skipped"] == 1
        row = training.logged({k: float(x) for k, x in figures.items()})
        assert not any(name.startswith("subspace_overlap") for name in row)
