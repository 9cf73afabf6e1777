"""Pictures of runs: what is in them, whether it can be read, what is refused."""

import itertools
import json
import math
import pathlib

import pytest

from examples import plot


def write(folder, steps=40, every=10, rows=None, **settings):
    """The folder of a run."""
    path = pathlib.Path(folder)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"format": 1, "run_dir": str(path)} | settings))
    write_rows(path, range(1, steps + 1), every) if rows is None else write_lines(path, rows)
    return path


def write_rows(path, steps, every):
    rows = []
    for i in steps:
        row = {"step": i, "tokens": 64 * i, "loss": 2 + 4 / i}
        if i % every == 0:
            row |= {"val_loss": 2 + 3 / i, "captured_energy": 0.5, "tokens_per_second": 900.0}
            row |= {"captured_energy/blocks/mlp/up/kernel": 0.25, "subspace_overlap": 0.75}
        rows.append(row)
    write_lines(path, rows)


def write_lines(path, rows):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trainings(*folders):
    return [x for folder in folders for x in plot.read(pathlib.Path(folder))]


def labels(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_a_run_alone(capsys):
    write("one", rank=4)
    assert plot.main(["one"]) == 0
    assert capsys.readouterr().out.strip() == "one/plot.png"
    assert pathlib.Path("one/plot.png").read_bytes().startswith(b"\x89PNG")
    figure = plot.draw(trainings("one"))
    axes = [x.get_ylabel().replace("\n", " ") for x in figure.axes]
    assert axes[0].startswith("loss, nats per token") and "speed, tokens / s" in axes
    assert len(axes) == 4 and figure.axes[-1].get_xlabel() == "step"
    assert not figure.legends and figure.get_facecolor() == (1, 1, 1, 1)
    training, validation = figure.axes[0].lines
    assert list(validation.get_xdata()) == [10, 20, 30, 40]
    assert training.get_ydata()[0] == 6 and len(training.get_xdata()) == 40


def test_runs_are_told_apart_by_what_differs():
    write("a", rank=4, learning_rate=0.01, log_every=3, seed=0)
    write("b", rank=0.25, learning_rate=0.01, log_every=5, seed=0)
    figure = plot.draw(trainings("a", "b"))
    assert labels(figure) == ["rank 4", "rank 0.25"]
    colours = [handle.get_color() for handle in figure.legends[0].legend_handles]
    assert colours[0] != colours[1]
    write("c", rank=4, learning_rate=0.01, log_every=7, seed=0)
    names = labels(plot.draw(trainings("a", "b", "c")))
    assert names == ["a: rank 4", "b: rank 0.25", "c: rank 4"]
    assert labels(plot.draw(trainings("a", "c"))) == ["a", "c"]


def test_a_fine_tuning_has_a_line_for_each_seed():
    path = pathlib.Path("fine")
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"method": "galore", "seeds": [0, 1]}))
    for seed in (0, 1):
        (path / f"seed-{seed}").mkdir()
        rows = [{"step": i, "examples": 4 * i, "loss": 1 / i} for i in range(1, 9)]
        write_lines(path / f"seed-{seed}", [*rows, {"step": 9, "loss": 0.1, "val_accuracy": 0.5}])
    figure = plot.draw(trainings("fine"))
    assert labels(figure) == ["seed 0", "seed 1"]
    assert figure.axes[0].get_ylabel() == "loss (training)"
    assert labels(plot.draw(trainings("fine/seed-1", "fine/seed-0"))) == ["seed 1", "seed 0"]
    figure = plot.draw(trainings("fine"), ["val_accuracy"])
    assert [x.get_ylabel() for x in figure.axes] == ["val_accuracy"]


def test_keys_of_leaves():
    write("one")
    assert plot.main(["one", "--keys", "captured_energy/blocks/mlp/up/kernel", "val_loss"]) == 0
    figure = plot.draw(trainings("one"), ["captured_energy/blocks/mlp/up/kernel"])
    assert figure.axes[0].get_ylim() == (-0.03, 1.03)


def test_a_run_at_work_and_one_with_a_loss_that_is_not_finite():
    """Half a line at the end, one step alone, and NaN."""
    path = write("one", steps=1)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    write("bad", rows=[{"step": i, "loss": math.nan if i > 5 else 3.0 / i} for i in range(1, 9)])
    assert plot.main(["one", "bad", "--out", "both.png"]) == 0
    figure = plot.draw(trainings("one", "bad"))
    assert figure.axes[0].lines[0].get_marker() == "o"  # one point has no line
    assert figure.axes[0].get_ylabel() == "loss (training)"


def test_long_runs_are_averaged():
    write("one", steps=1000)
    training = plot.draw(trainings("one")).axes[0].lines[0]
    assert len(training.get_xdata()) == plot.POINTS
    first = [2 + 4 / i for i in range(1, 6)]
    assert training.get_xdata()[0] == 3
    assert training.get_ydata()[0] == pytest.approx(sum(first) / 5)


def test_nothing_lies_on_something_else():
    """With as many runs and settings as there may be: no text on another, none cut off."""
    for i in range(10):
        write(f"run{i}", rank=4 + i, learning_rate=0.001 * i, optimizer=f"galore_adamw{i}" * 4)
    figure = plot.draw(trainings(*(f"run{i}" for i in range(10))))
    figure.savefig("all.png")
    texts = [x.yaxis.label for x in figure.axes] + [figure.axes[-1].xaxis.label]
    texts += figure.legends[0].get_texts()
    boxes = [x.get_window_extent() for x in texts] + [x.bbox for x in figure.axes]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1


def refused(capsys, *args):
    assert plot.main(args) == 2
    return capsys.readouterr().err


def test_mistakes(capsys):
    write("one")
    pathlib.Path("empty").mkdir()
    write("begun", rows=[])
    assert "there is no folder 'nowhere'" in refused(capsys, "one", "nowhere")
    assert "'empty' holds no metrics.jsonl" in refused(capsys, "empty")
    assert "has no row yet. Wait for" in refused(capsys, "begun")
    message = refused(capsys, "one", "--keys", "loss", "enrgy")
    assert "--keys enrgy: no run has that. There are captured_energy, loss" in message
    assert "as captured_energy/blocks/mlp/up/kernel" in message
    assert "--out one/x.abc: Format 'abc'" in refused(capsys, "one", "--out", "one/x.abc")
    assert "--out no/x.png could not be written" in refused(capsys, "one", "--out", "no/x.png")
    pathlib.Path("one/config.json").write_text('{"rank": ')
    assert "is damaged (not a whole JSON object)" in refused(capsys, "one")
