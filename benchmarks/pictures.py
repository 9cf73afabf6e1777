"""The pictures of `benchmarks.quality`, drawn from its JSON: nothing is trained.

    python -m benchmarks.pictures           # of every quality*.json in benchmarks/results

Of methods of one kind the best is drawn in colour and named, the rest is grey. A row that diverged
is left out. One seed has no range, and no picture.
"""

import argparse
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

RESULTS = pathlib.Path(__file__).parent / "results"

# Methods of one kind begin with one of these words; colours that all eyes tell apart.
KINDS = {
    "#000000": ("AdamW",),
    "#0072b2": ("Muon",),
    "#56b4e9": ("8-bit Muon",),
    "#d55e00": ("galore_muon",),
    "#009e73": ("FRUGAL",),
    "#8c564b": ("LDAdam",),
    "#b8860b": ("GaLore", "GoLore", "optax.contrib.galore"),
    "#cc79a7": ("Fira", "APOLLO"),
    "#6a5acd": ("LoRA", "ReLoRA", "low rank"),
    "#7f0000": ("Alice",),
    "#556b2f": ("FOAM",),
    "#008b8b": ("RACS",),
}
GREY = "#a0a0a0"


def colours(table: dict[str, Any]) -> dict[str, str]:
    """Of the best of each kind."""
    best: dict[str, str] = {}
    for name in sorted(table, key=lambda n: table[n]["loss"]):
        kind = next((c for c, words in KINDS.items() if name.startswith(words)), None)
        if kind and kind not in best.values() and math.isfinite(table[name]["loss"]):
            best[name] = kind
    return best


def draw(table: dict[str, Any], out: pathlib.Path, name: str) -> None:
    """Loss curves, and perplexity against memory, where there are several seeds."""
    table = {name: row for name, row in table.items() if math.isfinite(row["loss"])}
    if any(len(row["losses"]) > 1 for row in table.values()):
        curves(table).savefig(out / f"{name}_curves.png", dpi=120)
        memory(table).savefig(out / f"{name}_memory.png", dpi=120)


def new_figure(**labels: str) -> tuple[matplotlib.figure.Figure, Any]:
    """Opaque, to be read on a dark page too."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot(axisbelow=True, **labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves(table: dict[str, Any]) -> matplotlib.figure.Figure:
    """The mean over the seeds; names stand at the lines' ends, with the last loss."""
    figure, axes = new_figure(
        xlabel="step (the last loss is of more batches)",
        ylabel="validation loss (nats per token)",
    )
    best, ends, firsts = colours(table), [], []
    for name, row in table.items():
        seeds = [dict(map(tuple, c)) for c in row["validation"]]
        steps = sorted(set.intersection(*map(set, seeds)))
        mean = [statistics.mean(c[s] for c in seeds) for s in steps]
        named = name in best
        style: dict[str, Any] = dict(color=best.get(name, GREY), linewidth=2 if named else 0.8)
        axes.plot(steps, mean, zorder=3 if named else 2, **style)
        if named:
            firsts.append(mean[0])
            ends.append((mean[-1], steps[-1], name))
    top = max(firsts)
    bottom = min(row["loss"] for row in table.values())
    axes.set_ylim(bottom - 0.05 * (top - bottom), top)  # grey lines may begin above
    labels = [
        axes.annotate(
            f"{name}  {loss:.3f}", (step, loss), color=best[name], va="center", **beside(8, 0)
        )
        for loss, step, name in sorted(ends)
    ]
    tell_grey(axes, table, best)
    figure.draw_without_rendering()  # sizes are known
    move_apart(labels)
    return figure


def memory(table: dict[str, Any]) -> matplotlib.figure.Figure:
    """A point and its range over the seeds; grey ones have a name where there is room."""
    figure, axes = new_figure(
        xlabel="weights and optimizer state (MB)",
        ylabel="validation perplexity (mean and range of the seeds)",
    )
    best, points = colours(table), {}
    for name, row in table.items():
        x, y = (row["weights"] + row["state"]) / 1e6, row["perplexity"]
        errors = [[y - math.exp(min(row["losses"]))], [math.exp(max(row["losses"])) - y]]
        named = name in best
        style: dict[str, Any] = dict(color=best.get(name, GREY), markersize=8 if named else 5)
        axes.errorbar(x, y, errors, fmt="o", capsize=2, zorder=3 if named else 2, **style)
        points[name] = x, y
    axes.margins(x=0.12, y=0.08)
    tell_grey(axes, table, best)
    figure.draw_without_rendering()  # sizes are known
    centres = [axes.transData.transform(point) for point in points.values()]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in centres]
    for name in sorted(points, key=lambda n: (n not in best, table[n]["loss"])):
        text = axes.annotate(
            name, points[name], color=best.get(name, "#707070"), fontsize=9 if name in best else 7
        )
        if box := room(text, taken, axes.get_window_extent()):
            taken.append(box)
        elif name in best:
            text.set(**beside(9, 0), va="center")
        else:
            text.remove()
    return figure


def tell_grey(axes, table: dict[str, Any], best: dict[str, str]) -> None:
    """Say in the free corner what has no colour."""
    if table.keys() - best.keys():
        note = "in grey: what is not the best of its kind"
        axes.text(
            0.99,
            0.98,
            note,
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=8,
            color="#707070",
        )


def beside(x: float, y: float) -> dict[str, Any]:
    """Where a name stands, in points from what it names."""
    return {"xytext": (x, y), "textcoords": "offset points"}


def room(text: Annotation, taken: Iterable[Bbox], inside: Bbox) -> Bbox | None:
    """Put a name to a side of its point where nothing is; its box, or None where none is free."""
    sides = [(9, 0, "left", "center"), (-9, 0, "right", "center")]
    sides += [(0, 9, "center", "bottom"), (0, -9, "center", "top")]
    sides += [(7, 7, "left", "bottom"), (7, -7, "left", "top")]
    for x, y, ha, va in sides:
        text.set(ha=ha, va=va)
        text.set_position((x, y))
        text.set_anncoords("offset points")
        box = text.get_window_extent()
        contained = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0
        if contained and not box.count_overlaps(list(taken)):
            return box
    return None


def move_apart(labels: Sequence[Annotation]) -> None:
    """Labels, lowest first, moved up from those below them."""
    placed: list[Bbox] = []
    for label in labels:
        box = label.get_window_extent()
        while below := [other for other in placed if other.overlaps(box)]:
            rise = max(other.y1 for other in below) + 1 - box.y0
            box = Bbox.from_bounds(box.x0, box.y0 + rise, box.width, box.height)
            x, y = label.get_position()
            label.set_position((x, y + rise * 72 / label.figure.dpi))
        placed.append(box)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the pictures")
    args = parser.parse_args(argv)
    for path in sorted(RESULTS.glob("quality*.json")):
        table = json.loads(path.read_text())["methods"]
        if isinstance(table, dict):  # where there was no GPU it says that nothing was measured
            draw(table, args.out, path.stem)


if __name__ == "__main__":
    main()
