"""`optax.MultiSteps` that tells a `galore` in it which micro-step is the last."""

from __future__ import annotations

import dataclasses
import functools

import optax

from galore_jax.call import Call
from galore_jax.state import holds_galore

_multi_steps_update = optax.MultiSteps.update


@functools.wraps(_multi_steps_update)
def _update_telling_when_it_emits(self, updates, state, params=None, **extra_args):
    # MultiSteps runs the wrapped update at every micro-step and drops all results but the
    # last, so a refresh would decompose k times. Only it knows which micro-step is the last.
    if holds_galore(state.inner_opt_state):
        emits = state.mini_step == self._every_k_schedule(state.gradient_step) - 1
        call = extra_args.get("galore") or Call()
        if call.emits is not None:  # of a MultiSteps around this one
            emits &= call.emits
        extra_args["galore"] = dataclasses.replace(call, emits=emits)
    return _multi_steps_update(self, updates, state, params, **extra_args)


def _gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
    """As a link that hands on what it is told; in a chain Optax's drops extra arguments."""
    return optax.GradientTransformationExtraArgs(self.init, self.update)


def install() -> None:
    """Put these into Optax; doing it twice changes nothing."""
    optax.MultiSteps.update = _update_telling_when_it_emits
    optax.MultiSteps.gradient_transformation = _gradient_transformation
