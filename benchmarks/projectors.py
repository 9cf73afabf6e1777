"""Ways to compute a projector, on gradients of a model in training: time and captured energy.

    python -m benchmarks.projectors

A LLaMA with the matrices of each of the paper's models asked for, but few layers and a small
vocabulary, is trained on the Python standard library; at refresh steps each method computes the
projectors of the same gradients, the warm-started one from its own of T steps before. Captured
energy is ||P^T G||^2 over that of the leading singular vectors. The library's default has to
keep 0.999 of it here and on the slowly falling spectra of `benchmarks.optimizer_step`.
"""

import dataclasses
import inspect
import os
import statistics
import tempfile
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_jax
from benchmarks import report
from examples import data, llama
from galore_jax.projector.basis import METHODS

LEAST = 0.999
SETTINGS = ("models", "steps", "gap", "layers")
PACKAGES = ("numpy",)


def training_gradients(model, steps, gap, layers):
    """Train with AdamW; yield the gradients of the blocks' kernels at steps 0, T, 2T, ..."""
    config = dataclasses.replace(llama.CONFIGS[model], layers=layers, vocab_size=1024)
    graph, params = llama.create(config, seed=0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = tx.init(params)

    @jax.jit
    def step(params, state, tokens):
        def loss(p):
            logits = nnx.merge(graph, p)(tokens[:, :-1])
            return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads["blocks"]

    with tempfile.TemporaryDirectory() as cache:
        text = data.load((), vocab_size=1024, seq_len=128, batch_size=8, seed=0, cache_dir=cache)
    for i, tokens in zip(range(steps + 1), text.train, strict=False):
        params, state, loss, grads = step(params, state, jnp.asarray(tokens))
        if i % gap == 0:
            print(f"step {i}: loss {loss:.3f}", flush=True)
            yield {
                f"{jax.tree_util.keystr(path[:-1], simple=True, separator='/')}/{layer}": g[layer]
                for path, g in jax.tree_util.tree_leaves_with_path(grads)
                if g.ndim == 3
                for layer in range(layers)
            }


def measure(model, args):
    """Seconds by method and shape, and shares of the energy by method."""
    rank = int(llama.RECIPES[model].rank)
    compiled = {
        name: jax.jit(
            lambda a, old, seed, method=method: method(a, rank, old, lambda: jax.random.key(seed))
        )
        for name, method in METHODS.items()
    }
    energy = jax.jit(lambda a: jnp.cumsum(jnp.linalg.svd(a, compute_uv=False) ** 2)[rank - 1])
    bases, times, shares = {}, {m: {} for m in METHODS}, {m: [] for m in METHODS}
    gradients = training_gradients(model, args.steps, args.gap, args.layers)
    for refresh, grads in enumerate(gradients):
        for path, g in grads.items():
            a = g if g.shape[0] <= g.shape[1] else g.T
            best = float(energy(a))
            for name, function in compiled.items():
                old = bases.get((name, path), jnp.eye(a.shape[0], rank))
                jax.block_until_ready(function(a, old, refresh))
                start = time.perf_counter()
                p = jax.block_until_ready(function(a, old, refresh))
                shape = f"{'x'.join(map(str, a.shape))} [{rank}]"
                times[name].setdefault(shape, []).append(time.perf_counter() - start)
                shares[name].append(float(jnp.sum((p.T @ a) ** 2)) / best)
                bases[name, path] = p
    return times, shares


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["60m", "350m"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--gap", type=int, default=20, help="T, between two refreshes")
    parser.add_argument("--layers", type=int, default=1)
    args = report.parse(parser, argv, models=["60m"], steps=1, gap=1)

    times, shares = {m: {} for m in METHODS}, {m: [] for m in METHODS}
    for model in args.models:
        more_times, more_shares = measure(model, args)
        for m in METHODS:
            times[m].update(more_times[m])
            shares[m] += more_shares[m]
    seconds = {
        m: {shape: statistics.median(t) for shape, t in by_shape.items()}
        for m, by_shape in times.items()
    }
    shapes = list(seconds["svd"])
    least = {m: min(s) for m, s in shares.items()}
    median = {m: statistics.median(s) for m, s in shares.items()}
    report.table(
        ["method", *(f"{s} seconds" for s in shapes), "median energy / svd", "least"],
        [[m, *(seconds[m][s] for s in shapes), median[m], least[m]] for m in METHODS],
    )
    enough = [m for m in METHODS if least[m] >= LEAST]
    fastest = min(enough, key=lambda m: sum(seconds[m].values()))
    default = inspect.signature(galore_jax.galore).parameters["method"].default
    print(f"fastest with at least {LEAST}: {fastest}; the library's default: {default}")
    report.write(
        "projectors",
        {
            "command": args.command,
            "arguments": {name: getattr(args, name) for name in SETTINGS},
            "seconds": seconds,
            "median_energy_over_svd": median,
            "least_energy_over_svd": least,
            "fastest_with_0.999": fastest,
            "default": default,
        },
        PACKAGES,
        args.out,
    )


if __name__ == "__main__":
    main()
