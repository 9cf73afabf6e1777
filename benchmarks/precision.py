"""What 8-bit moments, projectors and weights cost in quality: final losses of the main job.

    python -m benchmarks.precision

The tiny LLaMA of `examples.pretrain` is trained with its recipe, once for each format and
seed: the same order of data, the same first weights. Differences are of the final validation
loss, over the whole split, from that of float32 with the same seed; means over the seeds.
With `--formats` only some are measured, float32 again beside them, and the JSON keeps the others
where float32 ended as it did for them.
"""

import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks import report

INT8_WEIGHTS = ["--param-dtype", "int8", "--tier", "layerwise"]

FORMATS = {
    "float32": [],
    "8-bit moments": ["--optimizer", "galore_adamw8bit"],
    "int8 projectors": ["--projector-dtype", "int8"],
    "int4 projectors": ["--projector-dtype", "int4"],
    "8-bit moments, int8 projectors": [
        *("--optimizer", "galore_adamw8bit", "--projector-dtype", "int8")
    ],
    "bfloat16 weights, to nearest": ["--param-dtype", "bfloat16"],
    "bfloat16 weights": ["--param-dtype", "bfloat16", "--stochastic-rounding"],
    "int8 weights, to nearest": [*INT8_WEIGHTS, "--no-stochastic-rounding"],
    "int8 weights": INT8_WEIGHTS,
}
# Largest differences that are good enough.
WANTED = {"8-bit moments": 0.005, "int8 projectors": 0.005, "int4 projectors": 0.02}
WANTED |= {"int8 weights": 0.01}


def final_loss(options: list[str]) -> float:
    """Validation loss at the end of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "examples.pretrain", "--run-dir", str(run), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (run / "metrics.jsonl").read_text().splitlines()
    return [x["val_loss"] for x in map(json.loads, lines) if "val_loss" in x][-1]


def known(path: pathlib.Path, float32: list[float]) -> dict:
    """What a JSON has, if its float32 runs ended alike: others cannot be compared with it."""
    found = json.loads(path.read_text()) if path.exists() else {}
    before = found.get("final_losses", {}).get("float32", [])
    alike = len(before) == len(float32) and all(map(math.isclose, before, float32))
    return found if alike else {}


def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    args = report.parse(parser, argv, seeds=1, steps=2, formats=["int8 weights"])

    losses: dict[str, list[float]] = {n: [] for n in FORMATS if n in {"float32", *args.formats}}
    for seed in range(args.seeds):
        for name in losses:
            options = [*FORMATS[name], "--seed", str(seed), "--steps", str(args.steps)]
            losses[name].append(final_loss(options))
            print(f"seed {seed}, {name}: {losses[name][-1]:.4f}", flush=True)
    relative = {
        name: statistics.mean(a / b - 1 for a, b in zip(found, losses["float32"], strict=True))
        for name, found in losses.items()
    }
    report.table(
        ["format", "final losses", "against float32", "wanted"],
        [
            [n, " ".join(f"{x:.4f}" for x in losses[n]), relative[n], WANTED.get(n, "-")]
            for n in losses
        ],
    )
    before = known(args.out / "precision.json", losses["float32"])
    result = {
        "command": args.command,
        "final_losses": before.get("final_losses", {}) | losses,
        "relative_to_float32": before.get("relative_to_float32", {}) | relative,
        "wanted": WANTED,
    }
    report.write("precision", result, out=args.out)


if __name__ == "__main__":
    main()
