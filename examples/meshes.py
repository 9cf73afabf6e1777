"""From `--mesh data=2,fsdp=4` to where everything lies: JAX's compiler does the rest.

A batch is cut over all devices. `data` does no more than that; `fsdp` also cuts the weights, and
the optimizer's state is cut over both.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import galore_jax
from examples import training
from examples.config import Config
from examples.errors import UserError

AXES = ("data", "fsdp")


def sizes(text: str, devices: int) -> dict[str, int]:
    """The axes that `--mesh` names and their sizes, of which one may be -1, for the rest."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in found:
            raise UserError(f"--mesh {text}: {name!r} is none of {', '.join(AXES)}, each once.")
        if (not size.isdecimal() and size != "-1") or size == "0":
            raise UserError(f"--mesh {text}: {part!r} gives no size. Write it as {name}=4.")
        found[name] = int(size)
    rest = [name for name in found if found[name] == -1]
    for name in rest[:1]:
        found[name] = max(1, devices // math.prod(s for s in found.values() if s != -1))
    if len(rest) > 1 or math.prod(found.values()) != devices:
        raise UserError(
            f"--mesh {text}: the sizes must multiply to the number of devices, {devices} here;"
            " a run resumes on any."
        )
    return found


def create(config: Config) -> Mesh | None:
    """The mesh of a run: None, for one device, where the flag is empty."""
    text, batch_size, accumulate = config.mesh, config.batch_size, config.accumulate
    if not text:
        if jax.process_count() > 1:
            raise UserError(
                f"--mesh: {jax.process_count()} processes need one. Give it, such as --mesh"
                f" fsdp={jax.device_count()}."
            )
        return None
    found = sizes(text, jax.device_count())
    if batch_size % (accumulate * jax.device_count()):
        cut = f"--batch-size {batch_size}"
        cut += f" in --accumulate {accumulate} microbatches" if accumulate > 1 else ""
        raise UserError(
            f"--mesh {text}: {cut} is not cut evenly over {jax.device_count()} devices. Give a"
            f" multiple of {accumulate * jax.device_count()}."
        )
    types = (AxisType.Auto,) * len(found)
    return jax.make_mesh(tuple(found.values()), tuple(found), axis_types=types)


def parameter_shardings(mesh: Mesh, params: dict) -> dict:
    """Of a matrix `fsdp` cuts the longest axis that it divides; vectors are replicated."""
    parts = dict(mesh.shape).get("fsdp", 1)

    def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
        stacked = 1 if path[0].key == "blocks" else 0  # Layers: one scan takes them in turn.
        spec: list[str | None] = [None] * len(x.shape)
        longest = sorted(range(stacked, len(spec)), key=lambda a: x.shape[a])
        cut = [axis for axis in longest if x.shape[axis] % parts == 0]
        if parts > 1 and len(longest) > 1 and cut:
            spec[cut[-1]] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def state_shardings(mesh: Mesh, tx: optax.GradientTransformation, state: dict) -> dict:
    """Of a `training.State`, given its shapes."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    where = parameter_shardings(mesh, state["params"])
    return dict.fromkeys(state, everywhere) | {
        "params": where,
        "opt_state": galore_jax.state_sharding(tx, state["params"], where),
    }


def new_state(
    init: Callable[[], dict],
    tx: optax.GradientTransformation,
    shardings: training.State | None,
    weights: Callable[[], dict] | None = None,
) -> training.State:
    """The state before the first step; on a mesh no device ever holds more than its part.

    Args:
      init: makes new parameters, on the devices.
      tx: the optimizer.
      shardings: of the state, or None for one device.
      weights: reads parameters that are there already into the host's memory, in place of `init`.
    """
    if shardings is None:
        made = init() if weights is None else jax.tree.map(_on_device, weights())
        return _state_beside(made, tx)
    if weights is not None:
        placed = jax.tree.map(
            lambda x, where: jax.make_array_from_callback(x.shape, where, lambda part: x[part]),
            weights(),
            shardings["params"],
        )
        return _state_beside(placed, tx, shardings | {"params": None})
    return jax.jit(lambda: training.new_state(init(), tx), out_shardings=shardings)()


def _state_beside(params: dict, tx: Any, shardings: Any = None) -> training.State:
    """The state around parameters that are there already: under a `jit` nothing is made of them."""
    rest = jax.jit(lambda p: training.new_state(p, tx) | {"params": None}, out_shardings=shardings)
    return rest(params) | {"params": params}


def _on_device(x: Any) -> jax.Array:
    """An array of the device's own, which may be donated."""
    return x if isinstance(x, jax.Array) else jnp.array(x)


def abstract_state(
    mesh: Mesh | None, params: dict, tx: optax.GradientTransformation
) -> training.State:
    """The shapes of a state, and where it is to lie, from those of the parameters."""
    shapes = jax.eval_shape(lambda p: training.new_state(p, tx), params)
    if mesh is None:
        return shapes
    where = state_shardings(mesh, tx, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Rows over all devices."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def place(mesh: Mesh | None, rows: np.ndarray) -> Any:
    """The batch that this process has its share of the rows of."""
    where = batch_sharding(mesh)
    return rows if where is None else jax.make_array_from_process_local_data(where, rows)


def place_whole(mesh: Mesh | None, batch: np.ndarray) -> Any:
    """The same of a batch that every process has."""
    k, n = jax.process_index(), jax.process_count()
    return place(mesh, batch[k * len(batch) // n : (k + 1) * len(batch) // n])
