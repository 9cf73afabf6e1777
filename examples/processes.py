"""One run in several processes: `jax.distributed`, and what they have to agree on.

All compute; the first one alone prints, and writes what orbax does not.
"""

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from examples.config import Config
from examples.errors import UserError


def join(config: Config) -> None:
    """Meets the other processes of a run, where the flags tell of any."""
    if config.coordinator is None:
        return
    try:
        if config.coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--coordinator {config.coordinator}: the processes did not meet"
            f" ({str(error).splitlines()[0]}). Give --coordinator HOST:PORT of the first one,"
            " --processes and --process-id."
        ) from error


def is_first() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


def first_only(function: Callable[..., None]) -> Callable[..., None]:
    """A function that does nothing in other processes than the first."""

    @functools.wraps(function)
    def in_first(*args: Any, **kwargs: Any) -> None:
        if is_first():
            function(*args, **kwargs)

    return in_first


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, in all of them; its mistake is everybody's.

    Args:
      make: gives something that JSON can hold.
    """
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said["value"] = make()
        except UserError as error:
            said["error"] = str(error)
    text = json.dumps(said).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.zeros(length, np.uint8)
    if is_first():
        sent[:] = np.frombuffer(text, np.uint8)
    said = json.loads(bytes(multihost_utils.broadcast_one_to_all(sent)))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def any_of(asked: Callable[[], bool]) -> Callable[[], bool]:
    """Whether any process had been asked when all called this last: the same in all.

    A call old, so that no step waits for the answer.
    """
    if jax.process_count() == 1:
        return asked
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    cut, everywhere = (NamedSharding(mesh, PartitionSpec(*names)) for names in (["all"], []))
    ask = jax.jit(jnp.any, out_shardings=everywhere)
    answers = []

    def before() -> bool:
        mine = np.full(jax.local_device_count(), asked())
        answers.append(ask(jax.make_array_from_process_local_data(cut, mine)))
        return len(answers) > 1 and bool(answers.pop(0))

    return before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what others than the first process print to themselves."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def leave(code: int) -> int:
    """Ends this process for a mistake, so that the others do not wait for it."""
    if not jax.distributed.is_initialized():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
