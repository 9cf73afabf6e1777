"""Draws the metrics of runs, finished or at work: `python -m examples.plot RUN...`.

    python -m examples.plot runs/tiny-galore_adamw-20261129-101500
    python -m examples.plot runs/* --out all.png --keys val_loss captured_energy

Training and validation loss against the step; of runs with --diagnostics also how much of the
gradient the subspace holds, how much of it a refresh keeps, how large updates are, and the speed.
Several runs are told apart by the settings that differ.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import matplotlib.lines

from examples import runs
from examples.errors import UserError, exit_code
from examples.files import disk_errors

LINE = {"linewidth": 1.2}
DOTS = {"linewidth": 0.7, "marker": "o", "markersize": 4, "markeredgecolor": "white"}
# A panel for each group that a run has some of: what its axis is, its keys and how they look.
PANELS: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = (
    ("loss", {"loss": LINE | {"alpha": 0.55}, "val_loss": DOTS}),
    ("captured energy,\nshare of |gradient|²", {"captured_energy": LINE}),
    ("overlap with the\nlast subspace, share", {"subspace_overlap": DOTS}),
    ("|update| / |weight|", {"update_to_weight": LINE}),
    ("speed, tokens / s", {"tokens_per_second": LINE}),
    ("speed, examples / s", {"examples_per_second": LINE}),
)
SHARES = ("captured_energy", "subspace_overlap")
POINTS = 200  # To a line: neighbours are averaged, so that several runs can be told apart.
# Of Okabe and Ito, and of Tol: told apart by all eyes, on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
STYLES = ("-", "--", ":")  # Once the colours are used up.
# Settings that say where and when, and nothing of what was trained.
ASIDE = {
    *("format", "run_dir", "resume", "stop_at", "seeds", "cache_dir", "prompt", "sample_tokens"),
    *("log_every", "eval_every", "save_every", "keep", "diagnostics", "tensorboard"),
}


class Training(NamedTuple):
    """What a training has left so far."""

    folder: pathlib.Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    def points(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and figures of a key."""
        found = {row["step"]: float(row[key]) for row in self.rows if key in row}
        return list(found), list(found.values())


def read(folder: pathlib.Path) -> list[Training]:
    """The training in a run's folder, or, of a fine-tuning, one for each seed."""
    if not folder.is_dir():
        raise UserError(f"RUN: there is no folder {str(folder)!r}. Give one that a run printed.")
    seeds = sorted(path.parent for path in folder.glob(f"seed-*/{runs.METRICS}"))
    if not seeds and not (folder / runs.METRICS).exists():
        raise UserError(
            f"RUN: {str(folder)!r} holds no {runs.METRICS}. Give the folder of a run; one that has"
            " just begun has it from its first look at the loss."
        )
    trainings = []
    for path in seeds or [folder]:
        rows = runs.read_metrics(path)
        if not rows:
            raise UserError(
                f"RUN: {str(path / runs.METRICS)!r} has no row yet. Wait for the run's first look"
                " at the loss, or leave it out."
            )
        of_a_seed = path.name.startswith("seed-")
        settings = read_settings(path.parent if of_a_seed else path)
        if of_a_seed:
            settings["seed"] = path.name.removeprefix("seed-")
        trainings.append(Training(path, settings, rows))
    return trainings


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """Those in config.json, of whatever version; none where it is not there."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(
            f"RUN: {str(path)!r} is damaged (not a whole JSON object). Bring it back from a copy,"
            " or remove it: then the folder's name stands for its settings."
        ) from None


def names(trainings: Sequence[Training]) -> list[str]:
    """What tells trainings apart: the settings that differ, else the folders."""
    keys = dict.fromkeys(key for x in trainings for key in x.settings if key not in ASIDE)
    differ = [key for key in keys if len({json.dumps(x.settings.get(key)) for x in trainings}) > 1]

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:g}"
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    found = []
    for x in trainings:
        own = [f"{key} {shown(x.settings[key])}" for key in differ if key in x.settings]
        found.append(", ".join(own))
    if len(set(found)) == len(found) and all(found):
        return found
    pairs = zip(trainings, found, strict=True)
    return [": ".join(filter(None, (str(x.folder), name))) for x, name in pairs]


def panels(trainings: Sequence[Training], keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Those that there is something for; of given keys one each."""
    there = dict.fromkeys(key for x in trainings for row in x.rows for key in row if key != "step")
    if missing := [key for key in keys if key not in there]:
        leaf = next((key for key in there if "/" in key), None)
        raise UserError(
            f"--keys {' '.join(missing)}: no run has that. There are"
            f" {', '.join(sorted(key for key in there if '/' not in key))}"
            + (f", and leaves, as {leaf}." if leaf else "; with --diagnostics runs have more.")
        )
    if keys:
        marks = {key: look for _, group in PANELS for key, look in group.items()}
        return [(key.replace("/", "/\n", 1), {key: marks.get(key, LINE)}) for key in keys]
    found = []
    for label, group in PANELS:
        some = {key: look for key, look in group.items() if key in there}
        if some and label == "loss":
            if all("tokens" in x.rows[0] for x in trainings):
                label = "loss, nats per token"
            label += "\n(line: training, dots: validation)" if "val_loss" in some else " (training)"
        if some:
            found.append((label, some))
    return found


