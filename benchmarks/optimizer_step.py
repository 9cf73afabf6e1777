"""One step of an optimizer: ours beside Optax's, galore-torch, flashoptim-jax and rollfast.

    python -m benchmarks.optimizer_step

The weights are those of LLaMA-60M's blocks; gradients have singular values that fall as j^-0.7.
Plain and refresh steps are timed in turns in one process, medians; the step applies the update,
with buffers donated. `whole` is a step with the gradients: 4 of these blocks with a vocabulary of
4096 around them, 4 x 256 tokens; the optimizer has the blocks' kernels and AdamW the rest. Compile
time is that of `update` (traced, lowered and compiled) for 32 unrolled layers.

A row whose package is not installed, or fails, says so.
"""

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Waiting OpenBLAS threads spin; on a shared machine they slow everybody's decompositions down.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax
from benchmarks import report, steps
from examples import llama
from galore_jax.projector.basis import METHODS

D, FF, LAYERS, RANK = 512, 1376, 8, 128
SHAPES = {
    **dict.fromkeys(("q", "k", "v", "o"), (D, D)),
    **dict.fromkeys(("gate", "up"), (D, FF)),
    "down": (FF, D),
}
WHOLE = llama.LlamaConfig(4096, D, FF, heads=8, layers=4)
PACKAGES = ("torch", "galore-torch", "flashoptim-jax", "rollfast", "numpy")
OURS, CONTRIB, ADAMW, TORCH = "galore_jax", "optax.contrib.galore", "optax.adamw", "galore-torch"
RATE, DECAY = 1e-3, 0.1


class Stepping(NamedTuple):
    """An optimizer of any package: `step(grads, state, params) -> (params, state)`.

    No two arrays of the state that `init` makes share a buffer: they are donated.
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]


def of_optax(tx: optax.GradientTransformation) -> Stepping:
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Stepping(jax.jit(tx.init), step)


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


def galore(**options) -> optax.GradientTransformation:
    return galore_jax.galore_adamw(RATE, weight_decay=DECAY, rank=RANK, **options)


# By row; those that refresh their projectors.
ROWS: dict[str, Callable[[], Stepping]] = {
    ADAMW: lambda: of_optax(optax.adamw(RATE, weight_decay=DECAY)),
    CONTRIB: lambda: of_optax(optax.contrib.galore(RATE, weight_decay=DECAY, rank=RANK)),
    "optax.contrib.muon": lambda: of_optax(optax.contrib.muon(RATE, weight_decay=DECAY)),
    "flashoptim_jax.flash_adamw": flash_adamw,
    "rollfast.adamw8": lambda: rollfast("rollfast", "adamw8"),
    "rollfast galore_adamw": lambda: rollfast("rollfast.optim.galore", "galore_adamw", rank=RANK),
    OURS: lambda: of_optax(galore()),
    "galore_jax.galore_adamw8bit": lambda: of_optax(
        galore_jax.galore_adamw8bit(RATE, weight_decay=DECAY, rank=RANK)
    ),
    "galore_jax.adamw8bit": lambda: of_optax(galore_jax.adamw8bit(RATE, weight_decay=DECAY)),
    "galore_jax.galore_muon, int8": lambda: of_optax(
        galore_jax.galore_muon(RATE, weight_decay=DECAY, rank=RANK, accumulator_dtype="int8")
    ),
}
REFRESHING = (CONTRIB, "rollfast galore_adamw", OURS)


def decaying(rng, shape, power=0.7):
    k = min(shape)
    u = np.linalg.qr(rng.standard_normal((shape[0], k)))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], k)))[0]
    return ((u * np.arange(1, k + 1) ** -power) @ v.T).astype(np.float32)


def layers(make, count=LAYERS):
    return {str(i): {name: make(shape) for name, shape in SHAPES.items()} for i in range(count)}


class JaxStep:
    """A compiled, donated step of an optimizer that keeps its state."""

    def __init__(self, tx: Stepping | optax.GradientTransformation, grads, params):
        made = tx if isinstance(tx, Stepping) else of_optax(tx)
        self.grads, self.params = grads, jax.tree.map(jnp.array, params)
        self.state = made.init(self.params)
        self.step = jax.jit(made.step, donate_argnums=(1, 2))

    def plain(self):
        self.params, self.state = self.step(self.grads, self.state, self.params)
        return self.params

    def refresh(self):
        self.state = steps.at(self.state, 0)
        return self.plain()

    def state_bytes(self) -> int:
        return steps.nbytes(self.state)


class TorchStep:
    """galore-torch's AdamW on the same weights, stored (out, in)."""

    def __init__(self, grads, params):
        import galore_torch
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.weights = []
        for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
            p = torch.nn.Parameter(torch.tensor(np.asarray(w).T.copy()))
            p.grad = torch.tensor(np.asarray(g).T.copy())
            self.weights.append(p)
        group: Any = dict(
            params=self.weights, rank=RANK, update_proj_gap=200, scale=0.25, proj_type="std"
        )
        self.optimizer = galore_torch.GaLoreAdamW(
            [group], lr=RATE, weight_decay=DECAY, no_deprecation_warning=True
        )

    def plain(self):
        self.optimizer.step()

    def refresh(self):
        for p in self.weights:
            if p in self.optimizer.state:
                self.optimizer.state[p]["step"] = 0
        self.optimizer.step()

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        arrays = [x for s in states for x in (*s.values(), s["projector"].ortho_matrix)]
        return sum(x.numel() * x.element_size() for x in arrays if hasattr(x, "numel"))


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

        self.both, self.tokens = split(params), steps.tokens(config, 4, 256)
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


