"""Muon with its momentum in the subspace: `galore_muon`.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) takes the momentum of a matrix
and makes all its singular values one. Here the momentum lives in the gradient's subspace, one
low-rank array and no second moment, and what lies outside of it is the present gradient's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_jax import checks
from galore_jax.inner.residual import scale_by_column_ratio
from galore_jax.optimizers.eightbit import scale_by_adam8bit, trace8bit
from galore_jax.optimizers.matrices import beside_adam, over_matrices
from galore_jax.optimizers.wrap import in_float32
from galore_jax.precision import debias
from galore_jax.projector.project import contract
from galore_jax.projector.shares import in_shares
from galore_jax.settings import GaLoreOptions, Settings, takes
from galore_jax.transform import galore

# Odd polynomials a s + b s^3 + c s^5, one after the other: each has the least largest distance from
# one on the interval that the one before maps to, the first on 0.005 to 1 (Polar Express). Three
# of them, on 0.02 to 1, learn as much from small batches, but at one rate less from large ones.
_POLYNOMIALS = (
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
    (2.1895, -1.5672, 0.4079),
)

_LONG = 1.5  # over the other side: from there on iterating on the Gram matrix takes less

_AT_ONCE = 2**24  # numbers of a stack that is orthogonalised together: one matrix of 4096 by 4096

_TINY = 1e-20


@takes(
    Settings,
    without=["scale", "unprojected_scale", "residual"],
    method="coordinates",
    moments="rotate",
)
def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.95,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    nesterov: bool = True,
    accumulator_dtype: Any = None,
    neuron_b2: jax.typing.ArrayLike | None = 0.95,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with its momentum in the gradient's low-rank subspace.

    For a weight (m, n), m inputs and n outputs, inputs projected,

    .. math::
        R &= P^T G, \quad B \leftarrow \mu B + R \quad (r \times n) \\
        M &= P (R + \mu B) + (G - P R)\, \mathrm{diag}(w), \quad
        w_j = \min\left(\frac{\|(R + \mu B)_j\|}{\|R_j\|}, \frac{1}{1 - \mu}\right) \\
        W &\leftarrow W - \eta \left(\sqrt{\max(1, n / m)}\; \mathrm{NS}(M) + \lambda W\right)

    where NS is Newton-Schulz orthogonalisation, its columns divided by their root mean square over
    steps, at the same norm (NorMuon). In the subspace M is Muon's (Nesterov) momentum, outside of
    it the present gradient, each column as much larger as momentum is than the gradient in the
    subspace: about :math:`1 / \sqrt{1 - \mu^2}` where gradients are noise, up to
    :math:`1 / (1 - \mu)` where they are the same at each step. The update has full rank, the state
    has r: r n numbers, B, and n mean squares, where `galore_adamw` keeps r (m + 2 n) and Muon m n.
    Leaves that are not projected take AdamW steps.

    Orthogonalised, all directions of a matrix count the same, so a subspace of the gradient's
    largest ones is not worth more than another. A random one serves better, and random rows of
    the matrix serve as well: they need no decomposition, no product with P, and no more memory
    than their indices.

    Args:
        learning_rate: eta, a number or a schedule. As Muon's: around 0.02.
        momentum: mu.
        weight_decay: lambda, decoupled, acting on the full weight, of all leaves: `mask` leaves
            norms and biases out.
        mask: tree of bools, or callable giving one: which leaves decay.
        nesterov: use Nesterov momentum; otherwise M = P B in the subspace.
        accumulator_dtype: of B, such as "bfloat16"; by default float32. "int8" is for 8-bit codes,
            see `trace8bit`: at a rank of a quarter of the width a quarter byte for each weight. The
            leaves that are not projected have moments in 8 bits then, see `adamw8bit`.
        neuron_b2: decay rate of the mean square of each column of NS(M), one number for each; None
            keeps none and leaves NS(M) as it is.
        adam_learning_rate: of the leaves that are not projected, by default `learning_rate`,
            which suits the embeddings of small vocabularies alone: try AdamW's.
        b1: decay rate of their first moment.
        b2: decay rate of their second moment.
        eps: added to the root of their second moment.
        **options: see `galore`, rank first of all; all but the scales and `residual`. Here `method`
            is "coordinates" and `moments`, what becomes of B when P changes, "rotate" by default.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; for gradients from `galore_jax.value_and_grad`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, galore_jax
        >>> params = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}
        >>> loss = lambda p: jnp.sum(jnp.square(p["kernel"])) + jnp.sum(jnp.square(p["bias"]))
        >>> tx = galore_jax.galore_muon(0.1, rank=2)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss(params):.1f}")
        137.5
        131.5
        125.8

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Zhao et al.,
        `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024; Li et al., `NorMuon
        <https://arxiv.org/abs/2510.05491>`_, 2025
    """
    settings = Settings(**options)
    in_codes = accumulator_dtype is not None and jnp.dtype(accumulator_dtype) == jnp.int8
    in_subspace = galore(
        trace8bit(momentum, nesterov)
        if in_codes
        else optax.trace(momentum, nesterov, accumulator_dtype),
        **{**options, "scale": 1.0, "residual": scale_by_column_ratio(1 / (1 - momentum))},
    )

    steps = [_orthogonalised()] + ([] if neuron_b2 is None else [_by_neuron(neuron_b2)])
    matrices = optax.chain(in_subspace, over_matrices(optax.chain(*steps), settings))
    tx = beside_adam(
        matrices,
        settings,
        learning_rate,
        adam_learning_rate,
        scale_by_adam8bit(b1, b2, eps)
        if in_codes
        else in_float32(optax.scale_by_adam(b1, b2, eps)),
        weight_decay,
        mask,
        "muon",
    )

    def update_fn(updates, state, params=None, **extra_args):
        checks.check_full(updates, "galore_muon")
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def orthogonalise(x: jax.Array, eps: float = 1e-8) -> jax.Array:
    r"""All singular values of matrices (..., m, n) to about one, by Newton-Schulz iteration.

    With A the smaller Gram matrix of X, a step is :math:`X \leftarrow P X` with
    :math:`P = a I + b A + c A^2`. First X is divided by :math:`\|A^2\|_F^{1/4}`, a bound on its
    largest singular value that lies closer to it than its norm, the more so the larger X is.
    Singular values from 0.005 of that bound on end between 0.9 and 1.1, smaller ones at 226 times
    what they were. Muon's five steps, which begin at the norm, take them to 0.7 to 1.2.

    Of long matrices two steps are taken at a time, the second on A alone,
    :math:`A \leftarrow P A P`, and X is multiplied by the product of both P, which commute. (With
    more steps the rounding of A would grow.)
    """
    rows_first = x.shape[-2] <= x.shape[-1]
    together = 2 if max(x.shape[-2:]) > _LONG * min(x.shape[-2:]) else 1

    def gram_of(x):
        return contract(x, -1, x, -1) if rows_first else contract(x, -2, x, -2)

    def product(a, b):
        return contract(a, -1, b, -2)

    def times(p, x):  # p is symmetric
        return product(p, x) if rows_first else product(x, p)

    gram = gram_of(x)
    norm = jnp.sqrt(jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]) + eps
    gram = gram / norm**2  # no power of it is too large or too small
    square = product(gram, gram)
    bound = jnp.maximum(_norm(square), _TINY) ** 0.25
    gram, square = gram / bound**2, square / bound**4
    for i in range(0, len(_POLYNOMIALS), together):
        if i:
            gram = gram_of(x)
            square = product(gram, gram)
        p = _polynomial(_POLYNOMIALS[i], gram, square)
        if together == 2:
            gram = product(product(p, gram), p)
            p = product(_polynomial(_POLYNOMIALS[i + 1], gram, product(gram, gram)), p)
        # The norm and the bound divide the first P, which is smaller than X.
        x = times(p if i else p / (norm * bound), x)
    return x


