"""Finished fine-tunings side by side: `python -m examples.finetune_table RUN...`.

As the paper's table of GLUE: a row for each method, its number formats and rank, a column for each
task, the mean over seeds and its spread, and what weights and optimizer state take.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from examples import config as config_lib
from examples import runs
from examples.errors import UserError, exit_code
from examples.finetune_config import RANKED, FinetuneConfig


def read(folder: pathlib.Path) -> tuple[FinetuneConfig, list[dict[str, Any]]]:
    """Settings of a run, and the figures of its seeds."""
    config = config_lib.read(folder, "RUN", FinetuneConfig)
    paths = [folder / f"seed-{seed}" / runs.SUMMARY for seed in config.seeds]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise UserError(f"RUN: {folder} has not ended; continue it with --resume {folder}.")
    return config, [json.loads(path.read_text()) for path in paths]


def of_seeds(values: Sequence[float], scale: float) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{scale * statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.2f}"


def table(folders: Sequence[pathlib.Path]) -> str:
    """Of finished runs, in Markdown."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    columns: list[str] = []
    for folder in folders:
        config, figures = read(folder)
        rank = f"{config.rank:g}" if config.method in RANKED else ""
        metric = figures[0]["metric"]
        name = config.task or ", ".join(pathlib.Path(x).stem for x in config.data)
        column = f"{name} ({metric})"
        model = pathlib.Path(config.init_from).name
        projectors = config.projector_dtype and f"{config.projector_dtype} projectors"
        how = ", ".join(filter(None, (config.method, config.param_dtype, projectors)))
        row = rows.setdefault((model, how, rank), {})
        # Shares as percentages, as the paper has them; a loss as it is.
        row[column] = of_seeds(
            [x[f"val_{metric}"] for x in figures], 1 if metric == "loss" else 100
        )
        for what in ("weights", "state"):
            row[f"{what}, MB"] = f"{figures[0][f'{what}_bytes'] / 1e6:.4g}"
        columns += [column] * (column not in columns)
    head = ["model", "method", "rank", *columns, "weights, MB", "state, MB"]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    lines += [[*key, *(row.get(name, "") for name in head[3:])] for key, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def main(args: Sequence[str] | None = None) -> int:
    """The command line."""
    folders = sys.argv[1:] if args is None else args
    if not folders or folders[0].startswith("-"):
        print(__doc__)
        return 0 if folders else 2
    return exit_code(lambda: print(table([pathlib.Path(name) for name in folders])))


if __name__ == "__main__":
    sys.exit(main())
