"""Optimizer state per device and bytes that an update sends, for 8 devices: compiled, never run.

    python -m benchmarks.devices

The paper's 7B model under FSDP, float32, layers stacked: each kernel is cut as the example
cuts it, along its longest axis, and the state as `galore_jax.state_sharding` says. Counted are the
bytes that each device receives in the compiled `tx.update`, in a step without a refresh and in one
with. What the step itself sends under FSDP comes on top and is the same for all: the weights twice,
and the gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

import galore_jax
from benchmarks import report, steps
from examples import llama, meshes, optimizers

DEVICES = 8
GIB = 2**30
OPTIMIZERS = ("adamw", "muon", "galore_adamw", "galore_adamw8bit", "galore_muon")

# Bytes that a device receives, over those of the result, on n devices.
RECEIVED: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "reduce-scatter": lambda n: n - 1,
}
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


def sent(program: str, devices: int, *, refresh: bool) -> float:
    """Bytes that each device receives in a compiled program.

    Args:
        program: its text, `compiled.as_text()`.
        devices: how many take part.
        refresh: of each conditional count the branch that sends the most, not the least.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("  "):
            lines.append(line)

    def size(types: str) -> float:
        found = re.findall(r"(\w+)\[([\d,]*)\]", types)
        return sum(WIDTHS[d] * math.prod(int(x) for x in n.split(",") if x) for d, n in found)

    def named(line: str, *fields: str) -> list[str]:
        found = (re.search(rf"\b{field}=(\{{[^}}]*\}}|[^,\s]+)", line) for field in fields)
        return [name.lstrip("%") for f in found if f for name in re.split(", *", f[1].strip("{}"))]

    def cost(name: str) -> float:
        total = 0.0
        for line in computations[name]:
            parts = re.match(r"\s+(?:ROOT )?\S+ = (.+?) ([\w\-]+)\(", line)
            if parts is None:
                continue
            types, operation = parts.groups()
            if operation in RECEIVED:
                total += RECEIVED[operation](devices) * size(types)
            elif operation == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                inside = sum(map(cost, named(line, "body", "condition")))
                if inside and not trips:
                    raise ValueError(f"a loop of unknown length sends something: {line}")
                total += inside * int(trips[1] if trips else 1)
            elif operation == "conditional":
                branches = named(
                    line, "branch_computations", "true_computation", "false_computation"
                )
                total += (max if refresh else min)(map(cost, branches))
            elif operation in ("call", "fusion"):
                total += sum(map(cost, named(line, "to_apply", "calls")))
        return total

    return cost(entry)


def figures(tx: Any, params: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Of one optimizer."""
    where = meshes.parameter_shardings(mesh, params)
    state = jax.eval_shape(tx.init, params)
    of_state = galore_jax.state_sharding(tx, params, where)
    held = sum(
        np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(of_state), strict=True)
    )

    grads, old = steps.placed(params, where), steps.placed(state, of_state)
    update = jax.jit(tx.update, out_shardings=(where, of_state), donate_argnums=(0, 1))
    program = update.lower(grads, old, grads).compile().as_text() or ""
    return {
        "state_bytes": steps.nbytes(state),
        "state_bytes_per_device": int(held),
        "plain_bytes": int(sent(program, mesh.size, refresh=False)),
        "refresh_bytes": int(sent(program, mesh.size, refresh=True)),
    }


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    args = report.parse(parser, argv, model="60m", optimizers=OPTIMIZERS[::2])
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Auto,))
    config = llama.CONFIGS[args.model]
    params = steps.stacked(config).params
    galore: dict[str, Any] = {"rank": config.hidden // 4, "update_proj_gap": 200}
    found = {}
    for name in args.optimizers:
        options: dict[str, Any] = galore if "rank" in optimizers.OPTIMIZERS[name].options else {}
        tx = optimizers.create(name, steps.LEARNING_RATE, weight_decay=0.0, **options)
        found[name] = figures(tx, params, mesh)
        print(name, found[name], flush=True)
    rows = [[name, *(f"{x / GIB:.2f}" for x in row.values())] for name, row in found.items()]
    report.table(["GiB", "state", "a device", "sent, plain", "sent, refresh"], rows)
    result = {
        "command": args.command,
        "model": args.model,
        "rank": galore["rank"],
        "weights_bytes": steps.nbytes(params),
        "optimizers": found,
    }
    report.write("devices", result, out=args.out)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
