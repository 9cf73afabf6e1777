"""Adafactor in the subspace, with the parameter scale taken outside of it.

Optax's `adafactor` cannot go inside `galore` as it is. Its step is proportional to the root
mean square of the weights, which the subspace does not show; and it treats a leaf as one
block, factoring its two largest axes, which in a stack of low-rank matrices may well be the
stack. Here a block is always a matrix, the last two axes.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.trees import bare
from galore_jax.matrix.view import MatrixView
from galore_jax.precision import wide
from galore_jax.settings import GaLoreOptions, Settings, takes
from galore_jax.transform import galore

_MIN_PARAM_SCALE = 1e-3  # Adafactor's epsilon_2, as in optax.scale_by_param_block_rms


class FactoredState(NamedTuple):
    """Second moment, factored into row and column means where a leaf is a large matrix."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32
    v_row: optax.Params  # means over the last axis; MaskedNode where not factored
    v_col: optax.Params  # means over the last but one; MaskedNode where not factored
    v: optax.Params  # the full second moment; MaskedNode where factored


def scale_by_factored_rms(
    decay_rate: float | jax.Array = 0.8,
    decay_offset: int | jax.Array = 0,
    min_dim_size_to_factor: int = 32,
    eps: jax.typing.ArrayLike = 1e-30,
    factored: bool = True,
) -> optax.GradientTransformation:
    r"""Divide by the root of a second moment that is factored over the last two axes.

    .. math::
        v_{ij} \approx r_i c_j / \mathrm{mean}(r), \quad
        r \leftarrow \beta_t r + (1-\beta_t)\, \mathrm{mean}_j (g^2 + \epsilon), \quad
        \beta_t = 1 - t^{-\mathrm{decay\_rate}}

    and c likewise over i. Leading axes are stacked matrices, each factored by itself.

    Args:
        decay_rate: exponent of the second moment's decay.
        decay_offset: step at which fine-tuning starts; the decay counts from there.
        min_dim_size_to_factor: factor only where both last axes are at least this long.
        eps: added to the squared gradient.
        factored: False keeps every second moment in full.

    Returns:
        An `optax.GradientTransformation`.

    References:
        Shazeer et al., `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    if isinstance(min_dim_size_to_factor, jax.Array):
        raise TypeError(
            "min_dim_size_to_factor decides shapes, so it must be a Python int. Under "
            "optax.inject_hyperparams pass static_args=('rank', 'min_dim_size_to_factor')"
        )

    def is_factored(x) -> bool:
        return factored and x.ndim >= 2 and min(x.shape[-2:]) >= min_dim_size_to_factor

    def init_fn(params):
        def where(wanted, shape):
            return jax.tree.map(
                lambda x: (
                    jnp.zeros(shape(x), x.dtype) if is_factored(x) == wanted else optax.MaskedNode()
                ),
                params,
            )

        return FactoredState(
            jnp.zeros([], jnp.int32),
            v_row=where(True, lambda x: x.shape[:-1]),
            v_col=where(True, lambda x: (*x.shape[:-2], x.shape[-1])),
            v=where(False, lambda x: x.shape),
        )

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        beta = 1.0 - jnp.asarray(count - decay_offset, jnp.float32) ** -decay_rate
        grads, treedef = jax.tree.flatten(updates)
        kept = [treedef.flatten_up_to(tree) for tree in state[1:]]

        def average(old, new):
            return (beta * old + (1.0 - beta) * new).astype(old.dtype)

        def one(g, row, col, full):
            squared = jnp.square(g) + eps
            if not is_factored(g):
                full = average(full, squared)
                return g * jax.lax.rsqrt(full), row, col, full
            row = average(row, jnp.mean(squared, axis=-1))
            col = average(col, jnp.mean(squared, axis=-2))
            row_factor = jax.lax.rsqrt(row / jnp.mean(row, axis=-1, keepdims=True))
            return g * row_factor[..., None] * jax.lax.rsqrt(col)[..., None, :], row, col, full

        out = [one(*leaf) for leaf in zip(grads, *kept, strict=True)]
        new, *kept = (treedef.unflatten([leaf[i] for leaf in out]) for i in range(4))
        return new, FactoredState(count, *kept)

    return optax.GradientTransformation(init_fn, update_fn)


def _rms(x: jax.Array) -> jax.Array:
    """Root mean square of each matrix (or of a whole vector), shape broadcastable to `x`."""
    axes = tuple(range(max(0, x.ndim - 2), x.ndim))
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def _clip_by_matrix_rms(threshold: jax.typing.ArrayLike) -> optax.GradientTransformation:
    def clip(updates, params):
        del params
        return jax.tree.map(lambda u: u / jnp.maximum(1.0, _rms(u) / threshold), updates)

    return optax.stateless(clip)


def _scale_by_given_rms() -> optax.GradientTransformationExtraArgs:
    """Multiply by `param_rms`, an extra argument of update: a number per matrix."""

    def update_fn(updates, state, params=None, **extra_args):
        del params
        return jax.tree.map(jnp.multiply, updates, extra_args["param_rms"]), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


@takes(Settings)
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule | None = None,
    min_dim_size_to_factor: int = 32,
    decay_rate: float | jax.Array = 0.8,
    decay_offset: int | jax.Array = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: jax.typing.ArrayLike | None = 1.0,
    momentum: jax.typing.ArrayLike | None = None,
    dtype_momentum: Any = jnp.float32,
    weight_decay_rate: optax.ScalarOrSchedule | None = None,
    eps: jax.typing.ArrayLike = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor in the gradient's low-rank subspace.

    With R the projected gradient, v its factored second moment and W the full weight,

    .. math::
        U &= R / \sqrt{v}, \quad U \leftarrow U / \max(1, \mathrm{rms}(U) / d) \\
        W &\leftarrow W - \mathrm{scale} \cdot P\, (\eta \max(10^{-3}, \mathrm{rms}(W))\, U)

    The arguments are those of `optax.adafactor`, with a smaller `min_dim_size_to_factor`, and those
    of `galore`, whose scale multiplies on top; a block is a matrix, the last two axes. Momentum and
    decay, which the equation leaves out, are as there.

    Args:
        learning_rate: eta, a number, a schedule or None for 1. Relative to the weights' root
            mean square while `multiply_by_parameter_scale`.
        min_dim_size_to_factor: factor only matrices with both sides at least this long,
            counted in the subspace.
        decay_rate: exponent of the second moment's decay.
        decay_offset: step at which fine-tuning starts.
        multiply_by_parameter_scale: scale the step by the root mean square of the full
            weight.
        clipping_threshold: d, or None not to clip.
        momentum: decay rate of an average of the updates, None for none.
        dtype_momentum: its dtype.
        weight_decay_rate: decay of the full weight per step; not multiplied by the learning
            rate, as in Optax.
        eps: added to the squared gradient.
        factored: False keeps second moments in full.
        weight_decay_mask: tree of bools, or callable giving one: which leaves decay.
        **options: see `galore`, rank first of all.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`; at `update`, where `multiply_by_parameter_scale` has no
            params.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.galore_adafactor(1e-2, rank=32)
        >>> state = tx.init({"kernel": jnp.ones((64, 128))})
        >>> state.inner_state[0].v_row["kernel"].shape, state.inner_state[0].v_col["kernel"].shape
        ((32,), (128,))

    References:
        Shazeer et al., `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    links: list[optax.GradientTransformation] = [
        scale_by_factored_rms(decay_rate, decay_offset, min_dim_size_to_factor, eps, factored)
    ]
    if clipping_threshold is not None:
        links.append(_clip_by_matrix_rms(clipping_threshold))
    if learning_rate is not None:
        links.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        links.append(_scale_by_given_rms())
    if momentum is not None:
        links.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        links.append(optax.add_decayed_weights(weight_decay_rate, mask=weight_decay_mask))
    links.append(optax.scale(-1))
    tx = galore(optax.chain(*links), **options)
    if not multiply_by_parameter_scale:
        return tx

    settings = Settings(**options)

    def matrix_rms(leaf, w):
        matrices = leaf.to_matrix(w) if isinstance(leaf, MatrixView) else jnp.asarray(w)
        return jnp.maximum(_rms(wide(matrices)), _MIN_PARAM_SCALE)

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "galore_adafactor scales its steps by the weights: call update(grads, state, "
                "params), or pass multiply_by_parameter_scale=False"
            )
        weights, treedef = jax.tree.flatten(bare(params))
        scales = map(matrix_rms, settings.plan(bare(params)), weights)
        param_rms = treedef.unflatten(scales)
        return tx.update(updates, state, params, param_rms=param_rms, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
