"""Orthonormal bases of a matrix's leading left singular directions.

Each method maps a matrix `a` of shape (k, c) to an orthonormal `p` of shape (k, r) with
r < min(k, c). To add a method, write a function of the same signature and name it in
`METHODS`. The signs of its columns are arbitrary, and differ between methods and machines;
the moments of the inner optimizer survive a refresh and must not meet random flips, so
`align_signs` fixes them afterwards for every method.

All arithmetic is float32 or wider at the highest matmul precision: a Gram matrix in TF32 or
bfloat16 passes would lose the small singular directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# A thunk, so that methods that need no key do not pay for hashing one.
Key = Callable[[], jax.Array]
Method = Callable[[jax.Array, int, jax.Array, Key], jax.Array]
# Which method from which step on, in order; the first step is 0.
Methods = tuple[tuple[int, str], ...]


def align_signs(p: jax.Array, previous: jax.Array) -> jax.Array:
    """Flip columns of `p` (k, r) to agree with those of the previous basis.

    A fixed direction is added to the previous columns, so that the sign is defined where a
    column is orthogonal to its predecessor, as often at the first refresh. It is no constant
    vector: the gradients of a layer behind a LayerNorm are orthogonal to those.
    """
    k = p.shape[0]
    golden = 0.6180339887498949 * np.arange(1, k + 1)
    fixed = jnp.asarray((golden % 1 - 0.5) * np.sqrt(12 / k), p.dtype)
    agreement = jnp.sum(p * (previous + fixed[:, None]), axis=0)
    return jnp.where(agreement < 0, -p, p)


def svd(a: jax.Array, rank: int, previous: jax.Array, key: Key) -> jax.Array:
    """Leading left singular vectors by a full SVD, as in the paper."""
    del previous, key
    u = jnp.linalg.svd(a, full_matrices=False)[0][:, :rank]
    # A GPU's Jacobi method leaves columns 1e-4 off; a Newton-Schulz step squares that.
    return u + dot(u, (jnp.eye(rank, dtype=u.dtype) - dot(u.T, u)) / 2)


def eigh(a: jax.Array, rank: int, previous: jax.Array, key: Key) -> jax.Array:
    """The same vectors from the eigenvectors of the smaller Gram matrix."""
    del previous, key
    return _from_gram(a, partial(_leading, rank=rank))


def randomized(a: jax.Array, rank: int, previous: jax.Array, key: Key) -> jax.Array:
    """A randomized range finder on the smaller Gram matrix, then a small exact decomposition.

    Forming the Gram matrix once makes each power iteration cheap: five factors of it between
    the sketch and the basis keep 0.999 of the leading energy down to a spectrum of j^-0.5.
    """
    del previous, key
    return _randomized(a, rank)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _randomized(a: jax.Array, rank: int) -> jax.Array:
    def leading(gram):
        size = gram.shape[0]
        sketched = min(rank + max(16, rank // 4), size)
        # The same sketch for every matrix: it only has to be independent of the gradient, and
        # stacked layers then give what separate ones do.
        y = dot(gram, jax.random.normal(jax.random.key(0), (size, sketched), gram.dtype))
        for _ in range(2):
            y = dot(gram, dot(gram, _orthonormal(y)))
        q = _orthonormal(y)
        return dot(q, _leading(dot(q.T, dot(gram, q)), rank))

    return _from_gram(a, leading)


@_randomized.defjvp
def _(rank, primals, tangents):
    """The derivative of what is approximated: that of the way there has no meaning."""
    p = _randomized(*primals, rank)

    def exact(a):
        return _from_gram(a, partial(_leading, rank=rank))

    u, derivative = jax.jvp(exact, primals, tangents)
    return p, jnp.where(jnp.sum(u * p, axis=0) < 0, -derivative, derivative)


def subspace(a: jax.Array, rank: int, previous: jax.Array, key: Key) -> jax.Array:
    """One block power iteration from the previous basis: cheap, and aligned with it."""
    del rank, key
    return _orthonormal(dot(a, dot(a.T, previous)))


def random(a: jax.Array, rank: int, previous: jax.Array, key: Key) -> jax.Array:
    """A uniformly random orthonormal basis; the gradient is not looked at."""
    del previous
    return _orthonormal(jax.random.normal(key(), (a.shape[0], rank), a.dtype))


def coordinates(a: jax.Array, rank: int, previous: jax.Array, key: Key) -> jax.Array:
    """Random coordinate directions: the subspace of some rows; the gradient is not looked at."""
    del previous
    rows = jnp.sort(jax.random.permutation(key(), a.shape[0])[:rank])
    return jax.nn.one_hot(rows, a.shape[0], axis=0, dtype=a.dtype)


METHODS: dict[str, Method] = {
    "svd": svd,
    "eigh": eigh,
    "randomized": randomized,
    "subspace": subspace,
    "random": random,
    "coordinates": coordinates,
}


# The others draw their bases.
_BLIND = ("random", "coordinates")


def looks_at_gradients(methods: Methods) -> bool:
    """Whether a basis depends on the gradient, beside its shape."""
    return any(name not in _BLIND for _, name in methods)


def methods(given: str | Mapping[int, str]) -> Methods:
    """Read a method, or methods by the step from which each is used."""
    by_step = given if isinstance(given, Mapping) else {0: given}
    for step, name in by_step.items():
        if name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"method: the steps of a schedule are ints >= 0, got {step!r}")
    if 0 not in by_step:
        raise ValueError(
            f"method: a schedule begins at step 0, as in {{0: 'randomized', 8000: 'random'}}, got "
            f"{dict(by_step)}"
        )
    return tuple(sorted(by_step.items()))


def at_step(methods: Methods, step: Any) -> Method:
    """The method in use at a step, which may be traced."""
    functions = [METHODS[name] for _, name in methods]
    if len(functions) == 1:
        return functions[0]

    def scheduled(a: jax.Array, rank: int, previous: jax.Array, key: Key) -> jax.Array:
        def branch(method: Method) -> Callable[[Any], jax.Array]:
            return lambda operands: method(operands[0], rank, operands[1], key)

        now = sum(jnp.asarray(step >= start, jnp.int32) for start, _ in methods[1:])
        return jax.lax.switch(now, [branch(f) for f in functions], (a, previous))

    return scheduled


def _from_gram(a: jax.Array, leading: Callable[[jax.Array], jax.Array]) -> jax.Array:
    if a.shape[0] <= a.shape[1]:
        return leading(dot(a, a.T))
    # a^T a = V L V^T gives U = a V L^-1/2. QR does the scaling, and stays orthonormal where
    # the gradient's rank is below r and L is zero.
    return _orthonormal(dot(a, leading(dot(a.T, a))))


def _leading(gram: jax.Array, rank: int) -> jax.Array:
    vectors, _ = jax.lax.linalg.eigh(gram, symmetrize_input=False)
    return vectors[:, ::-1][:, :rank]


def _orthonormal(y: jax.Array) -> jax.Array:
    return jnp.linalg.qr(y)[0]
