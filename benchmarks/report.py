"""What every benchmark shares: timing in turns, the machine, the JSON."""

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
            times[name].append(_once(function))
    return {name: statistics.median(t) for name, t in times.items()}


def _once(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def write(name, result, packages):
    """Write a result beside the machine and the versions it was measured with."""
    device = jax.devices()[0]
    result = {
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in packages},
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path.relative_to(pathlib.Path(__file__).parent.parent)}")


def table(head, rows):
    """Print rows of strings and numbers under a head."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
