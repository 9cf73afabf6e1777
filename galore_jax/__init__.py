"""GaLore for Optax: memory-efficient training in a low-rank subspace of the gradient."""

from galore_jax.adafactor import galore_adafactor
from galore_jax.alias import galore_adamw, galore_adamw8bit, galore_lion, galore_sgd
from galore_jax.chaining import chain, install
from galore_jax.eightbit import adamw8bit, lion8bit, scale_by_adam8bit, scale_by_lion8bit
from galore_jax.family.apollo import apollo, apollo_mini, scale_by_apollo
from galore_jax.family.column_norm import scale_by_column_norm, scale_sgd
from galore_jax.family.fira import fira, scale_by_fira
from galore_jax.family.ldadam import ldadam, scale_by_ldadam
from galore_jax.family.muon import galore_muon
from galore_jax.layers import layerwise, value_and_update
from galore_jax.rounding import apply_updates
from galore_jax.specs import last_two_axes
from galore_jax.subspace import value_and_grad
from galore_jax.summary import summary
from galore_jax.tap import dot_general, promote_dtype
from galore_jax.transform import GaLoreState, galore

install()

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
    "scale_sgd",
    "scale_by_column_norm",
    # 8-bit states
    "adamw8bit",
    "lion8bit",
    "scale_by_adam8bit",
    "scale_by_lion8bit",
    # Gradients in the subspace
    "value_and_grad",
    "dot_general",
    "promote_dtype",
    "apply_updates",
    # Layer by layer
    "layerwise",
    "value_and_update",
    # Tools
    "last_two_axes",
    "summary",
]
