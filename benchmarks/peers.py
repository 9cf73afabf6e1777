"""An optimizer's step beside other packages': Optax, galore-torch, flashoptim-jax and rollfast.

    taskset -c 0 python -m benchmarks.peers

The weights and gradients are those of `benchmarks.optimizer_step`. Plain and refresh steps are
timed in turns in one process, medians; the step applies the update, with buffers donated. `whole`
is a step with its gradients: as many of these blocks with a vocabulary of 4096 around them, 4 x 256
tokens; the optimizer has the blocks' kernels and AdamW the rest.

Seconds are those that the process had a core, not those that it waited for one: other work on the
machine takes from all rows alike, and with one core they are the time of a step.

A row whose package is not installed, or fails, says so.
"""

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

# One thread, as the seconds are those of all threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax

import galore_jax
from benchmarks import report, steps
from benchmarks.optimizer_step import FF, RANK, D, JaxStep, Stepping, TorchStep, of_optax, problem
from examples import llama

WHOLE = llama.LlamaConfig(4096, D, FF, heads=8)
PACKAGES = ("torch", "galore-torch", "flashoptim-jax", "rollfast", "numpy")
ADAMW, TORCH = "optax.adamw", "galore-torch"
RATE, DECAY = 1e-3, 0.1
TOKENS = (4, 256)  # sequences and their length


def flash_adamw() -> Stepping:
    # Its fused kernels are for GPUs; float32 weights have nothing that a correction could add.
    fused = jax.default_backend() == "gpu"
    package: Any = importlib.import_module("flashoptim_jax")
    tx = package.flash_adamw(RATE, weight_decay=DECAY, master_weight_bits=None, fused=fused)

    def init(params):  # not jitted, which would fold constants of the weights' size for long
        return jax.tree.map(jnp.array, tx.init(params))

    return Stepping(init, lambda grads, state, params: tx.step(params, state, grads))


def rollfast(module: str, name: str, **options) -> Stepping:
    make = getattr(importlib.import_module(module), name)
    return of_optax(make(RATE, weight_decay=DECAY, **options))


# By row; those that refresh their projectors.
ROWS: dict[str, Callable[[], Stepping]] = {
    ADAMW: lambda: of_optax(optax.adamw(RATE, weight_decay=DECAY)),
    "optax.contrib.galore": lambda: of_optax(
        optax.contrib.galore(RATE, weight_decay=DECAY, rank=RANK)
    ),
    "optax.contrib.muon": lambda: of_optax(optax.contrib.muon(RATE, weight_decay=DECAY)),
    "flashoptim_jax.flash_adamw": flash_adamw,
    "rollfast.adamw8": lambda: rollfast("rollfast", "adamw8"),
    "rollfast galore_adamw": lambda: rollfast("rollfast.optim.galore", "galore_adamw", rank=RANK),
    "galore_jax.galore_adamw": lambda: of_optax(
        galore_jax.galore_adamw(RATE, weight_decay=DECAY, rank=RANK)
    ),
    "galore_jax.galore_adamw8bit": lambda: of_optax(
        galore_jax.galore_adamw8bit(RATE, weight_decay=DECAY, rank=RANK)
    ),
    "galore_jax.adamw8bit": lambda: of_optax(galore_jax.adamw8bit(RATE, weight_decay=DECAY)),
    "galore_jax.galore_muon, int8": lambda: of_optax(
        galore_jax.galore_muon(RATE, weight_decay=DECAY, rank=RANK, accumulator_dtype="int8")
    ),
}
REFRESHING = (
    *("optax.contrib.galore", "rollfast galore_adamw", "galore_jax.galore_adamw"),
    *("galore_jax.galore_adamw8bit", "galore_jax.galore_muon, int8", TORCH),
)


