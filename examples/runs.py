"""A run's folder: lock, config.json, tokenizer.json, metrics.jsonl, loss.png, checkpoints/."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from examples import checkpoints, processes
from examples import config as config_lib
from examples.errors import UserError
from examples.files import disk_errors, write_atomically

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None

LOCK, SUMMARY, METRICS = "lock", "summary.json", "metrics.jsonl"


class Config(Protocol):
    """What is asked here of the settings of a run, of whatever kind."""

    @property
    def run_dir(self) -> str:
        """Folder of the run."""
        ...

    @property
    def resume(self) -> str | None:
        """The same, of a run to continue."""
        ...


def named(config: Config) -> str:
    """The run's folder as the command line has it, for messages."""
    return f"--resume {config.resume}" if config.resume else f"--run-dir {config.run_dir}"


def _writing(config: Config) -> contextlib.AbstractContextManager:
    return disk_errors(
        f"{named(config)} cannot be written to",
        "Make room there, or make it writable, and give the command again.",
    )


@contextlib.contextmanager
def locked(config: Config) -> Iterator[None]:
    """The run's folder, for this process alone, or for those whose first one it is.

    The system takes the lock back when the process ends, however it ends; the file stays.
    """
    folder = pathlib.Path(config.run_dir)
    new = not folder.exists()
    with _writing(config):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    with file:
        if (reason := _lock(file.fileno(), config)) is not None:
            print(f"{folder} is not locked ({reason}): start no second process on it")
        try:
            yield
        finally:
            if new and [path.name for path in folder.glob("*")] == [LOCK]:
                _remove(folder)


def _lock(file: int, config: Config) -> str | None:
    """Takes the lock; why there is none, where the file system or the machine has no such thing."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{named(config)}: another process is at work on this run. Wait for it or end it, or"
            " use another folder."
        ) from None
    except OSError as error:
        return str(error.strerror)
    return None


def _remove(folder: pathlib.Path) -> None:
    """Removes the folder of a run that never began: there was a mistake in its flags."""
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
        folder.rmdir()


def refuse_another(config: Config) -> None:
    """Refuses a folder that holds a run, if it is not this one, dead before its first checkpoint.

    So such a run begins anew by the command that it began with.
    """
    folder = pathlib.Path(config.run_dir)
    if config.resume is not None or not (folder / "config.json").exists():
        return
    before = config_lib.read(folder, "--run-dir", type(config))
    if checkpoints.exist(folder) or config_lib.changed(before, config):
        raise UserError(
            f"--run-dir: {config.run_dir!r} already holds a run. Continue it with --resume"
            f" {config.run_dir}, or give another folder."
        )


def open_run(config: Config, tokenizer: str) -> None:
    """Puts config and tokenizer into a new run's folder, or checks those of a resumed one."""
    folder = pathlib.Path(config.run_dir)
    if config.resume is not None:
        _check_tokenizer(folder, tokenizer)
        return
    with _writing(config):
        # The config last: with it the folder holds a run.
        write_atomically(folder / "tokenizer.json", tokenizer)
        config_lib.save(config, folder)


def _check_tokenizer(folder: pathlib.Path, tokenizer: str) -> None:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(
            f"--resume: {str(path)!r} is missing. Bring it back from a copy, or start a new run."
        )
    if path.read_text() != tokenizer:
        raise UserError(
            "--resume: the training text has changed since the run began (another Python, or"
            " edited --data files). Restore it, or start a new run."
        )


@processes.first_only
def append_metrics(folder: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds one line of JSON a row, which then is on the disk before any checkpoint after it."""
    with _saving(folder, METRICS), (folder / METRICS).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _saving(folder: pathlib.Path, name: str) -> contextlib.AbstractContextManager:
    return disk_errors(
        f"{str(folder / name)!r} could not be written",
        f"Make room there, then continue with --resume {folder}",
    )


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows so far, without half a line that a killed run may have left at the end."""
    path = folder / METRICS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


@processes.first_only
def truncate_metrics(folder: pathlib.Path, step: int) -> None:
    """Forgets the rows after `step`, and half a line: a resumed run takes those steps again.

    In place, where nothing is lost if the process dies and a full disk has no say.
    """
    path = folder / METRICS
    if not path.exists():
        return
    end = position = 0
    for line in path.read_bytes().splitlines(keepends=True):
        position += len(line)
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                end = position
    with _saving(folder, METRICS):
        os.truncate(path, end)


@processes.first_only
def plot_loss(folder: pathlib.Path, title: str, ylabel: str) -> None:
    """Draws training and validation loss over steps into loss.png."""
    rows = read_metrics(folder)
    # A Figure of its own, not pyplot: no global state, no display.
    import matplotlib.figure  # Most starts draw nothing, and it takes as long as Optax.

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel=ylabel, axisbelow=True)
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
    with _saving(folder, "loss.png"):
        figure.savefig(folder / "loss.png", dpi=120)


@processes.first_only
def save_summary(folder: pathlib.Path, figures: dict[str, Any]) -> None:
    """Writes summary.json."""
    with _saving(folder, SUMMARY):
        write_atomically(folder / SUMMARY, json.dumps(figures, indent=2) + "\n")
