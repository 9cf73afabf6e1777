"""The optimizers `--optimizer` knows: GaLore's, and each one's full-rank counterpart."""

from collections.abc import Callable
from functools import partial

import optax

import galore_jax

# As in the paper, Adafactor's learning rate is not in units of the size of the weights.
ABSOLUTE_STEP = {"multiply_by_parameter_scale": False}


def galore_lion8bit(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, **galore_options
) -> optax.GradientTransformation:
    """Any optimizer goes into the subspace: here Lion with its momentum in 8 bits."""
    inner = galore_jax.lion8bit(learning_rate, weight_decay=weight_decay)
    return galore_jax.galore(inner, **galore_options)


# name: (constructor, learning rate in units of the recipe's, which is for galore_adamw).
# GaLore multiplies its update by scale = 0.25, so the full-rank counterpart of a step is a
# quarter as long. Lion's signs want about a tenth of Adam's rate; momentum SGD, whose step
# shrinks with the gradient, wants it much larger; 8-bit states change nothing. Starting points:
# tune with --learning-rate.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "galore_adamw": (galore_jax.galore_adamw, 1.0),
    "galore_adamw8bit": (galore_jax.galore_adamw8bit, 1.0),
    "galore_adafactor": (partial(galore_jax.galore_adafactor, **ABSOLUTE_STEP), 1.0),
    "galore_lion": (galore_jax.galore_lion, 0.1),
    "galore_lion8bit": (galore_lion8bit, 0.1),
    "galore_sgd": (partial(galore_jax.galore_sgd, momentum=0.9), 40.0),
    "adamw": (optax.adamw, 0.25),
    "adamw8bit": (galore_jax.adamw8bit, 0.25),
    "adafactor": (partial(optax.adafactor, **ABSOLUTE_STEP), 0.25),
    "lion": (optax.lion, 0.025),
    "lion8bit": (galore_jax.lion8bit, 0.025),
    "sgd": (partial(optax.sgd, momentum=0.9), 10.0),
}
WITHOUT_WEIGHT_DECAY = {"galore_adafactor", "galore_sgd", "adafactor", "sgd"}
# Adafactor clips a leaf's update by its size in all layers, so it cannot take one at a time.
WHOLE_STACKS = {"galore_adafactor", "adafactor"}


def is_galore(name: str) -> bool:
    """Whether the named optimizer projects gradients."""
    return name.startswith("galore_")


def learning_rate_factor(name: str) -> float:
    """The named optimizer's learning rate in units of the recipe's."""
    return OPTIMIZERS[name][1]


def create(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip: float | None = None,
    **galore_options,
) -> optax.GradientTransformation:
    """The named optimizer, behind gradient clipping by the global norm if `clip` is given.

    Args:
      name: a key of `OPTIMIZERS`.
      learning_rate: a float or a schedule.
      weight_decay: decoupled decay, for the optimizers that have one.
      clip: largest global norm of the gradient.
      **galore_options: `rank` and the other arguments of `galore_jax.galore`; the full-rank
        optimizers have no use for them.
    """
    options = {"weight_decay": weight_decay} if name not in WITHOUT_WEIGHT_DECAY else {}
    if is_galore(name):
        # The blocks are stacked: each layer's slice is a matrix with a projector of its own.
        options |= galore_options | {"weight_dimension_numbers": galore_jax.last_two_axes}
    tx = OPTIMIZERS[name][0](learning_rate, **options)
    # A link either way, so that the state is one tree with and without clipping.
    return optax.chain(optax.identity() if clip is None else optax.clip_by_global_norm(clip), tx)
