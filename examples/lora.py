"""LoRA: a kernel as W0 + A B, of which A and B are trained.

A kernel (..., in, out) becomes a dict of `base`, `a` (..., in, rank) and `b` (..., rank, out), and
`assemble` multiplies it out again where the model needs it, so the model, the loss and the
optimizers stay what they are.

Reference: Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fresh(w: jax.Array, rank: int | float, key: jax.Array) -> dict[str, jax.Array]:
    """Factors whose product is zero; below 1 the rank is a share of the smaller side."""
    rank = int(rank) if rank >= 1 else max(1, round(rank * min(w.shape[-2:])))
    a = jax.random.normal(key, (*w.shape[:-1], rank), w.dtype) * w.shape[-2] ** -0.5
    return {"a": a, "b": jnp.zeros((*w.shape[:-2], rank, w.shape[-1]), w.dtype)}


def factorise(
    params: dict, rank: int | float, key: jax.Array, chosen: Callable[[tuple[Any, ...]], bool]
) -> dict:
    """The same model, with factors beside the kernels whose paths are chosen."""

    def factors(path, w):
        if not chosen(path):
            return w
        name = jax.tree_util.keystr(path)
        return {"base": w} | fresh(w, rank, jax.random.fold_in(key, hash_of(name)))

    return jax.tree_util.tree_map_with_path(factors, params)


def assemble(params: dict) -> dict:
    """Multiplies the factors out, giving the parameters of the model. W0 gets no gradient."""

    def kernel(w):
        if not is_factors(w):
            return w
        product = w["a"] @ w["b"]
        return product + jax.lax.stop_gradient(w["base"]) if "base" in w else product

    return jax.tree.map(kernel, params, is_leaf=is_factors)


def label(path: tuple[Any, ...], _: Any) -> str:
    """Of a leaf: `kernel` for what is trained, factors and a classifier, `fixed` for the rest."""
    names = [getattr(entry, "key", None) for entry in path]
    return "kernel" if names[-1] in ("a", "b") or names[0] == "classifier" else "fixed"


def is_factors(x: Any) -> bool:
    """Whether a node stands for a kernel."""
    return isinstance(x, dict) and {"a", "b"} <= set(x) <= {"a", "b", "base"}


def hash_of(name: str) -> int:
    """A number for a leaf's name, the same on every run."""
    return zlib.crc32(name.encode())
