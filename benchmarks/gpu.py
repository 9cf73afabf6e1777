"""Peak memory and step times on a GPU: AdamW, optax.contrib.galore and every tier.

    python -m benchmarks.gpu

Every configuration runs in a process of its own, for `peak_bytes_in_use` is of a process's whole
life: first plain steps, then a refresh. Weights are float32, activations bfloat16, 4 x 256 tokens.
`7b in 24 GB` has bfloat16 weights, 8-bit moments, int8 projectors, tier 3, 1 x 256 tokens, and
may allocate no more than 24 GB. optax.contrib.galore refuses stacked layers: its blocks are a list
of trees, stacked by the loss. A plain step of tiers 2 and 3 is the program without refreshes.

`one matrix` takes one projector from a float32 gradient, by method.

What fails, or has no time left, is recorded as such; without a GPU every figure is
"not measured". Rows that the JSON of this GPU already has are kept, unless they are measured
again: time may be lent in small pieces. `--smoke` runs on the CPU, where there are times and no
peak.

XLA tries many kernels of its own for every float32 product, which takes it tens of seconds for a
refresh; `XLA_FLAGS=--xla_gpu_enable_triton_gemm=false` leaves products to cuBLAS. Each row says
with which flags it ran.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

# Waiting OpenBLAS threads spin; on a shared machine they slow everybody's decompositions down.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

from benchmarks import report, steps
from benchmarks.memory import small
from examples import llama
from galore_jax.projector.basis import METHODS

NOT_MEASURED = "not measured"
LIMIT = 24e9  # bytes of a 24 GB card
START_SECONDS = 15  # a process, before it has compiled anything


class Configuration(NamedTuple):
    """What one process runs."""

    model: str
    row: str
    seconds: float  # it may take
    batch: int = 4
    length: int = 256
    steps: int = 10
    limit: float | None = None  # bytes it may allocate


ROWS = {
    "optax.adamw": ("full", steps.adamw),
    "optax.contrib.galore": ("full", steps.contrib),
    "tier 1": ("full", steps.galore),
    "tier 2": ("subspace", steps.galore),
    "tier 3": ("layerwise", steps.galore),
}
IN_24_GB = "7b in 24 GB"
ONE_MATRIX = "one matrix"
SIZES = ((1024, 1024, 256), (4096, 4096, 1024), (4096, 11008, 1024))  # inputs, outputs, rank


def configurations(models, count) -> list[Configuration]:
    """The most wanted first: time may run out."""
    found = [Configuration("7b", IN_24_GB, 120, batch=1, steps=count, limit=LIMIT)]
    for model in models:
        found += [Configuration(model, row, 90, steps=count) for row in ROWS]
    return [*found, *(Configuration(ONE_MATRIX, method, 60, steps=count) for method in METHODS)]


def smoke(count) -> list[Configuration]:
    """One of each kind, for the smallest model."""
    return [Configuration("tiny", row, 120, 1, 16, count) for row in (*ROWS, IN_24_GB)]


def program(c: Configuration) -> tuple[steps.Problem, str, Any]:
    """The model, the tier and the optimizer of a configuration."""
    config = llama.CONFIGS[c.model]
    if c.row == IN_24_GB:
        half = dict(param_dtype="bfloat16", dtype="bfloat16", remat=True)
        config = dataclasses.replace(config, **half)
        return steps.stacked(config), "layerwise", small(config.hidden // 4, method="subspace")
    tier, optimizer = ROWS[c.row]
    config = dataclasses.replace(config, dtype="bfloat16", remat=True)
    listed = c.row == "optax.contrib.galore"
    problem = (steps.restacked if listed else steps.stacked)(config)
    return problem, tier, optimizer(*[config.hidden // 4] * (c.row != "optax.adamw"))


def child(c: Configuration) -> None:
    """Measure, and print what is known after each part: the next may not end."""
    device = jax.devices()[0]

    def say(**found):
        print(json.dumps(found), flush=True)

    def memory(key):
        return (device.memory_stats() or {}).get(key, NOT_MEASURED)

    say(device=device.device_kind, bytes_limit=memory("bytes_limit"))
    say(xla_flags=os.environ.get("XLA_FLAGS", ""))
    if c.model == ONE_MATRIX:
        for m, n, rank in SIZES:
            say(**{f"{m} x {n}, rank {rank}": one_matrix(c.row, m, n, rank, c.steps)})
        return
    problem, tier, tx = program(c)
    say(weights_bytes=steps.nbytes(problem.params))
    tokens = steps.tokens(problem.config, c.batch, c.length)
    plain = steps.train_step(tier, problem.loss, tx, refresh=False)
    began = time.monotonic()
    run = steps.Running(plain, tx, problem.params, tokens).at(1)
    report.seconds(run)
    say(plain_ready_seconds=time.monotonic() - began)
    times = [report.seconds(run) for _ in range(c.steps)]
    say(
        plain_seconds=statistics.median(times),
        peak_bytes=memory("peak_bytes_in_use"),
        compiled_bytes=steps.memory(run.step)["total"],
    )
    if c.row == "optax.adamw":
        return
    began = time.monotonic()
    if tier != "full":
        run.recompile(steps.train_step(tier, problem.loss, tx))
    report.seconds(run.at(0))
    say(refresh_ready_seconds=time.monotonic() - began)
    say(refresh_seconds=report.seconds(run.at(0)), peak_bytes_refresh=memory("peak_bytes_in_use"))


def one_matrix(method: str, m: int, n: int, rank: int, count: int) -> dict[str, float]:
    """Seconds to compile a method and to run it on one gradient."""
    gradient = jax.random.normal(jax.random.key(0), (m, n))
    previous = jax.random.orthogonal(jax.random.key(1), m)[:, :rank]

    def basis(gradient, previous):
        return METHODS[method](gradient, rank, previous, lambda: jax.random.key(0))

    began = time.monotonic()
    compiled = jax.jit(basis).lower(gradient, previous).compile()
    ready = time.monotonic() - began
    run = report.in_turns({method: lambda: compiled(gradient, previous)}, count)
    return {"seconds": run[method], "compile_seconds": ready}


def measured(c: Configuration, total: Any, seconds: float, platform: str | None) -> dict[str, Any]:
    """Run one process; what it said before its end or its failure."""
    environment = os.environ | ({"JAX_PLATFORMS": platform} if platform else {})
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if isinstance(total, int) and c.limit is not None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(c.limit / total)
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", json.dumps(c)]
    try:
        ended = subprocess.run(
            command, env=environment, timeout=seconds, capture_output=True, text=True
        )
        said, error, failed = ended.stdout, ended.stderr, ended.returncode != 0
    except subprocess.TimeoutExpired as expired:
        said = (expired.stdout or b"").decode()  # bytes, whatever `text` says
        error, failed = f"out of time after {seconds:.0f} s", True
    found: dict[str, Any] = {}
    for line in said.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found | ({"failed": reason(error)} if failed else {})


def reason(error: str) -> str:
    """The line of an error output that tells most."""
    if "RESOURCE_EXHAUSTED" in error:
        return "out of memory"
    lines = error.strip().splitlines()
    return lines[-1] if lines else "no message"


FIGURES = ("plain_seconds", "refresh_seconds", "peak_bytes", "peak_bytes_refresh")


def complete(found: dict[str, Any], c: Configuration) -> dict[str, Any]:
    """Every figure, or that it was not measured."""
    wanted = [f for f in FIGURES if c.row != "optax.adamw" or "refresh" not in f]
    if c.model == ONE_MATRIX:
        wanted = [f"{m} x {n}, rank {rank}" for m, n, rank in SIZES]
    return dict.fromkeys(wanted, NOT_MEASURED) | found


def known(path: pathlib.Path, device: str) -> dict[str, dict[str, Any]]:
    """The rows that were measured before on this device."""
    before = json.loads(path.read_text()) if path.exists() else {}
    return before["models"] if before.get("device") == device else {}


def probe(platform: str | None) -> tuple[str | None, Any]:
    """Name and bytes of the GPU, None without one."""
    code = """
