"""`optax.chain` that knows a bare `galore`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from galore_jax.optimizers.wrap import chained
from galore_jax.precision import computes_wide

_optax_chain = optax.chain


class Mark(optax.GradientTransformationExtraArgs):
    """A `galore` without an inner optimizer: `chain` wraps what follows it."""

    around: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]


def mark(around: Callable[[optax.GradientTransformation], Any]) -> Mark:
    """A link that stands for `around(what follows it)`."""

    def refuse(*args, **kwargs):
        raise ValueError(
            "a galore(...) without an inner optimizer reached a transformation that does not know "
            "it. Write galore_jax.chain(galore(rank=...), optax.adamw(...)) (which importing "
            "galore_jax also installs as optax.chain), or galore(optax.adamw(...), rank=...)"
        )

    made = Mark(refuse, refuse)
    made.around = around
    return made


def chain(*args: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chain transformations; after a bare `galore(...)`, run them inside the subspace.

    `chain(a, galore(**kw), b, c)` is `optax.chain(a, galore(optax.chain(b, c), **kw))`.
    Without a bare `galore` it is `optax.chain`, unchanged. Optax's own chain cannot do this:
    each link's `init` sees full-size parameters, and nothing after the last link could lift
    the update back. Importing `galore_jax` therefore installs this function as `optax.chain`.

    Args:
        *args: the transformations, in the order in which they meet the gradient.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: where nothing follows a bare `galore`, or a second one does.

    Example:
        >>> import jax.numpy as jnp, optax, galore_jax
        >>> tx = galore_jax.chain(galore_jax.galore(rank=2), optax.adamw(1e-3))
        >>> state = tx.init({"kernel": jnp.ones((8, 16))})
        >>> state[0].inner_state[0].mu["kernel"].shape
        (2, 16)
    """
    for i, link in enumerate(args):
        if not isinstance(link, Mark):
            continue
        rest = args[i + 1 :]
        if not rest:
            raise ValueError(
                "chain: nothing follows galore(...), so nothing would run in the subspace. Put "
                "the optimizer after it: chain(galore(rank=128), optax.adamw(1e-3))"
            )
        if any(isinstance(r, Mark) for r in rest):
            raise ValueError("chain: two bare galore(...) links; the gradient is projected once")
        return _optax_chain(*args[:i], link.around(_together(rest)))
    return _optax_chain(*args)


def _together(links: tuple[optax.GradientTransformation, ...]) -> optax.GradientTransformation:
    """What runs in the subspace. One link stays bare: its state is then the wrapper's."""
    if len(links) == 1:
        return links[0]
    # Those that take any dtype are then spared float32 copies in whatever chain they begin.
    return chained(*links) if computes_wide(links[0]) else _optax_chain(*links)


def install() -> None:
    """Put it into Optax; doing it twice changes nothing."""
    optax.chain = chain