def averaged(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Means of as many neighbours as leave `POINTS` points."""
    many = -(-len(steps) // POINTS)
    starts = range(0, len(steps), max(1, many))
    means = [[statistics.fmean(x[i : i + many]) for i in starts] for x in (steps, values)]
    return means[0], means[1]


def draw(trainings: Sequence[Training], keys: Sequence[str] = ()) -> matplotlib.figure.Figure:
    """A panel above the other, of all trainings.

    Args:
        trainings: from `read`.
        keys: what to draw of the metrics, a panel each; by default `PANELS`.
    """
    wanted, labels = panels(trainings, keys), names(trainings)
    labels = [textwrap.fill(label, 100) for label in labels]
    several = len(trainings) > 1
    heights = [3.2] + [2.0] * (len(wanted) - 1)
    below = 0.2 * (1 + sum(label.count("\n") + 1 for label in labels)) if several else 0.3
    # A Figure of its own, not pyplot: no global state, no display. Opaque, for dark pages too.
    figure = matplotlib.figure.Figure(
        figsize=(8, sum(heights) + below + 0.4), layout="constrained", facecolor="white"
    )
    grid = figure.subplots(
        len(wanted), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    handles = []
    for i, name in enumerate(labels):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        line = matplotlib.lines.Line2D([], [], label=name, color=colour, linestyle=style)
        handles.append(line)
    for axes, (label, group) in zip(grid[:, 0], wanted, strict=True):
        late = []  # Of the loss, whose beginning would leave the rest no room.
        for x, handle in zip(trainings, handles, strict=True):
            for key, look in group.items():
                steps, values = x.points(key)
                if key != "subspace_overlap" and not key.startswith("val_"):
                    steps, values = averaged(steps, values)
                if not steps:
                    continue
                alone = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
                own = {"color": handle.get_color(), "linestyle": handle.get_linestyle()}
                axes.plot(steps, values, **own, **(look | alone))
                if "loss" in key:
                    end = steps[-1] / 10
                    late += [v for s, v in zip(steps, values, strict=True) if s >= end]
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
        late = [value for value in late if math.isfinite(value)]
        if late and max(late) > min(late):
            room = 0.05 * (max(late) - min(late))
            axes.set_ylim(min(late) - room, max(late) + room)
        if set(group) <= {*SHARES} or label.startswith(SHARES):
            axes.set_ylim(-0.03, 1.03)
    grid[-1, 0].set_xlabel("step")
    figure.align_ylabels()
    if several:
        figure.legend(handles=handles, loc="outside lower left", frameon=False)
    else:
        figure.suptitle(trainings[0].folder.name)
    return figure


def plot(folders: Sequence[pathlib.Path], out: pathlib.Path | None, keys: Sequence[str]) -> None:
    """Draws runs into a file, and says which."""
    trainings = [x for folder in folders for x in read(folder)]
    if out is None:
        out = folders[0] / "plot.png" if len(folders) == 1 else pathlib.Path("plot.png")
    figure = draw(trainings, keys)
    with disk_errors(f"--out {out} could not be written", "Give another file."):
        try:
            figure.savefig(out, dpi=120)
        except ValueError as error:  # Of a kind that is not known.
            raise UserError(f"--out {out}: {error}") from error
    print(out)


def main(args: Sequence[str] | None = None) -> int:
    """The command line."""
    first, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m examples.plot",
        description=f"{first}\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or of several")
    where = "picture to write, by default RUN/plot.png, or plot.png here for several runs"
    parser.add_argument("--out", type=pathlib.Path, help=where)
    what = "what to draw of the metrics instead, a panel each"
    parser.add_argument("--keys", nargs="+", default=(), help=what)
    given = parser.parse_args(sys.argv[1:] if args is None else args)
    return exit_code(lambda: plot([pathlib.Path(x) for x in given.runs], given.out, given.keys))


if __name__ == "__main__":
    sys.exit(main())
