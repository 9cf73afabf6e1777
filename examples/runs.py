"""A run's folder: config.json, metrics.jsonl, loss.png, checkpoints/."""

import contextlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import grain
import jax
import matplotlib.figure
import orbax.checkpoint as ocp

from examples.errors import UserError


def append_metrics(folder: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds one line of JSON a row."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows so far, without half a line that a killed run may have left at the end."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def truncate_metrics(folder: pathlib.Path, step: int) -> None:
    """Forgets the rows after `step`: a resumed run takes those steps again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def plot_loss(folder: pathlib.Path, title: str) -> None:
    """Draws training and validation loss over steps into loss.png."""
    rows = read_metrics(folder)
    # A Figure of its own, not pyplot: no global state, no display.
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        title=title, xlabel="step", ylabel="loss (nats per token)", axisbelow=True
    )
    for key, label, style in (
        ("loss", "training", {"linewidth": 1, "alpha": 0.8}),
        ("val_loss", "validation", {"marker": "o", "markersize": 4}),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)


def checkpoint_manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    """Asynchronous saving; a checkpoint appears under its final name only when complete."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, state: dict, data: grain.DatasetIterator
) -> None:
    """Starts saving model, optimizer, step and the position in the data.

    The training may go on at once: orbax has copied the state to the host when this returns. On
    the CPU it holds views instead, and JAX donates no buffer that somebody still looks at.
    """
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data)
        ),
    )


def restore(
    manager: ocp.CheckpointManager,
    folder: pathlib.Path,
    abstract_state: dict,
    data: grain.DatasetIterator,
) -> dict:
    """The state of the last complete checkpoint; sets `data` to its position there.

    Args:
      manager: of `folder`.
      folder: the run's folder, for the error message.
      abstract_state: the state's shapes and dtypes, from `jax.eval_shape`: only with them does
        orbax give back the optimizer's own types.
      data: a new iterator over the run's data.
    """
    step = manager.latest_step()
    if step is None:
        raise UserError(
            f"--resume: {str(folder)!r} holds no complete checkpoint. Start the run again,"
            " without --resume."
        )
    # Without a sharding orbax would ask for the device that wrote the checkpoint.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract_state
    )
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state),
            data=grain.checkpoint.CheckpointRestore(data),
        ),
    )
    return restored["state"]