def _polynomial(coefficients, gram: jax.Array, square: jax.Array) -> jax.Array:
    a, b, c = coefficients
    one = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return a * one + b * gram + c * square


def _orthogonalise_stack(x: jax.Array) -> jax.Array:
    """The same of a large stack (..., m, n) part by part: what is at work is a few times a part."""
    together = max(1, _AT_ONCE // max(1, math.prod(x.shape[-2:])))
    if math.prod(x.shape[:-2]) <= together:
        return orthogonalise(x)
    stack = x.reshape(-1, *x.shape[-2:])
    at_a_time = together if together > 1 else None  # no axis of length one, which XLA would move
    return jax.lax.map(orthogonalise, stack, batch_size=at_a_time).reshape(x.shape)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)


class ByNeuronState(NamedTuple):
    """State of `_by_neuron`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    nu: optax.Updates  # shape=batch + (n,): mean squares of columns


def _by_neuron(b2: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Columns of matrices divided by their root mean square over steps; the norm stays."""

    def init_fn(params):
        nu = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], x.shape[-1])), params)
        return ByNeuronState(jnp.zeros([], jnp.int32), nu)

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(jnp.asarray(state.count))
        means = jax.tree.map(lambda x: jnp.mean(jnp.square(x), axis=-2), updates)
        nu = optax.tree.update_moment(means, state.nu, b2, 1)

        def one(x, mean, v):
            scale = 1 / (v / debias(b2, count) + _TINY)  # its square
            old, new = (jnp.sum(y, axis=-1, keepdims=True) for y in (mean, mean * scale))
            scale *= old / jnp.maximum(new, _TINY)
            return x * jnp.sqrt(scale)[..., None, :]

        return jax.tree.map(one, updates, means, nu), ByNeuronState(count, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _orthogonalised() -> optax.GradientTransformation:
    """Muon's step from its momentum: orthogonal matrices, scaled for their shape."""

    def update(updates, params):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        new = in_shares(_orthogonalise_stack, leaves)
        return treedef.unflatten([max(1, x.shape[-1] / x.shape[-2]) ** 0.5 * x for x in new])

    return optax.stateless(update)
