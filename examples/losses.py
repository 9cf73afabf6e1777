"""Cross-entropy of a language model, with or without the logits of its whole vocabulary.

Names of axes in shapes: B batch, T time, N tokens (B T), V vocabulary, D hidden, C words in a
chunk of the vocabulary.

Reference: Wijmans et al., `Cut Your Losses in Large-Vocabulary Language Models
<https://arxiv.org/abs/2411.09009>`_, 2025.
"""

import functools

import jax
import jax.numpy as jnp


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each target, float32 (B, T), for logits (B, T, V)."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunked_losses(
    x: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int, axis: int = 1
) -> jax.Array:
    r"""`token_losses` of the logits `x @ head`, which exist for one chunk of words at a time.

    The vocabulary is cut and not the tokens: the gradient of a chunk's part of the head is
    then complete at once. Summed over chunks of tokens it would need a float32 copy of the
    head, or lose digits in bfloat16. Tokens sharded over devices stay where they are, too.

    The forward pass keeps each token's log-sum-exp; with it the backward pass computes a chunk
    of logits again and from these, with g the cotangent of the losses,

    .. math::
        d = g\,(\exp(x W - \mathrm{lse}) - \mathrm{onehot}), \quad dW = x^T d, \quad dx = d W^T

    Args:
      x: hidden states (B, T, D).
      head: weights (D, V), or (V, D) with `axis=0`.
      targets: ids (B, T).
      chunk: most words at a time.
      axis: the vocabulary's axis in `head`.

    Returns:
      Losses, float32 (B, T).
    """
    # Head as an array: a kernel that projects its gradient is used once so, not once a chunk.
    flat = x.reshape(-1, x.shape[-1]), jnp.asarray(head), targets.reshape(-1)
    return jnp.reshape(_losses(*flat, chunk, axis), targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _losses(x, head, targets, chunk, axis):
    """Losses, float32 (N,), for x (N, D) and targets (N,)."""
    return _forward(x, head, targets, chunk, axis)[0]


def _chunks(words: int, chunk: int) -> tuple[int, tuple[jax.Array, jax.Array]]:
    """Size of equal chunks and, of each, its first column and the first not seen before.

    Where the size does not divide the vocabulary, the last chunk begins within the one before.
    """
    count = -(-words // chunk)
    size = -(-words // count)
    unseen = jnp.arange(count) * size
    return size, (jnp.minimum(unseen, words - size), unseen)


def _part(head: jax.Array, start: jax.Array, size: int, axis: int, dtype) -> jax.Array:
    """Columns of the head (D, C)."""
    part = jax.lax.dynamic_slice_in_dim(head, start, size, axis).astype(dtype)
    return part if axis else part.T


def _forward(x, head, targets, chunk, axis):
    size, chunks = _chunks(head.shape[axis], chunk)

    def add(carry, at):
        largest, total, picked = carry
        start, unseen = at
        part = _part(head, start, size, axis, x.dtype)
        logits = jnp.dot(x, part, preferred_element_type=jnp.float32)
        logits = jnp.where(start + jnp.arange(size) >= unseen, logits, -jnp.inf)
        new = jnp.maximum(largest, jnp.max(logits, axis=-1))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=-1)
        column = targets - start
        here = (targets >= unseen) & (column < size)
        found = jnp.take_along_axis(logits, jnp.clip(column, 0, size - 1)[:, None], axis=-1)[:, 0]
        return (new, total, jnp.where(here, found, picked)), None

    zeros = jnp.zeros(x.shape[0], jnp.float32)
    (largest, total, picked), _ = jax.lax.scan(add, (zeros - jnp.inf, zeros, zeros), chunks)
    log_total = largest + jnp.log(total)
    return log_total - picked, (x, head, targets, log_total)


def _backward(chunk, axis, saved, g):
    x, head, targets, log_total = saved
    size, chunks = _chunks(head.shape[axis], chunk)

    def add(carry, at):
        dx, dhead = carry
        start, unseen = at
        part = _part(head, start, size, axis, x.dtype)
        logits = jnp.dot(x, part, preferred_element_type=jnp.float32)
        columns = start + jnp.arange(size)
        d = jnp.exp(logits - log_total[:, None]) - (columns == targets[:, None])
        d = (d * g[:, None]).astype(x.dtype)
        dpart = jnp.dot(x.T, d, preferred_element_type=jnp.float32).astype(head.dtype)
        dpart = dpart if axis else dpart.T
        dhead = jax.lax.dynamic_update_slice_in_dim(dhead, dpart, start, axis)
        d = jnp.where(columns >= unseen, d, 0)
        return (dx + jnp.dot(d, part.T, preferred_element_type=jnp.float32), dhead), None

    carry = (jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(head))
    (dx, dhead), _ = jax.lax.scan(add, carry, chunks)
    return dx.astype(x.dtype), dhead, None


_losses.defvjp(_forward, _backward)
