"""Muon with its momentum in 8 bits.

Gupta et al., "Effective Quantization of Muon Optimizer States",
https://arxiv.org/abs/2509.23106.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from galore_jax import quantize
from galore_jax.boundary import transformation
from galore_jax.matrix.view import MatrixView
from galore_jax.optimizers.blockwise import MIN_SIZE, check_state
from galore_jax.optimizers.wrap import in_float32
from galore_jax.quantize import DYNAMIC
from galore_jax.settings import Settings


class Muon8bitState(NamedTuple):
    """State of `muon8bit`."""

    inner_state: optax.OptState  # of `optax.contrib.muon`; its momentum in uint8 codes
    mu_scale: optax.Updates  # float32, see `quantize.Encoded`; MaskedNode for small leaves


def muon8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_dimension_numbers: Any = None,
    exclude: str | None = Settings.exclude,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.contrib.muon` with its momentum in 8 bits.

    .. math::
        M &= \beta D(M_8) + (1 - \beta) G, \quad M_8 \leftarrow E(M) \\
        W &\leftarrow W - \eta \left(s\, \mathrm{NS}(\beta \hat M + (1 - \beta) \hat G) +
        \lambda W\right)

    where E and D are `quantize.encode` and `decode` with bitsandbytes' signed dynamic map, in
    blocks of up to 256 numbers along the longer of the last two axes. Everything else is Optax's:
    bias correction, Nesterov momentum, Newton-Schulz, the scale s for a matrix's shape, decay, and
    AdamW for the other leaves. The momentum takes 1.02 bytes a number.

    Arithmetic and what is not in codes are float32 at least, whatever the weights are. Momentum of
    fewer than 4096 numbers has no codes. Where it is not finite it is kept as zero.

    Args:
        learning_rate: eta, a number or a schedule.
        weight_dimension_numbers: which leaves Muon is for, as in `galore`: such as
            `galore_jax.matrix_axes` for stacked layers. By default Optax's rule: all with two axes,
            embeddings and head too.
        exclude: paths of leaves that are AdamW's all the same, as in `galore`; with
            `weight_dimension_numbers` alone.
        **options: see `optax.contrib.muon`. `mu_dtype` is for AdamW's leaves and for momentum that
            has no codes.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients; its state is a
        `Muon8bitState`.

    Raises:
        TypeError: for an option that `optax.contrib.muon` does not have, or both of its kind of
            dimension numbers and this; at `update`, for a state of another kind.
        ValueError: as `galore` for `exclude` and `weight_dimension_numbers`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.muon8bit(0.02)
        >>> state = tx.init({"kernel": jnp.ones((64, 512)), "bias": jnp.ones(512)})
        >>> muon = state.inner_state.inner_states["muon"].inner_state[0]
        >>> muon.mu["kernel"].dtype, state.mu_scale["kernel"].shape
        (dtype('uint8'), (64, 2))

    References:
        Gupta et al., `Effective Quantization of Muon Optimizer States
        <https://arxiv.org/abs/2509.23106>`_, 2025
    """
    if weight_dimension_numbers is not None:
        if "muon_weight_dimension_numbers" in options:
            raise TypeError(
                "muon8bit: weight_dimension_numbers and muon_weight_dimension_numbers both say "
                "which leaves are matrices. Give one of them"
            )
        settings = Settings(
            rank=1, exclude=exclude, weight_dimension_numbers=weight_dimension_numbers
        )
        options["muon_weight_dimension_numbers"] = functools.partial(_matrices, settings)
    tx = in_float32(optax.contrib.muon(learning_rate, **options))

    # Compiled, so that momentum does not exist in full in float32.
    @jax.jit
    def init_fn(params):
        state = tx.init(params)
        large = jax.tree.map(
            lambda x: not _is_masked(x) and x.size >= MIN_SIZE, _momentum(state), is_leaf=_is_masked
        )
        # It is zero: XLA would take long to find that out, encoding it when it compiles.
        return _encoded(state, large, lambda x: quantize.zeros(x.shape, DYNAMIC))

    def update_fn(updates, state, params=None, **extra_args):
        check_state("muon8bit", state, Muon8bitState)
        large = jax.tree.map(lambda x: not _is_masked(x), state.mu_scale, is_leaf=_is_masked)
        updates, inner_state = tx.update(updates, _decoded(state), params, **extra_args)
        return updates, _encoded(inner_state, large)

    return transformation(init_fn, update_fn)


def _matrices(settings: Settings, params: optax.Params) -> Any:
    """By leaf what Optax's Muon calls its dimension numbers, None for AdamW's leaves."""
    specs = [
        optax.contrib.MuonDimensionNumbers(x.reduction_axes, x.output_axes)
        if isinstance(x, MatrixView)
        else None
        for x in settings.plan(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def _is_muon(x: Any) -> bool:
    return isinstance(x, optax.contrib.MuonState)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _with_momentum(state: optax.OptState, mu: optax.Updates) -> optax.OptState:
    """The state of Optax's Muon with another momentum."""
    return jax.tree.map(lambda x: x._replace(mu=mu) if _is_muon(x) else x, state, is_leaf=_is_muon)


def _momentum(state: optax.OptState) -> optax.Updates:
    (muon,) = filter(_is_muon, jax.tree.leaves(state, is_leaf=_is_muon))
    return muon.mu


def _encoded(
    state: optax.OptState,
    large: Any,
    encode: Callable[[jax.Array], quantize.Encoded] = lambda x: quantize.encode(x, DYNAMIC),
) -> Muon8bitState:
    """The state with its momentum in codes, where `large` says so."""
    mu = _momentum(state)

    def part(i: int) -> optax.Updates:
        def one(is_large, x):
            return encode(x)[i] if is_large else (x, optax.MaskedNode())[i]

        return jax.tree.map(one, large, mu)

    return Muon8bitState(_with_momentum(state, part(0)), part(1))


def _decoded(state: Muon8bitState) -> optax.OptState:
    def one(x, scales):
        return x if _is_masked(scales) else quantize.decode(x, scales, DYNAMIC, x.shape)

    mu = _momentum(state.inner_state)
    mu = jax.tree.map(one, mu, state.mu_scale, is_leaf=_is_masked)
    return _with_momentum(state.inner_state, mu)
