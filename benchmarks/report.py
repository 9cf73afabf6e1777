"""What every benchmark shares: its flags, timing in turns, the machine, the JSON."""

import argparse
import json
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

import galore_jax

RESULTS = pathlib.Path(__file__).parent / "results"
QUICK = pathlib.Path("runs") / "quick"  # no quick figure lands among the real ones
PACKAGES = ("jax", "jaxlib", "optax", "flax")


def in_turns(functions, repeats, warmup=1, clock=time.perf_counter):
    """Median seconds of each function, called in turns so that drift hits all alike."""
    for _ in range(warmup):
        for function in functions.values():
            jax.block_until_ready(function())
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, clock))
    return {name: statistics.median(t) for name, t in times.items()}


def seconds(function, clock=time.perf_counter):
    """Seconds of one call, until its result is there."""
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Flags every benchmark takes; its docstring says what it is for, and its command."""
    command = re.search(r"python -m benchmarks\.\w+", str(doc))
    parser = argparse.ArgumentParser(
        prog=command and command[0], description=str(doc).splitlines()[0]
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help=f"folder for the JSON: benchmarks/results, or {QUICK} with --quick",
    )
    parser.add_argument("--quick", action="store_true", help="small: whether everything runs")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: Any
) -> argparse.Namespace:
    """The flags, and as `command` how they were given.

    Args:
      parser: made by `parser`, with the benchmark's own flags.
      argv: the words behind the command; those of this process by default.
      **quick: with --quick, the defaults of flags.
    """
    argv = sys.argv[1:] if argv is None else argv
    if parser.parse_args(argv).quick:
        parser.set_defaults(**quick)
    args = parser.parse_args(argv)
    args.out = args.out or (QUICK if args.quick else RESULTS)
    args.command = shlex.join([*parser.prog.split(), *portable(argv)])
    return args


def portable(argv: Sequence[str]) -> list[str]:
    """The words of a command without where they lay on this machine."""
    words = [re.sub(r"^(--[^=]+=)?/(.*/)?(?=[^/])", r"\1", word) for word in argv]
    while "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return [word for word in words if not word.startswith("--out=")]


def write(name, result, packages=(), out=RESULTS):
    """Write a result beside its command, the machine and the versions it was measured with.

    Args:
      name: of the JSON.
      result: what was measured, with the `command` that `parse` found.
      packages: more of them than every benchmark meets.
      out: its folder.
    """
    versions = {package: version(package) for package in (*PACKAGES, *packages)}
    result = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[2], 1),  # above the cores: other work had them too
        "python": platform.python_version(),
        "versions": versions | {"galore_jax": galore_jax.__version__},
        **result,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {os.path.relpath(path)}")


def version(package: str) -> str:
    """Of an installed package; a row may be without its own."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def table(head, rows):
    """Print rows of strings and numbers under a head."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
