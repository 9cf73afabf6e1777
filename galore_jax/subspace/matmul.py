"""A product of which the kernel's gradient is projected without being formed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.meshes import as_auto, everywhere, explicit_mesh, sharding_of
from galore_jax.node import ArrayNode
from galore_jax.projector.project import bases
from galore_jax.subspace.kernel import Kernel, Rule, Tapped, as_kernel, cotangents


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, precision: Any = None, **options):
    r"""`jax.lax.dot_general` that projects a kernel's gradient without forming it.

    For `y = x W` with cotangent dy, the projected gradient is

    .. math::
        P^T \mathrm{d}W = (x P)^T \mathrm{d}y

    at r/m of the product's cost, and where no refresh is compiled in, x P is kept for the
    backward pass instead of x. That is what happens for kernels (m, n) inside
    `galore_jax.value_and_grad`; everywhere else this is `jax.lax.dot_general`. (The norm of the
    full gradient needs x, and for many tokens the gradient itself, a layer at a time; within
    one `jit` it is computed only where something asks for it, such as clipping.) Without it
    (`x @ W` with a plain layer) the gradient of one layer is formed and projected at once.

    Give it to Flax's layers together with `galore_jax.promote_dtype`, by the arguments of the
    same names: `nnx.Linear(..., dot_general=galore_jax.dot_general,
    promote_dtype=galore_jax.promote_dtype)`, likewise `nn.Dense`.

    Args:
        lhs: array, the inputs.
        rhs: array, the kernel.
        dimension_numbers: as `jax.lax.dot_general`'s.
        precision: as `jax.lax.dot_general`'s; of the forward product and the input's gradient.
        **options: more of `jax.lax.dot_general`'s.

    Returns:
        The product.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
        >>> galore_jax.dot_general(x, w, (((1,), (0,)), ((), ()))).shape
        (3, 5)
    """
    if isinstance(rhs, Tapped) and not isinstance(lhs, Tapped):
        contracted, batch = dimension_numbers
        view = rhs.rule.at(rhs.ndim)
        plain = (
            [tuple(map(tuple, contracted)), tuple(map(tuple, batch))]
            == [((lhs.ndim - 1,), (0,)), ((), ())]
            and (view.reduction_axes, view.output_axes) == ((0,), (1,))
            and rhs.ndim == 2
            and not any(v is not None for v in options.values())
        )
        if plain:
            rhs.check_untouched()
            x = lhs.reshape(-1, lhs.shape[-1])
            y: Any = _low_rank_matmul((rhs.rule, jnp.dtype(rhs.dtype), precision), x, rhs.kernel)
            return y.reshape(*lhs.shape[:-1], y.shape[-1])
    lhs, rhs = (jnp.asarray(x) for x in (lhs, rhs))
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, **options)


def promote_dtype(*args: Any, dtype: Any = None, inexact: bool = True) -> Any:
    """Flax's `promote_dtype`, leaving kernels as they are inside `galore_jax.value_and_grad`.

    Args:
        *args: arrays, or None, to cast to one dtype, as Linen gives them, or one tuple of such, as
            NNX does.
        dtype: the dtype; by default the one that they promote to.
        inexact: whether that has to be a floating dtype.

    Returns:
        The arrays, cast, as a list or in a tuple like the one given.

    Raises:
        ValueError: for a dtype that is not inexact where it has to be.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> x, bias = galore_jax.promote_dtype((jnp.ones(2, jnp.bfloat16), jnp.ones(2)))
        >>> x.dtype, bias.dtype
        (dtype('float32'), dtype('float32'))
    """
    in_one = len(args) == 1 and isinstance(args[0], tuple | list)
    kind, given = (type(args[0]), args[0]) if in_one else (list, args)
    arrays = [x if x is None or isinstance(x, ArrayNode) else jnp.asarray(x) for x in given]
    if dtype is None:
        like = (jnp.zeros((), x.dtype) if isinstance(x, ArrayNode) else x for x in arrays)
        dtype = jnp.result_type(*(x for x in like if x is not None))
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"dtype must be inexact, got {dtype}")
    return kind(None if x is None else x.astype(dtype) for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank_matmul(static, x: jax.Array, kernel: Kernel) -> jax.Array:
    """`x @ W` for x (tokens, m); the weight's gradient is never formed but on a refresh."""
    _, dtype, precision = static
    return jnp.dot(x, jnp.asarray(kernel.weight.astype(dtype)), precision=precision)


def _matmul_forward(static, x, kernel):
    y = _low_rank_matmul(static, x, kernel)
    view = static[0].view.matrix
    p_in = bases(view, kernel.projector)[0]
    # Without a refresh x is kept for the norm of the gradient alone; XLA drops it where
    # nobody asks for that.
    inner = None
    if kernel.turn is None and p_in is not None:
        inner = jnp.dot(x, p_in.astype(x.dtype), preferred_element_type=view.dtype)
    return y, (x, inner, kernel.weight, kernel.projector, kernel.turn)


def _matmul_backward(static, saved, dy):
    rule, dtype, precision = static
    x, inner, weight, projector, turn = saved
    mesh = explicit_mesh(dy)
    placed: dict[str, Any] = {} if mesh is None else {"out_sharding": sharding_of(x)}
    dx = jnp.dot(dy, weight.astype(dtype).T, precision=precision, **placed).astype(x.dtype)
    if mesh is None:
        return dx, _projected(rule, x, inner, dy, projector, turn)
    projected = functools.partial(_projected, rule)
    args = x, inner, dy, projector, turn
    return dx, as_auto(mesh, projected, *args, like=everywhere(mesh))


def _projected(rule: Rule, x, inner, dy, projector, turn) -> Kernel:
    """What the gradient `x^T dy` of a kernel becomes."""
    view = rule.view.matrix

    def summed(a, b, axes=(1, 0)):
        """The product, in float32 at least; operands of half precision stay so."""
        dims = (axes[:1], axes[1:]), ((), ())
        return jax.lax.dot_general(a, b.astype(a.dtype), dims, preferred_element_type=view.dtype)

    def gradient():
        return summed(x, dy, (0, 0))

    def low_rank(p):
        p_in, p_out = bases(view, p)
        left = x if p_in is None else summed(x, p_in) if inner is None else inner
        right = dy if p_out is None else summed(dy, p_out)
        kind = jnp.promote_types(left.dtype, right.dtype)
        return summed(left.astype(kind), right, (0, 0))

    def square():
        tokens = x.shape[0]
        if tokens * (view.m + view.n) > view.m * view.n:
            return jnp.sum(jnp.square(gradient()))
        # |x^T dy|^2 = <x x^T, dy dy^T>: cheaper than the gradient for few tokens.
        return jnp.sum(summed(x, x, (1, 1)) * summed(dy, dy, (1, 1)))

    return as_kernel(cotangents(rule, projector, turn, gradient, low_rank, square))


_low_rank_matmul.defvjp(_matmul_forward, _matmul_backward)
