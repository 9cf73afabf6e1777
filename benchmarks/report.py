"""What every benchmark shares: timing in turns, the machine, the JSON."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from importlib import metadata

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def in_turns(functions, repeats, warmup=1):
    """Median seconds of each function, called in turns so that drift hits all alike."""
    for _ in range(warmup):
        for function in functions.values():
            jax.block_until_ready(function())
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(t) for name, t in times.items()}


def seconds(function):
    """Seconds of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def parser(doc):
    """Arguments every benchmark takes, described by the first line of its docstring."""
    parser = argparse.ArgumentParser(description=str(doc).splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for the JSON")
    return parser


def write(name, result, packages, out=RESULTS):
    """Write a result beside the machine and the versions it was measured with."""
    device = jax.devices()[0]
    result = {
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in packages},
        **result,
    }
    out.mkdir(exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {os.path.relpath(path)}")


def table(head, rows):
    """Print rows of strings and numbers under a head."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
