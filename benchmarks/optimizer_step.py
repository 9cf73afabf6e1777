"""One optimizer step of LLaMA-60M's blocks: ours beside AdamW, optax.contrib and galore-torch.

    python -m benchmarks.optimizer_step

Plain and refresh steps are timed in turns in one process, medians; gradients have singular
values that fall as j^-0.7. The step applies the update, with buffers donated. Compile time is
that of `update` (traced, lowered and compiled) for 32 unrolled layers.
"""

import os
import time
from collections.abc import Callable
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
from galore_jax.projector.basis import METHODS

D, FF, LAYERS, RANK = 512, 1376, 8, 128
SHAPES = {
    **dict.fromkeys(("q", "k", "v", "o"), (D, D)),
    **dict.fromkeys(("gate", "up"), (D, FF)),
    "down": (FF, D),
}
PACKAGES = ("torch", "galore-torch", "numpy")
OURS, CONTRIB = "galore_jax", "optax.contrib.galore"


def decaying(rng, shape, power=0.7):
    k = min(shape)
    u = np.linalg.qr(rng.standard_normal((shape[0], k)))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], k)))[0]
    return ((u * np.arange(1, k + 1) ** -power) @ v.T).astype(np.float32)


def layers(make, count=LAYERS):
    return {str(i): {name: make(shape) for name, shape in SHAPES.items()} for i in range(count)}


def problem(count):
    """Weights and gradients of so many layers."""
    rng = np.random.default_rng(0)
    params = layers(lambda s: jnp.asarray(0.02 * rng.standard_normal(s), jnp.float32), count)
    return params, layers(lambda s: jnp.asarray(decaying(rng, s)), count)


def optimizers(methods=()):
    options: dict[str, Any] = dict(weight_decay=0.1, rank=RANK)
    yield "optax.adamw", optax.adamw(1e-3, weight_decay=0.1)
    yield CONTRIB, optax.contrib.galore(1e-3, **options)
    yield OURS, galore_jax.galore_adamw(1e-3, **options)
    for method in methods:
        yield f"galore_jax {method}", galore_jax.galore_adamw(1e-3, **options, method=method)


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
            [group], lr=1e-3, weight_decay=0.1, no_deprecation_warning=True
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


def compile_seconds(tx, repeats):
    """Median seconds to trace, lower and compile `update` for 32 unrolled layers."""
    params = layers(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), 32)
    state = jax.eval_shape(tx.init, params)
    times = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(tx.update).lower(params, state, params).compile()
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
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    few = dict(layers=1, methods=["subspace"])
    args = report.parse(parser, argv, plain=1, refreshes=1, compiles=1, **few)

    params, grads = problem(args.layers)
    steps: dict[str, JaxStep | TorchStep] = {
        name: JaxStep(tx, grads, params) for name, tx in optimizers(args.methods)
    }
    try:
        steps["galore-torch"] = TorchStep(grads, params)
    except ImportError as error:
        print(f"galore-torch: not measured, for want of {error.name}")

    refresh = report.in_turns({k: s.refresh for k, s in steps.items()}, args.refreshes)
    main_steps = {k: s.plain for k, s in steps.items() if not k.startswith("galore_jax ")}
    plain = report.in_turns(main_steps, args.plain, warmup=2)
    compiling = {name: compile_seconds(tx, args.compiles) for name, tx in optimizers()}
    energy = captured(grads, args.methods)

    none = float("nan")
    rows = [
        [k, plain.get(k, none), refresh[k], compiling.get(k, none), energy.get(k[11:], none)]
        for k in steps
    ]
    report.table(["optimizer", "plain s", "refresh s", "compile s", "energy / svd"], rows)
    measured = (("plain", plain), ("refresh", refresh), ("compile", compiling))
    others = (("contrib", CONTRIB), ("adamw", "optax.adamw"), ("galore-torch", "galore-torch"))
    ratios = {
        f"{part} / {other}": seconds[OURS] / seconds[name]
        for part, seconds in measured
        for other, name in others
        if name in seconds
    }
    report.table(["ours against", "ratio"], [[k, v] for k, v in ratios.items()])
    report.write(
        "optimizer_step",
        {
            "command": args.command,
            "layers": args.layers,
            "plain_seconds": plain,
            "refresh_seconds": refresh,
            "compile_seconds_32_layers": compiling,
            "captured_energy_over_svd": energy,
            "ratios": ratios,
        },
        PACKAGES,
        args.out,
    )


if __name__ == "__main__":
    main()