class WholeStep:
    """A compiled, donated step of the model, with the optimizer on the blocks' kernels."""

    def __init__(self, tx: Stepping, config: llama.LlamaConfig):
        problem, rest = steps.unrolled(config), of_optax(steps.adamw())
        params = steps.weights(problem.params)
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path) for path, _ in flat]

        def split(tree):
            both = {}, {}
            for path, x in zip(paths, jax.tree.leaves(tree), strict=True):
                both["blocks" not in path or x.ndim < 2][path] = x
            return both

        def step(both, states, tokens):
            together = both[0] | both[1]
            tree = jax.tree.unflatten(structure, [together[path] for path in paths])
            loss, grads = jax.value_and_grad(problem.loss)(tree, tokens)
            parts = zip((tx, rest), split(grads), states, both, strict=True)
            done = [part.step(grad, state, params) for part, grad, state, params in parts]
            return *zip(*done, strict=True), loss

        self.both, self.tokens = split(params), steps.tokens(config, *TOKENS)
        self.states = tx.init(self.both[0]), rest.init(self.both[1])
        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self):
        self.both, self.states, loss = self.step(self.both, self.states, self.tokens)
        return loss, self.both


def made(rows: dict[str, Callable[[], Any]]) -> Iterator[tuple[str, Any]]:
    """What each row makes: a step that has run once, or why there is none."""
    for name, make in rows.items():
        try:
            step = make()
            jax.block_until_ready(step.plain() if hasattr(step, "plain") else step())
        except ImportError as error:
            yield name, f"not installed: {error.name}"
        except Exception as error:
            yield name, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            yield name, step


def split(found: Iterator[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The steps, and what failed."""
    together = dict(found)
    failed = {name: x for name, x in together.items() if isinstance(x, str)}
    return {name: x for name, x in together.items() if name not in failed}, failed


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--plain", type=int, default=21, help="timed plain steps of each")
    parser.add_argument("--refreshes", type=int, default=3, help="timed refreshes of each")
    parser.add_argument("--whole", type=int, default=9, help="timed whole steps of each")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=(*ROWS, TORCH), default=[*ROWS, TORCH])
    few = dict(rows=[ADAMW, "galore_jax.galore_adamw", TORCH], layers=1)
    args = report.parse(parser, argv, plain=1, refreshes=1, whole=1, **few)

    def times(functions, repeats):
        return report.in_turns(functions, repeats, clock=time.process_time)

    params, grads = problem(args.layers)
    rows: dict[str, Callable[[], Any]] = {
        name: lambda make=make: JaxStep(make(), grads, params) for name, make in ROWS.items()
    }
    rows[TORCH] = lambda: TorchStep(grads, params)
    alone, failed = split(made({name: rows[name] for name in args.rows}))
    refresh = times({n: x.refresh for n, x in alone.items() if n in REFRESHING}, args.refreshes)
    plain = times({n: x.plain for n, x in alone.items()}, args.plain)
    state = {name: x.state_bytes() for name, x in alone.items()}
    del alone

    config = dataclasses.replace(WHOLE, layers=args.layers)
    rows = {n: lambda n=n: WholeStep(ROWS[n](), config) for n in ROWS if n in plain}
    stepping, more_failed = split(made(rows))
    whole = times(stepping, args.whole)

    parts = (plain, refresh, whole, state)
    report.table(
        ["optimizer", "plain s", "refresh s", "whole s", "state bytes"],
        [[n, *(part.get(n, float("nan")) for part in parts)] for n in plain],
    )
    for name, why in (failed | more_failed).items():
        print(f"{name}: {why}")
    result = {
        "command": args.command,
        "layers": args.layers,
        "tokens": TOKENS[0] * TOKENS[1],
        "clock": "CPU seconds of the process",
        "plain_seconds": plain,
        "refresh_seconds": refresh,
        "whole_seconds": whole,
        "state_bytes": state,
        "weights_bytes": steps.nbytes(params),
        "failed": failed | more_failed,
    }
    report.write("peers", result, PACKAGES, args.out)


if __name__ == "__main__":
    main()
