"""The optimizers `--optimizer` knows: GaLore's, and each one's full-rank counterpart."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_jax

# As in the paper, Adafactor's learning rate is not in units of the size of the weights.
ABSOLUTE_STEP = {"multiply_by_parameter_scale": False}
# The blocks are stacked: each layer's slice is a matrix by itself.
MATRICES = {"weight_dimension_numbers": galore_jax.matrix_axes}


def is_kernel(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is a kernel of the blocks (or a factor of one): what GaLore projects."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return names[0] == "blocks" and "kernel" in names


def labels(params: dict) -> dict:
    """A tree of `kernel` for the blocks' kernels and `other` for embeddings, head and norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" if is_kernel(path) else "other", params
    )


def galore_lion8bit(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, **galore_options
) -> optax.GradientTransformation:
    """Any optimizer goes into the subspace: here Lion with its momentum in 8 bits."""
    inner = galore_jax.lion8bit(learning_rate, weight_decay=weight_decay)
    return galore_jax.galore(inner, **galore_options)


def with_float32_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of Optax's with states and arithmetic in float32, as galore_jax's own have them.

    Left to itself it takes the weights' dtype: in bfloat16 a mean of squares ceases to move where
    one step is less than a 256th of it, and at b2 = 0.999 that is soon. (What galore_jax has for
    itself is no part of its interface.)
    """

    def wide(tree):
        whole = galore_jax.dequantize_weights(tree)
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), whole)

    def update_fn(updates, state, params=None):
        out, state = tx.update(wide(updates), state, None if params is None else wide(params))
        return jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates), state

    return optax.GradientTransformation(lambda params: tx.init(wide(params)), update_fn)


def frugal(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, **galore_options
) -> optax.GradientTransformation:
    """FRUGAL: AdamW in the subspace, signs of the gradient outside of it."""
    inner = optax.adamw(learning_rate, weight_decay=weight_decay)
    signs = optax.sign_sgd(_times(learning_rate, galore_options["scale"]))
    return galore_jax.galore(inner, residual=signs, **galore_options)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    make: Callable[..., optax.GradientTransformation] = optax.contrib.muon,
    **options,
) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks, AdamW at the same rate for the rest."""

    def kernels(params):
        spec = optax.contrib.MuonDimensionNumbers(-2, -1)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: spec if is_kernel(path) else None, params
        )

    return make(
        learning_rate, weight_decay=weight_decay, muon_weight_dimension_numbers=kernels, **options
    )


def optax_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    rank: int,
    update_proj_gap: int,
    scale: float,
) -> optax.GradientTransformation:
    """`optax.contrib.galore`, which takes no stacked layers: each is handed over by itself."""

    def kernels(params):
        spec = optax.contrib.GaLoreDimensionNumbers()
        return jax.tree_util.tree_map_with_path(
            lambda path, x: spec if is_kernel(path) and x.ndim == 2 else None, params
        )

    tx = optax.contrib.galore(
        learning_rate, rank, update_proj_gap, scale, weight_decay=weight_decay,
        weight_dimension_numbers=kernels,
    )  # fmt: skip

    def unstacked(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: list(x) if is_kernel(path) else x, tree
        )

    def update_fn(updates, state, params=None):
        flat, state = tx.update(unstacked(updates), state, unstacked(params))
        structure = jax.tree.structure(updates)
        stacked = [
            jnp.stack(x) if isinstance(x, list) else x for x in structure.flatten_up_to(flat)
        ]
        return structure.unflatten(stacked), state

    return optax.GradientTransformation(lambda params: tx.init(unstacked(params)), update_fn)


def _times(rate: optax.ScalarOrSchedule, factor: float) -> optax.ScalarOrSchedule:
    return (lambda step: factor * rate(step)) if callable(rate) else factor * rate


class Optimizer(NamedTuple):
    """One name `--optimizer` knows."""

    make: Callable[..., optax.GradientTransformation]
    # Learning rate in units of the recipe's, which is for galore_adamw. GaLore multiplies its
    # update by scale = 0.25, so the full-rank counterpart of a step is a quarter as long. Lion's
    # signs want about a tenth of Adam's rate; momentum SGD, whose step shrinks with the gradient,
    # wants it much larger; 8-bit states change nothing. Starting points: tune with
    # --learning-rate.
    rate: float
    options: tuple[str, ...] = ()  # of the settings of galore, those it takes
    decays: bool = True  # has a weight decay
    in_subspace: bool = False  # needs no more than projected gradients
    of_optax: bool = False  # its states take the weights' dtype
    whole_stacks: bool = False  # needs the gradient of all layers at once


GALORE = (
    *("rank", "update_proj_gap", "scale", "proj_type", "method", "refresh", "moments"),
    *("stagger", "projector_dtype"),
)
_galore = functools.partial(Optimizer, options=GALORE, in_subspace=True)
_outside = functools.partial(Optimizer, options=GALORE)
_full = functools.partial(Optimizer, of_optax=True)
_MUON = (*(name for name in GALORE if name != "scale"), "adam_learning_rate")
_MINI = ("update_proj_gap", "proj_type", "method")

