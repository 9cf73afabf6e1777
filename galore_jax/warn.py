"""Warnings that point at the line of the user's program."""

from __future__ import annotations

import sys
import warnings

# The caller stands at no fixed depth: below chains, masks, jits, `nnx.Optimizer`.
_NOT_THE_USER = {"galore_jax", "optax", "jax", "flax", "contextlib", "functools"}


def warn(message: str) -> None:
    """Warn at the innermost line that belongs to none of the libraries involved."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
