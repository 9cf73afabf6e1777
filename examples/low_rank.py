"""Low-rank weights, the paper's baselines: other ways to write the kernels of a LLaMA's blocks.

A kernel (layers, in, out) becomes a dict of factors, and `assemble` multiplies it out again
where the model needs it, so the model, the loss and the optimizers stay what they are:

    low_rank    W = A B                      Kamalakara et al., https://arxiv.org/abs/2209.13569
    refactored  as low_rank; every T steps A and B are balanced by an SVD of A B, and the first
                moments reset                Glentis et al., https://arxiv.org/abs/2505.22922
    lora        W = W0 + A B, W0 fixed       Hu et al., https://arxiv.org/abs/2106.09685
    relora      as lora; every T steps A B is added to W0, A and B begin anew, their moments too,
                and the learning rate warms up again. No full-rank phase before, as the GaLore
                paper has it                 Lialin et al., https://arxiv.org/abs/2307.05695
"""

import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Weights = Literal["full", "lora", "relora", "low_rank", "refactored"]
RESTARTING = ("relora", "refactored")
# Steps of the warmup after each restart of ReLoRA, as a share of the steps between two.
REWARM = 0.1


def is_kernel(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is a kernel of the blocks (or a factor of one): what GaLore projects."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return names[0] == "blocks" and "kernel" in names


def factorise(weights: Weights, params: dict, rank: int, key: jax.Array) -> dict:
    """Write the blocks' kernels as factors: the same model, or the nearest of that rank.

    Args:
      weights: which factors.
      params: the parameters of a model with full kernels.
      rank: inner size of A (layers, in, rank) and B (layers, rank, out).
      key: of the random A of lora and relora, whose B is zero.
    """
    if weights == "full":
        return params

    def factors(path, w):
        if not is_kernel(path):
            return w
        if weights in ("low_rank", "refactored"):
            return balanced(w, rank)
        name = jax.tree_util.keystr(path)
        return {"base": w} | fresh(w, rank, jax.random.fold_in(key, hash_of(name)))

    return jax.tree_util.tree_map_with_path(factors, params)


def assemble(params: dict) -> dict:
    """Multiply the factors out, giving the parameters of the model. W0 gets no gradient."""
    if not any(map(_is_factors, jax.tree.leaves(params, is_leaf=_is_factors))):
        return params

    def kernel(w):
        if not _is_factors(w):
            return w
        product = w["a"] @ w["b"]
        return product + jax.lax.stop_gradient(w["base"]) if "base" in w else product

    return jax.tree.map(kernel, params, is_leaf=_is_factors)


def labels(params: dict) -> dict:
    """A tree of `kernel`, `fixed` (W0) and `other` (embeddings, head, norms)."""

    def label(path, _):
        if not is_kernel(path):
            return "other"
        return "fixed" if getattr(path[-1], "key", None) == "base" else "kernel"

    return jax.tree_util.tree_map_with_path(label, params)


def rewarmed(schedule: optax.Schedule, gap: int) -> optax.Schedule:
    """A learning rate that rises anew after each restart of ReLoRA, at steps T, 2T, ..."""
    rise = max(1, int(REWARM * gap))

    def rate(step):
        since = jnp.where(step < gap, rise, step % gap + 1)
        return schedule(step) * jnp.minimum(1.0, since / rise)

    return rate


def make_restart(weights: Weights, seed: int) -> Callable[[dict], dict]:
    """What happens every T steps: from one training state to the next, compiled."""

    def without(which: tuple[str, ...], state: Any) -> Any:
        """Zero the named moments of the kernels' factors."""

        def zeroed(path, x):
            names = [getattr(k, "name", getattr(k, "key", None)) for k in path]
            of_factor = "kernel" in names and names[-1] in ("a", "b")
            return jnp.zeros_like(x) if of_factor and set(which) & set(names) else x

        return jax.tree_util.tree_map_with_path(zeroed, state)

    def restart(state: dict) -> dict:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])

        def factors(path, w):
            if not _is_factors(w):
                return w
            rank = w["a"].shape[-1]
            if weights == "refactored":
                return balanced(w["a"] @ w["b"], rank)
            name = jax.tree_util.keystr(path)
            base = w["base"] + w["a"] @ w["b"]
            return {"base": base} | fresh(base, rank, jax.random.fold_in(key, hash_of(name)))

        params = jax.tree_util.tree_map_with_path(factors, state["params"], is_leaf=_is_factors)
        which = ("mu",) if weights == "refactored" else ("mu", "nu")
        opt_state = without(which, state["opt_state"])
        return state | {"params": params, "opt_state": opt_state}

    return jax.jit(restart, donate_argnums=0)


def balanced(w: jax.Array, rank: int) -> dict[str, jax.Array]:
    """The nearest product of that rank, each factor with the roots of the singular values."""
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
    return {"a": a.astype(w.dtype), "b": b.astype(w.dtype)}


def fresh(w: jax.Array, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """Factors whose product is zero."""
    a = jax.random.normal(key, (*w.shape[:-1], rank), w.dtype) * w.shape[-2] ** -0.5
    return {"a": a, "b": jnp.zeros((*w.shape[:-2], rank, w.shape[-1]), w.dtype)}


def hash_of(name: str) -> int:
    """A number for a leaf's name, the same on every run."""
    return zlib.crc32(name.encode())


def _is_factors(x: Any) -> bool:
    return isinstance(x, dict) and {"a", "b"} <= set(x) <= {"a", "b", "base"}
