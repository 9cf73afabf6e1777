"""An Optax transformation as an optimizer of Keras, on its JAX backend.

`model.compile(OptaxOptimizer(tx), loss)`, and `model.fit` trains with it. Weights go by their paths
(`sequential/dense/kernel`), which `exclude` is matched against.
"""

from __future__ import annotations

from typing import Any

import jax
import keras  # pyright: ignore[reportMissingImports]
import optax


class OptaxOptimizer(keras.optimizers.Optimizer):
    """Learning rate, clipping and decay are those of `tx`; Keras's own stay out of it."""

    def __init__(self, tx: optax.GradientTransformation, name: str = "optax"):
        super().__init__(learning_rate=1.0, name=name)
        self.tx = tx

    def build(self, variables: list[Any]) -> None:
        """Make the state's arrays variables of Keras."""
        if self.built:
            return
        super().build(variables)
        leaves, self._treedef = jax.tree.flatten(self.tx.init({v.path: v.value for v in variables}))
        self._arrays = [
            self.add_variable(x.shape, dtype=str(x.dtype), name=f"state_{i}")
            for i, x in enumerate(leaves)
        ]
        for variable, x in zip(self._arrays, leaves, strict=True):
            variable.assign(x)

    @property
    def opt_state(self) -> Any:
        """The state of `tx`."""
        return self._treedef.unflatten([v.value for v in self._arrays])

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        params = {v.path: v.value for v in trainable_variables}
        updates, state = self.tx.update(
            dict(zip(params, grads, strict=True)), self.opt_state, params
        )
        new: Any = optax.apply_updates(params, updates)
        for v in trainable_variables:
            v.assign(new[v.path])
        for v, x in zip(self._arrays, jax.tree.leaves(state), strict=True):
            v.assign(x)
