"""A kernel that hands its gradient over already projected.

`Tapped` stands in the place of a kernel in the tree of parameters. Being a pytree node it is
sliced by scans with its model, so the tap sits inside the scanned block, and the gradient of
one layer at a time is all that exists. Its gradient comes back as the cotangents of `Slots`,
arrays that the forward pass never reads: P^T dW for the low-rank gradient, and with it what
only the backward pass can know, dW's norm and, on a refresh, the new projector. (Flax's fp8
ops return their scales the same way.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.basis import Methods
from galore_jax.leaf import Leaf
from galore_jax.lowrank import LIGHT
from galore_jax.projection import Stored, bases, load, project
from galore_jax.refresh import renew, seed_of


class Slots(NamedTuple):
    """Where cotangents come back, for a stack of matrices; zeros on the way in."""

    low_rank: jax.Array  # leaf.low_rank_shape: the projected gradient
    square: jax.Array  # leaf.batch: squared norm of the full gradient
    projector: jax.Array | None  # leaf.projector_shape: the basis it was projected on, times LIGHT
    unit: jax.Array | None  # leaf.batch: LIGHT, once for each use of the kernel


class Turn(NamedTuple):
    """Which of the matrices refresh at this step, all of shape leaf.batch."""

    due: jax.Array  # bool
    layer: jax.Array  # int32: numbers in the stack, with the step what seeds random bases
    count: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Rule:
    """What of a tap is known when it is traced."""

    leaf: Leaf  # of the whole stack
    methods: Methods

    def at(self, ndim: int) -> Leaf:
        """The leaf as a kernel of `ndim` axes sees it, below the scans around it."""
        return self.leaf.below(len(self.leaf.shape) - ndim)


class Kernel(NamedTuple):
    """The arrays of a tapped kernel. The weight comes first: Linen checks its shape there."""

    weight: jax.Array
    projector: Stored
    slots: Slots
    turn: Turn | None  # None: no refresh in this program


@jax.tree_util.register_pytree_with_keys_class
class Tapped:
    """A kernel as modules meet it: an array to them, by `__jax_array__`."""

    def __init__(self, kernel: Kernel, rule: Rule, dtype: Any = None):
        self.kernel, self.rule, self._dtype = kernel, rule, dtype

    def tree_flatten_with_keys(self):
        """Weight, projector, slots and turn, by name."""
        keys = map(jax.tree_util.GetAttrKey, Kernel._fields)
        return tuple(zip(keys, self.kernel, strict=True)), (self.rule, self._dtype)

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Undo `tree_flatten_with_keys`."""
        return cls(Kernel(*children), *aux)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.kernel.weight.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return self.kernel.weight.ndim

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return self.kernel.weight.size

    @property
    def dtype(self) -> Any:
        """Dtype that the weight is used in."""
        return self._dtype or self.kernel.weight.dtype

    @property
    def sharding(self) -> Any:
        """Sharding of the weight."""
        return self.kernel.weight.sharding

    def check_untouched(self) -> None:
        """Raise where a loss has cast its whole tree of parameters, projectors and all."""
        leaf, low_rank = self.rule.leaf, self.kernel.slots.low_rank
        if low_rank.dtype != leaf.dtype:
            raise TypeError(
                f"galore_jax.value_and_grad: kernel '{leaf.path}' came with its projector cast to "
                f"{low_rank.dtype}. Do not cast the tree of parameters in the loss: give layers "
                "dtype=, or cast each kernel where it is used (w.astype(dtype))"
            )

    def astype(self, dtype: Any) -> Tapped:
        """Cast where it is used."""
        return Tapped(self.kernel, self.rule, jnp.dtype(dtype))

    def __jax_array__(self) -> jax.Array:
        self.check_untouched()
        weight: Any = _tap(self.rule, self.kernel)
        return weight.astype(self.dtype)

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis:
            return self
        if isinstance(index, int) and self.rule.at(self.ndim).batch:  # one of the stack
            return Tapped(jax.tree.map(lambda a: a[index], self.kernel), self.rule, self._dtype)
        return self.__jax_array__()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    __array_ufunc__ = None  # NumPy's operators leave it to ours

    def __getattr__(self, name: str) -> Any:  # T, reshape, ...
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__jax_array__(), name)


def _operator(name: str):
    def method(self, other):
        return getattr(self.__jax_array__(), name)(jnp.asarray(other))

    return method


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _op in (f"__{_name}__", f"__r{_name}__"):
        setattr(Tapped, _op, _operator(_op))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tapped, f"__{_name}__", _operator(f"__{_name}__"))
