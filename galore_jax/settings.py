"""The options of `galore`, checked once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Required, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.inner.moments import POLICIES
from galore_jax.matrix import plan as plan_lib
from galore_jax.matrix.plan import DEFAULT_EXCLUDE, PROJ_TYPES, Plan, Rank
from galore_jax.projector.basis import Methods
from galore_jax.projector.basis import methods as read_methods
from galore_jax.projector.storage import INDICES, QUANTISED, Storage

_F = TypeVar("_F", bound=Callable[..., Any])


class GaLoreOptions(TypedDict, total=False):
    """The options' types, for functions that take them all; `galore` documents them."""

    rank: Required[Rank]
    update_proj_gap: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike
    unprojected_scale: jax.typing.ArrayLike
    proj_type: str
    method: str | Mapping[int, str]
    refresh: str
    stagger: bool
    moments: str
    residual: optax.GradientTransformation | None
    exclude: str | None
    weight_dimension_numbers: Any
    projector_dtype: Any


# Compared and hashed by identity: a tree of dimension numbers has no hash.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """The options' defaults and what they have to be; `galore` documents them."""

    rank: Rank
    update_proj_gap: jax.typing.ArrayLike = 200
    scale: jax.typing.ArrayLike = 0.25
    unprojected_scale: jax.typing.ArrayLike = 1.0
    proj_type: str = "std"
    method: str | Mapping[int, str] = "randomized"
    refresh: str = "fixed"
    stagger: bool = False
    moments: str = "keep"
    residual: optax.GradientTransformation | None = None
    exclude: str | None = DEFAULT_EXCLUDE
    weight_dimension_numbers: Any = None
    projector_dtype: Any = None

    def __post_init__(self):
        plan_lib.check_rank(self.rank)
        check_gap(self.update_proj_gap)
        check_scale("scale", self.scale)
        check_scale("unprojected_scale", self.unprojected_scale)
        check_choice("proj_type", self.proj_type, PROJ_TYPES)
        check_choice("refresh", self.refresh, ("fixed", "lazy"))
        check_choice("stagger", self.stagger, (True, False))
        check_choice("moments", self.moments, POLICIES)
        _check_pattern(self.exclude)
        if self.residual is not None and not is_transformation(self.residual):
            raise TypeError(
                "residual must be an optax.GradientTransformation or None, got "
                f"{self.residual!r}; FRUGAL's is optax.sign_sgd(learning_rate)"
            )
        _ = self.methods, self.storage  # which check theirs

    @property
    def methods(self) -> Methods:
        """Which method from which step on."""
        return read_methods(self.method)

    @property
    def storage(self) -> Storage:
        """How projectors are stored; None for the dtype of the arithmetic."""
        if self.methods != read_methods("coordinates"):
            return _storage(self.projector_dtype)
        if self.projector_dtype is not None:
            raise ValueError(
                "method='coordinates' stores which rows it takes, so projector_dtype has no "
                f"meaning, got {self.projector_dtype!r}; leave it out"
            )
        if self.proj_type == "full":
            raise ValueError("method='coordinates' projects one side, not proj_type='full'")
        return INDICES

    @property
    def needs(self) -> str | None:
        """What needs full gradients, if anything does."""
        return None if self.residual is None else "galore's residual="

    @property
    def lazy(self) -> bool:
        """Whether a matrix whose subspace barely moves is refreshed less often."""
        return self.refresh == "lazy"

    def unprojected(self, update: Any) -> Any:
        """The update of a leaf that is not projected, given the inner optimizer's."""
        scale = self.unprojected_scale
        return update if isinstance(scale, numbers.Real) and scale == 1 else scale * update

    def plan(self, params: optax.Params) -> Plan:
        """What becomes of each leaf of `params`, in flattening order."""
        return plan_lib.plan(
            params,
            rank=self.rank,
            proj_type=self.proj_type,
            exclude=self.exclude,
            weight_dimension_numbers=self.weight_dimension_numbers,
        )


def takes(
    of: Callable[..., Any], without: Iterable[str] = (), **defaults: Any
) -> Callable[[_F], _F]:
    """Show what a function passes on as `**options` in its signature, one by one.

    `optax.inject_hyperparams` reads signatures: it injects what it finds there by name.

    Args:
        of: what takes the options, by keyword alone: `Settings`, or a function that shows them.
        without: options that it takes and this function does not.
        **defaults: defaults of this function's own.

    Returns:
        A decorator. An option that is not shown is a TypeError.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in own} | set(without)
        options = [p for p in inspect.signature(of).parameters.values() if p.kind is p.KEYWORD_ONLY]
        shown = [
            p.replace(default=defaults.get(p.name, p.default))
            for p in options
            if p.name not in known
        ]
        # Those without a default first, as in any signature.
        shown.sort(key=lambda p: p.default is not p.empty)
        whole = signature.replace(parameters=[*own, *shown])

        @functools.wraps(function)
        def taking(*args, **kwargs):
            try:
                whole.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            return function(*args, **{**defaults, **kwargs})

        taking.__signature__ = whole  # type: ignore[attr-defined]
        return taking  # type: ignore[return-value]

    return decorate


def is_transformation(x: Any) -> bool:
    """Whether this is an optax.GradientTransformation, or walks like one."""
    return hasattr(x, "init") and hasattr(x, "update")


def check_gap(gap: Any) -> None:
    """Raise unless the gap is a step count."""
    if isinstance(gap, jax.Array):  # traced or injected: its value may be unknown
        return
    if not isinstance(gap, numbers.Integral) or isinstance(gap, bool):
        raise TypeError(f"update_proj_gap must be an int >= 1, got {gap!r}")
    if int(gap) < 1:
        raise ValueError(f"update_proj_gap must be an int >= 1, got {gap}")
    if int(gap) >= 2**31:
        raise ValueError(f"update_proj_gap must be below 2^31, as steps are, got {gap}")


def check_scale(name: str, scale: Any) -> None:
    """Raise unless a scale is one number."""
    if not isinstance(scale, numbers.Real | jax.Array | np.ndarray) or np.shape(scale):  # type: ignore[arg-type]
        raise TypeError(f"{name} must be a number, got {scale!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _check_pattern(exclude: Any) -> None:
    try:
        re.compile(exclude if exclude is not None else "")
    except (re.error, TypeError) as error:
        raise ValueError(
            f"exclude must be a regular expression or None, got {exclude!r}: {error}"
        ) from None


def _storage(dtype: Any) -> Storage:
    if dtype is None:
        return None
    name = dtype
    if not isinstance(dtype, str) or dtype not in QUANTISED:
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = None
    choices = ("float32", "bfloat16", *QUANTISED)
    if name not in choices:
        raise ValueError(
            f"projector_dtype must be None or one of {', '.join(choices)}, got {dtype!r}"
        )
    return QUANTISED[name] if name in QUANTISED else np.dtype(jnp.dtype(name))
