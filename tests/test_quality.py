"""The quality benchmark's own logic: picking rates, going on, judging; and one quick run."""

import gzip
import json
import math
import os
import types

import pytest

from benchmarks import quality
from examples import command_line, pretrain


def test_a_rate_is_picked_where_both_neighbours_are_worse():
    asked = []

    def loss(rate):
        asked.append(rate)
        return abs(math.log2(rate / 8))

    found = quality.tune(loss, 1.0, reach=5)
    assert min(found, key=found.get) == 8
    assert sorted(found) == [0.5, 1, 2, 4, 8, 16]
    assert len(asked) == len(set(asked))


def test_the_search_ends_at_its_reach():
    assert sorted(quality.tune(lambda r: -r, 1.0, reach=2)) == [0.5, 1, 2, 4]
    assert quality.tune(lambda r: r, 3.0, reach=0) == {3.0: 3.0}
    diverging = quality.tune(lambda r: math.inf if r > 1 else 1 - r, 1.0, reach=3)
    assert min(diverging, key=diverging.get) == 1


def row(*losses, state=10):
    return {"losses": losses, "loss": sum(losses) / len(losses), "state_of_kernels": state}


def test_the_way_from_adamw_to_muon():
    table = {"AdamW": row(2.0, 2.2), "Muon": row(1.8, 1.8), "ours": row(1.9, 2.1, state=5)}
    judged = quality.verdicts(table)
    assert judged["ours"]["way_from_adamw_to_muon"] == pytest.approx(1 / 3)
    assert judged["ours"]["below_adamw_in_every_seed"]
    assert judged["ours"]["state_over_adamw"] == 0.5
    assert judged["Muon"]["way_from_adamw_to_muon"] == pytest.approx(1)
    assert not judged["AdamW"]["below_adamw_in_every_seed"]
    assert quality.verdicts({"AdamW": row(2.0)}) == {}


