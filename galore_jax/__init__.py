"""GaLore for Optax: memory-efficient training in a low-rank subspace of the gradient."""

from galore_jax import chaining, multi_steps
from galore_jax.chaining import chain
from galore_jax.diagnostics import metrics
from galore_jax.int8 import Int8Weight, dequantize_weights
from galore_jax.layers.model import layerwise
from galore_jax.layers.update import value_and_update
from galore_jax.matrix.layouts import matrix_axes
from galore_jax.matrix.specs import last_two_axes
from galore_jax.optimizers.adafactor import galore_adafactor
from galore_jax.optimizers.alias import (
    adamw8bit,
    galore_adamw,
    galore_adamw8bit,
    galore_lion,
    galore_sgd,
    lion8bit,
)
from galore_jax.optimizers.alice import alice, scale_by_alice
from galore_jax.optimizers.apollo import apollo, apollo_mini, scale_by_apollo
from galore_jax.optimizers.column_norm import scale_by_column_norm, scale_sgd
from galore_jax.optimizers.eightbit import scale_by_adam8bit, scale_by_lion8bit, trace8bit
from galore_jax.optimizers.fira import fira, scale_by_fira
from galore_jax.optimizers.foam import foam, scale_by_foam
from galore_jax.optimizers.ldadam import ldadam, scale_by_ldadam
from galore_jax.optimizers.muon import galore_muon
from galore_jax.optimizers.muon8bit import muon8bit
from galore_jax.optimizers.racs import racs, scale_by_row_and_column
from galore_jax.rounding import apply_updates
from galore_jax.sharding import state_sharding
from galore_jax.state import GaLoreState
from galore_jax.subspace.gradients import value_and_grad
from galore_jax.subspace.matmul import dot_general, promote_dtype
from galore_jax.summary_table import summary
from galore_jax.transform import galore
from galore_jax.weights import quantize_weights

chaining.install()
multi_steps.install()

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (grouped by use)
    # Transformations
    "galore",
    "GaLoreState",
    "chain",
    # Aliases
    "galore_adamw",
    "galore_adamw8bit",
    "galore_adafactor",
    "galore_lion",
    "galore_sgd",
    # The family
    "galore_muon",
    "fira",
    "scale_by_fira",
    "apollo",
    "apollo_mini",
    "scale_by_apollo",
    "ldadam",
    "scale_by_ldadam",
    "alice",
    "scale_by_alice",
    "foam",
    "scale_by_foam",
    "racs",
    "scale_by_row_and_column",
    "scale_sgd",
    "scale_by_column_norm",
    # 8-bit states
    "adamw8bit",
    "lion8bit",
    "muon8bit",
    "scale_by_adam8bit",
    "scale_by_lion8bit",
    "trace8bit",
    # Gradients in the subspace
    "value_and_grad",
    "dot_general",
    "promote_dtype",
    "apply_updates",
    # Layer by layer
    "layerwise",
    "value_and_update",
    # Weights in 8 bits
    "quantize_weights",
    "dequantize_weights",
    "Int8Weight",
    # Tools
    "matrix_axes",
    "last_two_axes",
    "state_sharding",
    "summary",
    "metrics",
]
