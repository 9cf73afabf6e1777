"""Each benchmark runs, on the smallest settings, and writes what it says it writes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import devices, gpu, memory, report, steps, tiers
from examples import llama

SMALL = llama.LlamaConfig(256, 64, 96, heads=2, layers=2)


@pytest.mark.parametrize("form", [steps.restacked, steps.unrolled])
def test_the_forms_of_the_model_have_one_loss(form):
    whole, listed = steps.stacked(SMALL), form(SMALL)
    params, tokens = steps.weights(whole.params), steps.tokens(SMALL, 2, 8)
    blocks = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(SMALL.layers)]
    assert jax.tree.structure(listed.params) == jax.tree.structure(params | {"blocks": blocks})
    np.testing.assert_allclose(
        listed.loss(params | {"blocks": blocks}, tokens), whole.loss(params, tokens), rtol=1e-6
    )


def test_weights_look_like_an_initialisation():
    made = steps.weights(steps.stacked(SMALL).params)
    kernel = made["blocks"]["mlp"]["up"]["kernel"]
    assert abs(jnp.mean(kernel)) < 1e-3
    assert jnp.std(kernel) == pytest.approx(0.02, rel=0.02)
    np.testing.assert_array_equal(made["blocks"]["mlp_norm"]["scale"], 1)


def test_counters_are_set():
    problem, tx = steps.stacked(SMALL), steps.adamw()
    run = steps.Running(
        steps.train_step("full", problem.loss, tx), tx, problem.params, steps.tokens(SMALL, 1, 8)
    )
    run.at(7)()
    assert optax.tree.get(run.state, "count", filtering=lambda p, x: True) == 8


def test_contrib_refuses_stacked_layers():
    assert steps.contrib_on_stack(steps.stacked(SMALL).params, 8).startswith("refused")


@pytest.fixture
def small_models(monkeypatch):
    for name in ("tiny", "60m"):
        monkeypatch.setitem(llama.CONFIGS, name, SMALL)


@pytest.mark.slow
def test_memory(tmp_path, small_models, monkeypatch):
    monkeypatch.setattr(memory, "LONG", 32)
    monkeypatch.setattr(memory, "LENGTH", 16)
    for recipe in ("tier 1", "tier 2", "tier 3"):
        monkeypatch.delitem(memory.RECIPES, recipe)
    # What a refresh takes, tests of the library ask.
    smallest = memory.RECIPES[memory.SMALLEST]._replace(programs=(False,))
    monkeypatch.setitem(memory.RECIPES, memory.SMALLEST, smallest)
    memory.main(["--models", "60m", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "memory.json").read_text())["models"]["60m"]
    assert found["steps"]["adamw"]["plain"]["arguments"] == pytest.approx(3, rel=1e-2)
    for recipe in memory.RECIPES:
        for parts in found["steps"][recipe].values():
            assert parts["total"] == pytest.approx(
                parts["arguments"] + parts["temporaries"], rel=0.01
            )
    assert found["steps"][memory.SMALLEST]["plain"]["arguments"] < 2
    assert found["estimates"].keys() == {"adamw", memory.SMALLEST}


@pytest.mark.slow
def test_tiers(tmp_path, small_models, monkeypatch):
    # A program for each row: it grows with a list of blocks, and with each projected kernel.
    monkeypatch.setitem(llama.CONFIGS, "tiny", dataclasses.replace(SMALL, layers=1))
    one = functools.partial(steps.galore, method="svd", exclude="^(?!.*mlp/up)")
    monkeypatch.setattr(steps, "galore", one)
    monkeypatch.delitem(tiers.FORMS, "blocks stacked by the loss")
    few = "--rank 8 --batch 1 --length 8 --plain 1 --refreshes 1 --passes 1 --gap 4 --stagger-gap 4"
    tiers.main(["--model", "tiny", *few.split(), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "tiers.json").read_text())
    assert tiers.TARGETS.keys() <= found["ratios"].keys()
    assert all(t > 0 for row in found["seconds"].values() for t in row.values())


@pytest.mark.slow
def test_gpu_smoke(tmp_path):
    gpu.main(["--smoke", "--rows", "tier 2", "--steps", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_smoke.json").read_text())
    assert "smoke" in found["device"]
    row = found["models"]["tiny"]["tier 2"]
    assert row["plain_seconds"] > 0 and row["refresh_seconds"] > 0
    assert row["peak_bytes"] == gpu.NOT_MEASURED  # a CPU does not say


def test_gpu_without_one_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "probe", lambda platform: (None, None))
    gpu.main(["--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = [row for model in found["models"].values() for row in model.values()]
    figures = [x for row in rows for k, x in row.items() if k not in gpu.Configuration._fields]
    assert set(figures) == {gpu.NOT_MEASURED}
    assert found["device"] == "no GPU: not measured"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        ("...\nRESOURCE_EXHAUSTED: Out of memory allocating\nmore", "out of memory"),
        ("Traceback\nValueError: no\n", "ValueError: no"),
        ("", "no message"),
    ],
)
def test_gpu_says_why_a_process_failed(error, wanted):
    assert gpu.reason(error) == wanted


@pytest.mark.slow
def test_a_failed_process_is_recorded(tmp_path):
    row = gpu.Configuration("no such model", "tier 1", 120)
    found = gpu.complete(gpu.measured(row, None, 120, "cpu"), row)
    assert "no such model" in found["failed"]
    assert found["plain_seconds"] == gpu.NOT_MEASURED


def test_gpu_rows_measured_before_on_this_device_are_kept(tmp_path):
    file = tmp_path / "gpu.json"
    assert gpu.known(file, "one") == {}
    file.write_text(json.dumps({"device": "one", "models": {"1b": {"tier 1": {"steps": 1}}}}))
    assert gpu.known(file, "one") == {"1b": {"tier 1": {"steps": 1}}}
    assert gpu.known(file, "another") == {}


def test_gpu_times_one_matrix_by_method():
    found = gpu.one_matrix("subspace", 20, 30, 5, 1)
    assert found["seconds"] > 0 and found["compile_seconds"] > 0


def test_results_go_where_they_are_told(tmp_path):
    report.write("x", {"a": 1}, ("jax",), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "x.json").read_text())["a"] == 1


PROGRAM = """
HloModule jit_f

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} all-reduce(%x), to_apply=%add
}

%refresh (x: f32[8]) -> f32[8] {
  ROOT %y = (f32[1]{0}, /*index=1*/f32[7]{0}) all-to-all(%x), dimensions={0}
}

%plain (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %a = bf16[4,2]{1,0:T(8)} all-gather(%x), dimensions={0}
  %w = f32[8]{0} while(%a), condition=%plain, body=%body, config={"known_trip_count":{"n":"3"}}
  ROOT %c = f32[8]{0} conditional(%p, %w, %w), branch_computations={%plain, %refresh}
}
"""


def test_bytes_sent_are_those_of_the_program():
    plain = 16 * 7 / 8 + 3 * 32 * 2 * 7 / 8
    assert devices.sent(PROGRAM, 8, refresh=False) == plain
    assert devices.sent(PROGRAM, 8, refresh=True) == plain + 32 * 7 / 8
    with pytest.raises(ValueError, match="unknown length"):
        devices.sent(PROGRAM.replace("known_trip_count", ""), 8, refresh=False)
