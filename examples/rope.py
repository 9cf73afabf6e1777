"""Rotary positions: how fast each pair of channels turns, and the turning.

A model that was trained on short texts is stretched to longer ones by slowing pairs down; each
published way is a class, with the names of Hugging Face's `rope_parameters` for its fields.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


def frequencies(head_dim: int, theta: float) -> jax.Array:
    """Radians a position, float32 (C/2,), from 1 down to nearly 1 / theta."""
    return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


@dataclasses.dataclass(frozen=True)
class Linear:
    """All pairs slower: Chen et al., `Position Interpolation <https://arxiv.org/abs/2306.15595>`_."""

    factor: float

    def __call__(self, head_dim: int, theta: float, length: int, time: int) -> jax.Array:
        """Radians a position; `length` is the model's, `time` the text's, here not used."""
        return frequencies(head_dim, theta) / self.factor


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A larger theta for texts longer than the model's length, and more so the longer they are."""

    factor: float

    def __call__(self, head_dim: int, theta: float, length: int, time: int) -> jax.Array:
        """Radians a position in a text of `time` tokens."""
        stretch = self.factor * max(time, length) / length - (self.factor - 1)
        return frequencies(head_dim, theta * stretch ** (head_dim / (head_dim - 2)))


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Slow pairs slower, and larger scores: `YaRN <https://arxiv.org/abs/2309.00071>`_."""

    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def _times(self, length: int) -> float:
        return self.factor or length / (self.original_max_position_embeddings or length)

    def __call__(self, head_dim: int, theta: float, length: int, time: int) -> jax.Array:
        """Radians a position; `length` is the model's, `time` the text's, here not used."""
        original = self.original_max_position_embeddings or length

        def pair_that_turns(times: float) -> float:
            """The pair, as a fraction too, that turns so many times in the original length."""
            return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = (pair_that_turns(n) for n in (self.beta_fast or 32, self.beta_slow or 1))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        slow = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / width, 0, 1)
        plain = frequencies(head_dim, theta)
        return plain / self._times(length) * slow + plain * (1 - slow)

    def amplitude(self, length: int) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(share: float) -> float:
            return 1 + 0.1 * share * math.log(max(1.0, self._times(length)))

        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1)


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Pairs that turn seldom in the original length slower; between two bounds, in part."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int | None = None

    def __call__(self, head_dim: int, theta: float, length: int, time: int) -> jax.Array:
        """Radians a position; `length` is the model's, `time` the text's, here not used."""
        original = self.original_max_position_embeddings or length
        plain = frequencies(head_dim, theta)
        turns = original * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


Scaling = Linear | Dynamic | Yarn | Llama3


def rotary(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: Scaling | None = None,
    length: int = 2048,
    time: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles, float32 (T, C/2), for positions (T,).

    Args:
      positions: of a text's tokens.
      head_dim: channels of a head, C.
      theta: the slowest pair takes about this many radians.
      scaling: how the model is stretched.
      length: positions that it was trained for, or stretched to, as its scaling takes it.
      time: tokens that the text has, or will have; by default those of `positions`.
    """
    speeds, amplitude = frequencies(head_dim, theta), None
    if scaling is not None:
        speeds = scaling(head_dim, theta, length, time or positions.shape[0])
        amplitude = scaling.amplitude(length) if isinstance(scaling, Yarn) else None
    angles = positions.astype(jnp.float32)[:, None] * speeds
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if amplitude is None else (amplitude * cos, amplitude * sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channel pairs (c, c + C/2) of x (B, T, H, C) by their position's angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
