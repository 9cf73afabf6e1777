"""Text from a model, one token after another.

No key-value cache: a whole window is computed for every token. Enough to look at what a run
has learned.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tokenizers
from jax.experimental import multihost_utils

from examples import llama


@functools.partial(jax.jit, static_argnames=("model_of", "count", "window"))
def sample_ids(
    model_of: Callable[[dict], llama.Llama],
    params: dict,
    prompt: jax.Array,
    key: jax.Array,
    temperature: float,
    *,
    count: int,
    window: int,
) -> jax.Array:
    """Prompt (P,) followed by `count` sampled ids: int32 (P + count,).

    The model sees the last `window` tokens at most.
    """
    model = model_of(params)
    total = prompt.shape[0] + count
    # Room for a whole window even where the text is shorter: what lies after a token cannot
    # change its logits.
    ids = jnp.zeros(max(total, window), jnp.int32).at[: prompt.shape[0]].set(prompt)

    def extend(position, ids):
        start = jnp.maximum(position - window, 0)
        seen = jax.lax.dynamic_slice(ids, (start,), (window,))
        logits = model(seen[None])[0, position - 1 - start].astype(jnp.float32)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        return ids.at[position].set(drawn.astype(jnp.int32))

    return jax.lax.fori_loop(prompt.shape[0], total, extend, ids)[:total]


def sample_text(
    model_of: Callable[[dict], llama.Llama],
    params: dict,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    *,
    count: int,
    window: int,
    seed: int = 0,
    temperature: float = 0.8,
) -> str:
    """`prompt`, continued by `count` tokens."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    out = sample_ids(
        model_of,
        params,
        jnp.array(ids, jnp.int32),
        jax.random.key(seed),
        temperature,
        count=count,
        window=window,
    )
    ids = multihost_utils.process_allgather(out, tiled=True).tolist()
    return tokenizer.decode(ids, skip_special_tokens=False)