import jax, json
device = jax.devices()[0]
stats = device.memory_stats() or {}
print(json.dumps([device.platform, device.device_kind, stats.get("bytes_limit")]))
"""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "1.0"
    environment |= {"JAX_PLATFORMS": platform} if platform else {}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    if ended.returncode:
        return None, None
    kind, name, total = json.loads(ended.stdout.splitlines()[-1])
    return (name if kind == "gpu" else None), total


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="*", default=["60m", "350m", "1b"])
    parser.add_argument("--rows", nargs="+", default=[*ROWS, IN_24_GB, *METHODS])
    parser.add_argument("--steps", type=int, default=10, help="timed plain steps of each")
    parser.add_argument("--budget", type=float, default=500, help="seconds for everything")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--child", help="for its own processes")
    args = report.parse(parser, argv, smoke=True, rows=["tier 2"], steps=1)
    if args.child:
        return child(Configuration(*json.loads(args.child)))

    # This process only starts the others: it must not take the GPU's memory.
    jax.config.update("jax_platforms", "cpu")
    end = time.monotonic() + args.budget
    platform = "cpu" if args.smoke else None
    name, total = probe(platform)
    todo = smoke(args.steps) if args.smoke else configurations(args.models, args.steps)
    todo = [c for c in todo if c.row in args.rows]
    device = "smoke test on the CPU" if args.smoke else name or f"no GPU: {NOT_MEASURED}"
    file = "gpu_smoke" if args.smoke else (name or "gpu").lower().replace(" ", "_")
    results = known(args.out / f"{file}.json", device)
    for c in todo:
        left = min(c.seconds, end - time.monotonic())
        if name is None and not args.smoke:
            found = {}
        elif left < START_SECONDS:
            found = {"failed": "no time left"}
        else:
            found = measured(c, total, left, platform)
        row = c._asdict() | complete(found, c)
        results.setdefault(c.model, {})[c.row] = row
        print(c.model, c.row, json.dumps(row), flush=True)

    report.write(
        file,
        {
            "device": device,
            "bytes": total if name else NOT_MEASURED,
            "command": args.command,
            "models": results,
        },
        out=args.out,
    )


if __name__ == "__main__":
    main()