Tapped.__neg__ = lambda self: -self.__jax_array__()  # type: ignore[attr-defined]


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
        leaf = rhs.rule.at(rhs.ndim)
        plain = (
            [tuple(map(tuple, contracted)), tuple(map(tuple, batch))]
            == [((lhs.ndim - 1,), (0,)), ((), ())]
            and (leaf.reduction_axes, leaf.output_axes) == ((0,), (1,))
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


def promote_dtype(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Flax's `promote_dtype`, leaving kernels as they are inside `galore_jax.value_and_grad`.

    Args:
        args: arrays, or None, to cast to one dtype.
        dtype: the dtype; by default the one that they promote to.
        inexact: whether that has to be a floating dtype.

    Returns:
        The arrays, cast.

    Raises:
        ValueError: for a dtype that is not inexact where it has to be.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> x, bias = galore_jax.promote_dtype((jnp.ones(2, jnp.bfloat16), jnp.ones(2)))
        >>> x.dtype, bias.dtype
        (dtype('float32'), dtype('float32'))
    """
    args = [x if x is None or isinstance(x, Tapped) else jnp.asarray(x) for x in args]
    if dtype is None:
        dtype = jnp.result_type(
            *(jnp.zeros((), x.dtype) if isinstance(x, Tapped) else x for x in args if x is not None)
        )
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"dtype must be inexact, got {dtype}")
    return type(args)(None if x is None else x.astype(dtype) for x in args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(rule: Rule, kernel: Kernel) -> jax.Array:
    """The weight; its cotangent is projected, in all the stacked matrices it still has."""
    return kernel.weight


def _tap_forward(rule, kernel):
    return kernel.weight, (kernel.projector, kernel.turn)


def _tap_backward(rule, saved, dw):
    projector, turn = saved
    leaf = rule.at(dw.ndim)
    count = math.prod(leaf.batch)

    def one(dw, stored, turn):
        return _cotangents(
            rule.leaf.matrix,
            rule,
            stored,
            turn,
            gradient=lambda: dw,
            project=lambda p: project(rule.leaf.matrix, p, dw),
            square=lambda: jnp.sum(jnp.square(dw.astype(leaf.dtype))),
        )

    if not leaf.batch:
        return (_as_kernel(one(leaf.to_matrix(dw), projector, turn)),)
    matrices = leaf.to_matrix(dw).reshape(count, leaf.m, leaf.n)
    axes = len(leaf.batch)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[axes:]), (projector, turn))
    slots = jax.lax.map(lambda x: one(x[0], *x[1]), (matrices, flat))
    return (_as_kernel(jax.tree.map(lambda x: x.reshape(*leaf.batch, *x.shape[1:]), slots)),)


_tap.defvjp(_tap_forward, _tap_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank_matmul(static, x: jax.Array, kernel: Kernel) -> jax.Array:
    """`x @ W` for x (tokens, m); the weight's gradient is never formed but on a refresh."""
    _, dtype, precision = static
    return jnp.dot(x, kernel.weight.astype(dtype), precision=precision)


def _matmul_forward(static, x, kernel):
    y = _low_rank_matmul(static, x, kernel)
    leaf = static[0].leaf.matrix
    p_in = bases(leaf, kernel.projector)[0]
    # Without a refresh x is kept for the norm of the gradient alone; XLA drops it where
    # nobody asks for that.
    inner = None
    if kernel.turn is None and p_in is not None:
        inner = jnp.dot(x, p_in.astype(x.dtype), preferred_element_type=leaf.dtype)
    return y, (x, inner, kernel.weight, kernel.projector, kernel.turn)


def _matmul_backward(static, saved, dy):
    rule, dtype, precision = static
    x, inner, weight, projector, turn = saved
    leaf = rule.leaf.matrix
    dx = jnp.dot(dy, weight.astype(dtype).T, precision=precision).astype(x.dtype)

    def wide(a, b, axes=(1, 0)):
        """Sum over an axis of each; operands of half precision stay so."""
        dims = (axes[:1], axes[1:]), ((), ())
        return jax.lax.dot_general(a, b.astype(a.dtype), dims, preferred_element_type=leaf.dtype)

    def gradient():
        return wide(x, dy, (0, 0))

    def low_rank(p):
        p_in, p_out = bases(leaf, p)
        left = x if p_in is None else wide(x, p_in) if inner is None else inner
        right = dy if p_out is None else wide(dy, p_out)
        kind = jnp.promote_types(left.dtype, right.dtype)
        return wide(left.astype(kind), right, (0, 0))

    def square():
        tokens = x.shape[0]
        if tokens * (leaf.m + leaf.n) > leaf.m * leaf.n:
            return jnp.sum(jnp.square(gradient()))
        # |x^T dy|^2 = <x x^T, dy dy^T>: cheaper than the gradient for few tokens.
        return jnp.sum(wide(x, x, (1, 1)) * wide(dy, dy, (1, 1)))

    slots = _cotangents(leaf, rule, projector, turn, gradient, low_rank, square)
    return dx, _as_kernel(slots)


_low_rank_matmul.defvjp(_matmul_forward, _matmul_backward)


def _cotangents(leaf: Leaf, rule: Rule, stored: Stored, turn, gradient, project, square) -> Slots:
    """What a tap hands back for one matrix, given ways to get at its gradient."""
    if turn is None:
        return Slots(project(stored), square(), None, None)
    new = jax.lax.cond(
        turn.due,
        lambda: renew(
            leaf,
            gradient(),
            stored,
            (seed_of(rule.leaf), turn.count, turn.layer),
            rule.methods,
        ),
        lambda: stored,
    )
    light = jnp.asarray(LIGHT, leaf.dtype)
    return Slots(project(new), square(), load(leaf, new) * light, light)


def _as_kernel(slots: Slots) -> Kernel:
    """Cotangents of a kernel: none but the slots'."""
    return Kernel(None, None, slots, None)  # type: ignore[arg-type]