def compile_seconds(tx, repeats):
    """Median seconds to trace, lower and compile `update` for 32 unrolled layers."""
    params = layers(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), 32)
    state = jax.eval_shape(tx.init, params)
    times = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(tx.step).lower(params, state, params).compile()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def captured(grads, methods):
    """Energy in each method's subspace over svd's, the least over the matrices."""
    least = {}
    for method in methods:
        function, shares = METHODS[method], []
        for g in jax.tree.leaves(grads["0"]):
            a = g if g.shape[0] <= g.shape[1] else g.T
            start = jnp.eye(a.shape[0], RANK)
            p = function(a, RANK, start, lambda: jax.random.key(0))
            best = jnp.sum(jnp.linalg.svd(a, compute_uv=False)[:RANK] ** 2)
            shares.append(float(jnp.sum((p.T @ a) ** 2) / best))
        least[method] = min(shares)
    return least


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--plain", type=int, default=21, help="timed plain steps of each")
    parser.add_argument("--refreshes", type=int, default=3, help="timed refreshes of each")
    parser.add_argument("--compiles", type=int, default=3, help="timed compilations of each")
    parser.add_argument("--whole", type=int, default=7, help="timed whole steps of each")
    parser.add_argument("--layers", type=int, default=LAYERS, help="whose weights are updated")
    parser.add_argument("--rows", nargs="+", choices=(*ROWS, TORCH), default=[*ROWS, TORCH])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    few = dict(rows=[ADAMW, OURS, TORCH], methods=["subspace"], layers=1)
    args = report.parse(parser, argv, plain=1, refreshes=1, compiles=0, whole=1, **few)

    rng = np.random.default_rng(0)
    params = layers(lambda s: jnp.asarray(0.02 * rng.standard_normal(s), jnp.float32), args.layers)
    grads = layers(lambda s: jnp.asarray(decaying(rng, s)), args.layers)
    rows: dict[str, Callable[[], Any]] = {
        name: lambda make=make: JaxStep(make(), grads, params) for name, make in ROWS.items()
    }
    rows[TORCH] = lambda: TorchStep(grads, params)
    alone, failed = split(made({name: rows[name] for name in args.rows}))
    by_method = {
        f"{OURS} {method}": JaxStep(galore(method=method), grads, params) for method in args.methods
    }
    refreshing = {n: x.refresh for n, x in alone.items() if n in (*REFRESHING, TORCH)}
    refreshing |= {n: x.refresh for n, x in by_method.items()}
    refresh = report.in_turns(refreshing, args.refreshes)
    plain = report.in_turns({n: x.plain for n, x in alone.items()}, args.plain, warmup=2)
    state = {name: x.state_bytes() for name, x in alone.items()}
    del by_method, alone, refreshing

    config = dataclasses.replace(WHOLE, layers=min(args.layers, WHOLE.layers))
    rows = {n: lambda n=n: WholeStep(ROWS[n](), config) for n in ROWS if n in plain}
    stepping, more_failed = split(made(rows))
    whole = report.in_turns(stepping, args.whole)
    del stepping
    compiled = (ADAMW, CONTRIB, OURS) if args.compiles else ()
    compiling = {name: compile_seconds(ROWS[name](), args.compiles) for name in compiled}
    energy = captured(grads, args.methods)

    none = float("nan")
    parts = (plain, refresh, whole, state, compiling)
    report.table(
        ["optimizer", "plain s", "refresh s", "whole s", "state bytes", "compile s"],
        [[n, *(part.get(n, none) for part in parts)] for n in (*ROWS, TORCH) if n in plain],
    )
    ratios = {
        f"{part} / {other}": seconds[OURS] / seconds[name]
        for part, seconds in (("plain", plain), ("refresh", refresh), ("compile", compiling))
        for other, name in (("contrib", CONTRIB), ("adamw", ADAMW), ("galore-torch", TORCH))
        if name in seconds and OURS in seconds
    }
    report.table(["ours against", "ratio"], [[k, v] for k, v in ratios.items()])
    for name, why in (failed | more_failed).items():
        print(f"{name}: {why}")
    result = {
        "command": args.command,
        "layers": args.layers,
        "whole_step": {"layers": config.layers, "vocab_size": config.vocab_size, "tokens": 1024},
        "plain_seconds": plain,
        "refresh_seconds": refresh,
        "whole_seconds": whole,
        "state_bytes": state,
        "weights_bytes": steps.nbytes(params),
        "compile_seconds_32_layers": compiling,
        "captured_energy_over_svd": energy,
        "ratios": ratios,
        "failed": failed | more_failed,
    }
    report.write("optimizer_step", result, PACKAGES, args.out)


if __name__ == "__main__":
    main()
