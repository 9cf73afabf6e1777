"""Text from a model, one token after another; what came before is in a cache of keys and values.

The cache has room for the whole text, and a model with windows does not look at all of it. Nothing
is forgotten else: beyond the length that a model was trained for its text may get worse.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from jax.experimental import multihost_utils

from examples import llama


@functools.partial(
    jax.jit, static_argnames=("model_of", "count", "ends", "temperature", "top_k", "top_p")
)
def sample_ids(
    model_of: Callable[[dict], llama.Llama],
    params: dict,
    prompt: jax.Array,
    key: jax.Array,
    *,
    count: int,
    ends: tuple[int, ...] = (),
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Prompt (P,) followed by `count` ids, int32 (P + count,); -1 after one of `ends`.

    See `drawn` for the others.
    """
    model, start = model_of(params), prompt.shape[0]
    total = start + count

    def following(tokens, position, cache):
        """The id at a position, after tokens (1, T) that go up to it."""
        x, cache = model.extend(tokens, cache)
        logits = model.logits(x[:, -1])[0].astype(jnp.float32)
        own = jax.random.fold_in(key, position)
        return drawn(logits, own, temperature, top_k, top_p), cache

    def unfinished(state):
        position, last, *_ = state
        return (position < total) & jnp.all(last != jnp.array(ends, jnp.int32))

    def extend(state):
        position, last, ids, cache = state
        new, cache = following(last[None, None], position, cache)
        return position + 1, new, ids.at[position].set(new), cache

    first, cache = following(prompt[None], start, model.empty_cache(1, total))
    ids = jnp.full(total, -1, jnp.int32).at[:start].set(prompt).at[start].set(first)
    return jax.lax.while_loop(unfinished, extend, (start + 1, first, ids, cache))[2]


def drawn(
    logits: jax.Array,
    key: jax.Array,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """An id, int32, from its logits (V,).

    Args:
      logits: of the next token.
      key: for the drawing.
      temperature: divides the logits; at 0 the likeliest id is taken.
      top_k: draws from so many of the likeliest.
      top_p: draws from as few of the likeliest as have this share of the probability together.
    """
    if temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.size))[0][-1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, descending=True)
        share = jax.nn.softmax(ordered)
        needed = jnp.sum(jnp.cumsum(share) - share <= top_p)  # Before these there is not enough.
        logits = jnp.where(logits < ordered[needed - 1], -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def sample_text(
    model_of: Callable[[dict], llama.Llama],
    params: dict,
    tokenizer: tokenizers.Tokenizer,
    prompt: Sequence[int],
    *,
    seed: int = 0,
    ends: tuple[int, ...] = (),
    **how: Any,
) -> str:
    """The text of the prompt's ids and what follows, up to the end of text: see `sample_ids`."""
    ids = sample_ids(
        model_of, params, jnp.array(prompt, jnp.int32), jax.random.key(seed), ends=ends, **how
    )
    found = multihost_utils.process_allgather(ids, tiled=True)
    text = [i for i in found.tolist() if i >= 0]
    return tokenizer.decode(text[:-1] if text[-1] in ends else text)
