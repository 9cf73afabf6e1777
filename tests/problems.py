"""Parameters, gradients and a numpy GaLore that the tests share."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# Moved there in JAX 0.8.
enable_x64 = (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64


def on_mesh(mesh):
    """A context in which a mesh is at hand."""
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def once_but(everywhere, cases):
    """Cases to run once, but for some that run in each environment."""

    def param(case):
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=() if case in everywhere else pytest.mark.slow)

    return [param(case) for case in cases]


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def low_rank_gradient(seed, *shape):
    """A gradient, or a stack of them, with a clear spectrum: 2^-j, in float32."""
    *batch, m, n = shape
    k = min(m, n)
    left, right = normal(seed, *batch, m, k), normal(seed + 10_000, *batch, k, n)
    return (left * 0.5 ** np.arange(k)).astype(np.float32) @ right


def params_like(shapes, seed=0, dtype=jnp.float32):
    return {k: jnp.asarray(normal(seed + i, *s), dtype) for i, (k, s) in enumerate(shapes.items())}


def grads_like(params, step):
    return {
        k: jnp.asarray(
            low_rank_gradient(100 * step + i, *p.shape) if p.ndim >= 2 else normal(step, *p.shape)
        )
        for i, (k, p) in enumerate(sorted(params.items()))
    }


def train(tx, params, steps, *, grads=grads_like, jit=True, state=None, start=0):
    """Apply `steps` updates; returns (params, state)."""
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update) if jit else tx.update
    for step in range(start, start + steps):
        updates, state = update(grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def galore_adamw_in_numpy(weight, gradients, *, rank, gap, scale, lr, decay, signs_of=None):
    """The paper's algorithm for one matrix stored (in, out), side `std`, in float64.

    `signs_of(step)` gives a basis whose signs the singular vectors take.
    """
    w = weight.astype(np.float64)
    mu = nu = 0.0
    for step, g in enumerate(g.astype(np.float64) for g in gradients):
        a = g if w.shape[0] <= w.shape[1] else g.T
        if step % gap == 0:
            p = np.linalg.svd(a)[0][:, :rank]
            p = p * np.sign(np.sum(p * np.asarray(signs_of(step)), axis=0))
        r = p.T @ a
        mu = 0.9 * mu + 0.1 * r
        nu = 0.999 * nu + 0.001 * r**2
        n = (mu / (1 - 0.9 ** (step + 1))) / (np.sqrt(nu / (1 - 0.999 ** (step + 1))) + 1e-8)
        lifted = p @ n if a is g else (p @ n).T
        w = w - lr * (scale * lifted + decay * w)
    return w


def run_with_devices(count, program):
    """Run a program in a process with several virtual devices; its failure is the test's."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    root = str(pathlib.Path(__file__).parents[1])
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    args = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(args, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
