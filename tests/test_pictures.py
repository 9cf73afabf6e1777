"""Pictures of the quality table: what is coloured, and that names do not cover each other."""

import itertools
import json
import math

import matplotlib.figure
import pytest

from benchmarks import pictures


def row(loss, state=1e6):
    curves = [[[10, loss + 1], [20, loss]], [[10, loss + 1.1], [20, loss]]]
    return {
        "losses": [loss, loss + 0.01],
        "loss": loss,
        "perplexity": math.exp(loss),
        "weights": 2e6,
        "state": state,
        "validation": curves,
    }


def test_the_best_of_each_kind_has_a_colour():
    table = {"GaLore": row(1.5), "GaLore, lazy refresh": row(1.4), "AdamW": row(1.6)}
    table |= {"SCALE": row(1.0), "Muon": row(math.inf), "8-bit Muon": row(1.2)}
    assert pictures.colours(table).keys() == {"GaLore, lazy refresh", "AdamW", "8-bit Muon"}
    assert len(set(pictures.colours(table).values())) == 3


def apart(boxes):
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def words(figure):
    """The names that are written into a picture, and their boxes."""
    texts = [x for x in figure.axes[0].texts if isinstance(x, pictures.Annotation)]
    return [text.get_text() for text in texts], [text.get_window_extent() for text in texts]


@pytest.fixture(params=["quality", "quality_man"])
def table(request):
    return json.loads((pictures.RESULTS / f"{request.param}.json").read_text())["methods"]


@pytest.mark.parametrize("make", [pictures.curves, pictures.memory])
def test_names_in_the_pictures_of_the_results_do_not_touch(table, make):
    figure = make(table)
    figure.draw_without_rendering()
    names, boxes = words(figure)
    assert apart(boxes)
    assert {name.split("  ")[0] for name in names} >= pictures.colours(table).keys()
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert "MB" in figure.axes[0].get_xlabel() or "nats" in figure.axes[0].get_ylabel()


def test_rows_in_one_place_have_names_where_there_is_room():
    table = {f"GaLore, {i}": row(1.5 + i / 1000) for i in range(9)} | {"AdamW": row(1.2, 3e6)}
    names, boxes = words(pictures.memory(table))
    assert {"GaLore, 0", "AdamW"} <= set(names)
    assert len(names) < len(table) and apart(boxes)


def test_a_row_that_diverged_is_left_out(tmp_path):
    pictures.draw({"AdamW": row(math.inf)}, tmp_path, "none")
    assert not list(tmp_path.iterdir())
    pictures.draw({"AdamW": row(math.inf), "Muon": row(1.0)}, tmp_path, "one")
    for part in ("curves", "memory"):
        assert (tmp_path / f"one_{part}.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_makes_no_picture(tmp_path):
    one = {k: v[:1] if k in ("losses", "validation") else v for k, v in row(1.0).items()}
    pictures.draw({"AdamW": one}, tmp_path, "one")
    assert not list(tmp_path.iterdir())


def test_names_of_lines_that_end_alike_are_moved_apart():
    figure = matplotlib.figure.Figure(dpi=120)
    axes = figure.add_subplot()
    labels = [axes.annotate(f"row {y}", (1, y), va="center") for y in (0.5, 0.5, 0.51, 0.9)]
    figure.draw_without_rendering()
    free = labels[-1].get_window_extent().bounds
    pictures.move_apart(labels)
    boxes = [label.get_window_extent() for label in labels]
    assert apart(boxes)
    assert boxes[-1].bounds == free