def test_bytes_are_those_of_the_formulas():
    budget = quality.BUDGETS["cpu"]
    sizes = {
        name: quality.state_bytes(quality.Run(name, 0.01, 1000, 0), budget)
        for name in ("AdamW", "Muon", "GaLore", "APOLLO", "galore_muon", "LoRA")
    }
    # The blocks' kernels: four 128 x 128, two 128 x 352, one 352 x 128, in four layers.
    kernels = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    r, sides = 32, [(128, 128)] * 4 + [(128, 352)] * 3
    low = 4 * sum(r * n for _, n in sides)
    bases = 4 * sum(r * m for m, _ in sides)
    assert sizes["AdamW"]["state_of_kernels"] == 4 * 2 * kernels
    assert sizes["Muon"]["state_of_kernels"] == 4 * kernels
    steps = 4 * len(sides)  # of the last refresh, by matrix
    assert sizes["GaLore"]["state_of_kernels"] == 4 * (2 * low + bases + steps)
    assert sizes["APOLLO"]["state_of_kernels"] == 4 * (2 * low + 4 * 7)  # and norms
    neurons = 4 * (4 * 128 + 2 * 352 + 128)
    assert sizes["galore_muon"]["state_of_kernels"] == 4 * (
        low + 4 * 7 * r + steps + neurons
    )  # and which rows
    assert sizes["LoRA"]["weights"] == sizes["AdamW"]["weights"] + 4 * (low + bases)
    # Embedding, head and norms are AdamW's everywhere.
    rest = {s["state"] - s["state_of_kernels"] for s in sizes.values()}
    assert max(rest) - min(rest) < 64


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_and_one_that_is_done_is_not_taken_again(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    budget, root = quality.BUDGETS["quick"], tmp_path / "runs" / "quick"
    run = quality.Run("AdamW", quality.METHODS["AdamW"].rate, budget.steps, 0)
    folder = run.folder(budget, root)
    # A run that stops after step 4 of 8, as one that was killed behind a checkpoint.
    flags = [*run.flags(budget), "--sample-tokens", "0", "--run-dir", str(folder)]
    assert pretrain.main([*flags, "--stop-at", "4"]) == 0
    (folder / "summary.json").unlink()
    # And the run before it, which picked the rate.
    tuned = quality.Run("AdamW", run.rate, budget.tuning_steps, budget.tuning_seed)
    tuned = tuned.folder(budget, root)
    tuned.mkdir()
    (tuned / "metrics.jsonl").write_text('{"step": 4, "loss": 7.0, "val_loss": 7.0}\n')
    (tuned / "summary.json").write_text("{}")

    few = ["--quick", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--jobs", "2"]
    quality.main([*few, "--methods", "AdamW", "--speed-rounds", "0"])
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert "from step" not in (folder / "log.txt").read_text()
    found = json.loads((tmp_path / "quality_quick.json").read_text())
    assert found["methods"].keys() == {"AdamW"}
    for line in found["methods"].values():
        assert math.isfinite(line["loss"]) and line["state"] > 0

    def not_again(*_, **__):
        raise AssertionError("trained again")

    assert quality.known(tmp_path / "quality_quick.json", budget) == found["methods"]
    assert quality.known(tmp_path / "quality_quick.json", quality.BUDGETS["cpu"]) == {}
    monkeypatch.setattr(quality.subprocess, "Popen", not_again)
    quality.main([*few, "--methods", "AdamW", "--speed-rounds", "0"])


@pytest.mark.slow
def test_a_method_that_fails_is_named(tmp_path):
    budget = quality.BUDGETS["quick"]
    run = quality.Run("AdamW", -1.0, budget.steps, 0)
    with pytest.raises(RuntimeError, match=r"pretrain.*failed: see .*log\.txt"):
        quality.train(run, budget, tmp_path, None)


@pytest.mark.parametrize("name", quality.BUDGETS)
def test_every_row_is_a_command_line_that_pretrain_takes(name):
    budget = quality.BUDGETS[name]
    for method in quality.METHODS:
        run = quality.Run(method, 0.01, budget.steps, 3)
        config = run.config(budget)[0]
        assert (config.steps, config.seed, config.learning_rate) == (budget.steps, 3, 0.01)
        assert config.rank > 0
    golore = quality.Run("GoLore", 0.01, budget.steps, 0)
    assert command_line.parse(golore.flags(budget)).random_from == int(0.8 * budget.steps)


def test_without_a_gpu_nothing_is_measured_on_one(tmp_path):
    quality.main(["--gpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "quality_gpu.json").read_text())
    assert found["methods"] == quality.NOT_MEASURED
    assert quality.known(tmp_path / "quality_gpu.json", quality.BUDGETS["gpu"]) == {}
    # What was measured elsewhere stays.
    found["methods"] = {"AdamW": row(1.0)}
    (tmp_path / "quality_gpu.json").write_text(json.dumps(found))
    quality.main(["--gpu", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "quality_gpu.json").read_text()) == json.loads(json.dumps(found))


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_training_that_diverges_is_a_row_without_end(tmp_path, monkeypatch, loss):
    budget = quality.BUDGETS["quick"]

    def diverging(command, stdout, stderr):
        stdout.write(f"The loss is {loss} at step 3. Lower --learning-rate.\n")
        return types.SimpleNamespace(pid=os.getpid(), wait=lambda: 1)

    monkeypatch.setattr(quality.subprocess, "Popen", diverging)
    run = quality.Run("AdamW", 0.01, budget.steps, 0)
    assert quality.train(run, budget, tmp_path, None) == math.inf
    table = quality.collect(budget, tmp_path, {"AdamW": {0.01: 3.0}})
    assert table["AdamW"]["loss"] == math.inf
    quality.show(table)


def test_manual_pages_are_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "_MAN_BYTES", 5000)
    root, long = tmp_path / "man", "word " * 600
    for name, content in {
        "man1/b.1.gz": long.encode(),
        "man7/a.7.gz": ("other " + long).encode(),
        "man7/same.7.gz": ("other " + long).encode(),
        "man7/short.7.gz": b".so man7/a.7",
        "man7/latin.7.gz": b"\xe9" * 3000,
        "man3/c.3.gz": long.encode(),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(content))
    folder = quality.write_manual_pages(tmp_path / "texts", root)
    assert sorted(path.name for path in folder.iterdir()) == ["a.7.txt", "b.1.txt"]
    assert quality.write_manual_pages(folder, tmp_path / "gone") == folder  # they stay as they are
    with pytest.raises(SystemExit, match="give --text FILES"):
        quality.write_manual_pages(tmp_path / "none", tmp_path / "gone")


def test_another_text_takes_the_rates_of_the_first(tmp_path, capsys):
    budget = quality.BUDGETS["quick"]
    other = quality.on_text(budget, str(tmp_path / "plays.txt"), tmp_path)
    assert other.flags == (*budget.flags, "--data", str(tmp_path / "plays.txt"))
    assert quality.on_text(budget, quality.STDLIB, tmp_path) == budget
    few = ["--quick", "--runs", str(tmp_path), "--out", str(tmp_path), "--text", "plays.txt"]
    with pytest.raises(SystemExit):
        quality.main([*few, "--methods", "AdamW", "8-bit Muon"])
    assert "measure AdamW, Muon on stdlib first" in capsys.readouterr().err