OPTIMIZERS: dict[str, Optimizer] = {
    "galore_adamw": _galore(galore_jax.galore_adamw, 1.0),
    "galore_adamw8bit": _galore(galore_jax.galore_adamw8bit, 1.0),
    # Adafactor clips a leaf's update by its size in all layers, so it cannot take one at a time.
    "galore_adafactor": _galore(
        functools.partial(galore_jax.galore_adafactor, **ABSOLUTE_STEP),
        1.0,
        decays=False,
        whole_stacks=True,
    ),
    "galore_lion": _galore(galore_jax.galore_lion, 0.1),
    "galore_lion8bit": _galore(galore_lion8bit, 0.1),
    "galore_sgd": _galore(
        functools.partial(galore_jax.galore_sgd, momentum=0.9), 40.0, decays=False
    ),
    "galore_muon": Optimizer(galore_jax.galore_muon, 2.0, _MUON),
    "galore_muon8bit": Optimizer(
        functools.partial(galore_jax.galore_muon, accumulator_dtype="int8"), 2.0, _MUON
    ),
    "fira": _outside(galore_jax.fira, 1.0),
    "frugal": _outside(frugal, 1.0),
    "apollo": Optimizer(galore_jax.apollo, 0.25, ("rank", *_MINI)),
    "apollo_mini": Optimizer(galore_jax.apollo_mini, 0.25, _MINI),
    "ldadam": Optimizer(galore_jax.ldadam, 0.25, ("rank", "proj_type")),
    "scale_sgd": Optimizer(galore_jax.scale_sgd, 0.1),
    "alice": Optimizer(
        functools.partial(galore_jax.alice, **MATRICES), 2.0, ("rank", "update_proj_gap")
    ),
    "foam": Optimizer(functools.partial(galore_jax.foam, **MATRICES), 0.25),
    "racs": Optimizer(functools.partial(galore_jax.racs, **MATRICES), 2.0),
    "optax_galore": _full(
        optax_galore, 1.0, ("rank", "update_proj_gap", "scale"), whole_stacks=True
    ),
    "adamw": _full(optax.adamw, 0.25),
    "adamw8bit": Optimizer(galore_jax.adamw8bit, 0.25),
    "adafactor": _full(
        functools.partial(optax.adafactor, **ABSOLUTE_STEP), 0.25, decays=False, whole_stacks=True
    ),
    "lion": _full(optax.lion, 0.025),
    "lion8bit": Optimizer(galore_jax.lion8bit, 0.025),
    "sgd": _full(functools.partial(optax.sgd, momentum=0.9), 10.0, decays=False),
    "muon": _full(muon, 2.0),
    "muon8bit": Optimizer(functools.partial(muon, make=galore_jax.muon8bit), 2.0),
}


def create(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip: float | None = None,
    embedding_learning_rate: optax.ScalarOrSchedule | None = None,
    labels: Any = None,
    target: str | None = None,
    **galore_options,
) -> optax.GradientTransformation:
    """The named optimizer, behind gradient clipping by the global norm if `clip` is given.

    Args:
      name: a key of `OPTIMIZERS`.
      learning_rate: a float or a schedule.
      weight_decay: decoupled decay, for the optimizers that have one.
      clip: largest global norm of the gradient.
      embedding_learning_rate: trains embeddings, head and norms with AdamW at a rate of their own;
        it needs `labels`.
      labels: a tree of `kernel`, `other` and `fixed`, where some weights are fixed or train
        differently; see `labels`.
      target: regular expression for the paths of the kernels that are projected, where not all are.
      **galore_options: `rank` and the other arguments of `galore_jax.galore`, and of `galore_muon`
        the `adam_learning_rate`; each optimizer gets those it takes, the full-rank ones none.
    """
    entry = OPTIMIZERS[name]
    options: dict[str, Any] = {k: v for k, v in galore_options.items() if k in entry.options}
    if entry.decays:
        options["weight_decay"] = weight_decay
    if name in STACKED:
        options |= MATRICES
        if target is not None:
            options["exclude"] = f"^(?!.*(?:{target}))"
    tx = entry.make(learning_rate, **options)
    if entry.of_optax:
        tx = with_float32_state(tx)
    if labels is not None:
        other = tx
        if embedding_learning_rate is not None:
            other = with_float32_state(
                optax.adamw(embedding_learning_rate, weight_decay=weight_decay)
            )
        parts: dict[Any, Any] = {"kernel": tx, "other": other, "fixed": optax.set_to_zero()}
        tx = optax.partition(parts, labels)
    # A link either way, so that the state is one tree with and without clipping.
    return optax.chain(optax.identity() if clip is None else optax.clip_by_global_norm(clip), tx)


# Those with a projector for each layer of a stacked kernel.
STACKED = [n for n, o in OPTIMIZERS.items() if "proj_type" in o.options]
IN_SUBSPACE = [n for n, o in OPTIMIZERS.items() if o.in_subspace]
