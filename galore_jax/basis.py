"""Orthonormal bases of a matrix's leading left singular directions.

Each method maps a matrix `a` of shape (k, c) to an orthonormal `p` of shape (k, r) with
r < min(k, c). To add a method, write a function of the same signature and name it in
`METHODS`. Signs are fixed (`canonical_signs`), or follow the previous basis, because the
moments of the inner optimizer survive a refresh and would otherwise meet arbitrary flips.

All arithmetic is float32 or wider at the highest matmul precision: a Gram matrix in TF32 or
bfloat16 passes would lose the small singular directions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

Method = Callable[[jax.Array, int, jax.Array, jax.Array], jax.Array]


def canonical_signs(p: jax.Array) -> jax.Array:
    """Flip columns so that the entry of largest magnitude in each is positive."""
    pivot = jnp.take_along_axis(p, jnp.argmax(jnp.abs(p), axis=0, keepdims=True), axis=0)
    return jnp.where(pivot < 0, -p, p)


def svd(a: jax.Array, rank: int, previous: jax.Array, key: jax.Array) -> jax.Array:
    """Leading left singular vectors by a full SVD, as in the paper."""
    del previous, key
    u, _, _ = jnp.linalg.svd(a, full_matrices=False)
    return canonical_signs(u[:, :rank])


def eigh(a: jax.Array, rank: int, previous: jax.Array, key: jax.Array) -> jax.Array:
    """The same vectors from the eigenvectors of the smaller Gram matrix."""
    del previous, key
    if a.shape[0] <= a.shape[1]:
        return canonical_signs(_leading(_dot(a, a.T), rank))
    # a^T a = V L V^T gives U = a V L^-1/2. QR does the scaling, and stays orthonormal where
    # the gradient's rank is below r and L is zero.
    return canonical_signs(_orthonormal(_dot(a, _leading(_dot(a.T, a), rank))))


def randomized(a: jax.Array, rank: int, previous: jax.Array, key: jax.Array) -> jax.Array:
    """Randomized range finder with power iterations, then a small exact decomposition."""
    del previous
    oversampled = min(rank + max(16, rank // 4), *a.shape)
    q = _orthonormal(_dot(a, jax.random.normal(key, (a.shape[1], oversampled), a.dtype)))
    for _ in range(2):
        q = _orthonormal(_dot(a, _dot(a.T, q)))
    b = _dot(q.T, a)
    return canonical_signs(_dot(q, _leading(_dot(b, b.T), rank)))


def subspace(a: jax.Array, rank: int, previous: jax.Array, key: jax.Array) -> jax.Array:
    """One block power iteration from the previous basis: cheap, and aligned with it."""
    del rank, key
    return _orthonormal(_dot(a, _dot(a.T, previous)))


def random(a: jax.Array, rank: int, previous: jax.Array, key: jax.Array) -> jax.Array:
    """A uniformly random orthonormal basis; the gradient is not looked at."""
    del previous
    return _orthonormal(jax.random.normal(key, (a.shape[0], rank), a.dtype))


METHODS: dict[str, Method] = {
    "svd": svd,
    "eigh": eigh,
    "randomized": randomized,
    "subspace": subspace,
    "random": random,
}


def _leading(gram: jax.Array, rank: int) -> jax.Array:
    _, vectors = jnp.linalg.eigh(gram)
    return vectors[:, ::-1][:, :rank]


def _orthonormal(y: jax.Array) -> jax.Array:
    # A positive diagonal of R makes Q unique and continuous in y.
    q, r = jnp.linalg.qr(y)
    return jnp.where(jnp.diagonal(r) < 0, -q, q)
