"""What an optimizer with `galore` in it would do, asked without computing anything.

`summary` runs an `init` and collects the records of every `galore` in it. The tiers that refresh
before the update run an `update` and collect the probes.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.basis import Methods
from galore_jax.leaf import Leaf, Plan


class Record(NamedTuple):
    """What an `init` of `galore` or `scale_by_apollo` decided, for `summary`."""

    plan: Plan
    params: optax.Params
    inner: optax.GradientTransformation
    init: Callable[[optax.Params], Any]  # the one that decided


class Probe(NamedTuple):
    """What an `update` of `galore` would do, for the tiers that refresh before it."""

    leaves: tuple[Leaf, ...]
    update_proj_gap: Any
    stagger: bool
    methods: Methods
    in_multi_steps: bool = False  # which then takes full gradients
    needs: str | None = None  # what needs full gradients, if anything does


_probes: contextvars.ContextVar[list[Probe] | None] = contextvars.ContextVar(
    "galore_jax_probes", default=None
)
_records: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar(
    "galore_jax_records", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Record]]:
    """Collect the decisions of every `galore` that is initialised within."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def recorded(record: Record) -> bool:
    """Whether an init is asked for its decisions, which it hereby tells."""
    records = _records.get()
    if records is not None:
        records.append(record)
    return records is not None


def probe_all(tx: optax.GradientTransformation, params: Any, opt_state: Any) -> list[Probe]:
    """The settings of every `galore` in an optimizer, at this state; nothing is computed."""
    probes: list[Probe] = []
    token = _probes.set(probes)
    try:
        jax.eval_shape(lambda: tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params))
    finally:
        _probes.reset(token)
    return probes


def probing(probe: Probe) -> bool:
    """Whether an update is asked for its settings alone, which it hereby tells."""
    probes = _probes.get()
    if probes is not None:
        probes.append(probe)
    return probes is not None
