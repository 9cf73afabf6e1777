"""A run's checkpoints: saved while the training goes on, and checked before they are used.

orbax writes a checkpoint into a temporary folder and renames that when it is whole. What happens to
it on the disk from then on it does not see: a truncated file is a traceback, flipped bytes are
other weights. So a finished checkpoint gets a file of checksums, `checksums/STEP.json` beside
`checkpoints/STEP/`, and a run goes on from the newest one that still agrees with its own.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from examples import processes
from examples.errors import UserError
from examples.files import disk_errors, refusal, write_atomically

CHECKPOINTS, CHECKSUMS, DAMAGED = "checkpoints", "checksums", "damaged"


def finished(folder: pathlib.Path) -> set[int]:
    """The steps that a run has a whole checkpoint of: under its final name, only a number."""
    return {int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()}


def sealed(folder: pathlib.Path) -> set[int]:
    """The steps that there are checksums of."""
    return {int(path.stem) for path in (folder / CHECKSUMS).glob("*.json") if path.stem.isdecimal()}


def exist(folder: pathlib.Path) -> bool:
    """Whether a run has ever finished a checkpoint."""
    return bool(finished(folder) | sealed(folder))


def digests(checkpoint: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by its path there."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                name = path.relative_to(checkpoint).as_posix()
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def seal(folder: pathlib.Path, step: int) -> None:
    """Writes the checksums of a finished checkpoint; forgets those of checkpoints that are gone."""
    now = digests(folder / CHECKPOINTS / str(step))
    write_atomically(folder / CHECKSUMS / f"{step}.json", json.dumps(now, indent=2) + "\n")
    for gone in sealed(folder) - finished(folder):
        (folder / CHECKSUMS / f"{gone}.json").unlink()


def damage(folder: pathlib.Path, step: int) -> str | None:
    """What is wrong with a checkpoint, None where it is as it was written.

    The newest one may have no checksums: the process died before it came to them. orbax renames
    a checkpoint only when it is whole, so it is taken; `Checkpoints.restore` then seals it.
    """
    if step not in finished(folder):
        return "it is gone"
    if step not in sealed(folder):
        later = max(sealed(folder), default=-1) > step
        return "it has no checksums" if later else None
    try:
        wanted = dict(json.loads((folder / CHECKSUMS / f"{step}.json").read_text()))
        found = digests(folder / CHECKPOINTS / str(step))
    except (ValueError, TypeError):
        return "its checksums are not whole"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    for name, digest in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written"
    return None


def position(folder: pathlib.Path, step: int) -> dict:
    """The position in the data that grain has written for a step.

    Each of the processes then wrote the same, so it serves any number of them now.
    """
    (path,) = (folder / CHECKPOINTS / str(step) / "data").glob("process_0-of-*.json")
    return json.loads(path.read_text())


def newest_sound(folder: pathlib.Path) -> tuple[int | None, dict[int, str]]:
    """The step of the newest sound checkpoint if there is one, and what is wrong with later ones.

    It changes nothing in the folder, where a training may be at work.
    """
    faults = {}
    for step in sorted(finished(folder) | sealed(folder), reverse=True):
        fault = damage(folder, step)
        if fault is None:
            return step, faults
        faults[step] = fault
    return None, faults


def none_sound(folder: pathlib.Path, given_as: str, faults: dict[int, str]) -> UserError:
    """The error that no checkpoint is sound, of a folder that was given somehow."""
    what = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
    return UserError(
        f"{given_as}: no checkpoint in {str(folder)!r} is sound ({what}). Bring one back from a"
        " copy, or start a new run."
    )


def choose(folder: pathlib.Path) -> int | None:
    """The step of the newest sound checkpoint, None of a run that has none yet.

    Damaged ones after it are put aside: orbax would go by them, and their steps are taken again.
    """
    step, faults = newest_sound(folder)
    if step is not None:
        _put_aside(folder, faults, step)
    elif faults:
        raise none_sound(folder, "--resume", faults)
    return step


def read_params(folder: pathlib.Path, shapes: dict) -> dict:
    """The parameters of a run's newest sound checkpoint, without the optimizer's state.

    Neither is anything in the folder changed nor a lock taken: a training may be at work there.

    Args:
      folder: the run's, given on the command line.
      shapes: of the parameters, from `jax.eval_shape`.
    """
    step, faults = newest_sound(folder)
    if step is None:
        if faults:
            raise none_sound(folder, "FOLDER", faults)
        raise UserError(f"FOLDER: {str(folder)!r} has no checkpoint yet. Wait for its first one.")
    where, wanted = folder / CHECKPOINTS / str(step) / "state", {"params": _placed(shapes)}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore(
                where.resolve(),
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # There are many kinds.
        raise UserError(
            f"FOLDER: {str(where)!r} does not load as the model of its run"
            f" ({str(error).splitlines()[0]}). If the run is at work, give the command again."
        ) from error
    return found["params"]


def _placed(shapes: Any) -> Any:
    """Shapes with the first device where they have no sharding.

    Without one orbax would ask for the devices that wrote the checkpoint.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), shapes
    )


def _put_aside(folder: pathlib.Path, faults: dict[int, str], sound: int) -> None:
    for step, fault in faults.items():
        print(
            f"the checkpoint of step {step} is damaged ({fault}): going on from that of step"
            f" {sound}; what there is of the other is now in {folder / DAMAGED}"
        )
        with disk_errors(f"--resume {folder}", "Make it writable, and give the command again."):
            _move(folder / CHECKPOINTS / str(step), folder / DAMAGED / str(step))
            _move(folder / CHECKSUMS / f"{step}.json", folder / DAMAGED / f"{step}.json")


class Checkpoints:
    """Saves, seals and restores the checkpoints of one run; made by `opened`."""

    def __init__(self, folder: pathlib.Path, keep: int, data: grain.DatasetIterator):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            # What a kill in the middle of a save has left; whoever has the run's lock is alone.
            cleanup_tmp_directories=True,
            # Damage to an older checkpoint is no reason to stop.
            lightweight_initialize=True,
        )
        self.folder, self.data = folder, data
        self._manager = ocp.CheckpointManager((folder / CHECKPOINTS).resolve(), options=options)
        # Reading a large checkpoint takes seconds, in which the training goes on.
        self._sealer = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._saved: int | None = None  # The step of a checkpoint that has no checksums yet.
        self._sealing: concurrent.futures.Future | None = None

    def save(self, step: int, state: dict) -> None:
        """Starts saving model, optimizer, step and the position in the data.

        The training may go on at once: orbax has copied the state to the host when this returns.
        On the CPU it holds views instead, and JAX donates no buffer that somebody still looks at.
        """
        self.wait()
        with self._disk_errors(f"the checkpoint of step {step}"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(self.data),
                ),
            )
        self._saved = step

    def seal_finished(self) -> None:
        """Has a checkpoint sealed that is finished by now; to be called now and then."""
        if not self._manager.is_saving_in_progress():
            self._seal()

    def wait(self) -> None:
        """Waits until all checkpoints are finished and sealed."""
        self._seal()
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            with self._disk_errors("the checksums of a checkpoint"):
                sealing.result()

    def _seal(self) -> None:
        """Begins to seal the last checkpoint, once it is finished."""
        step, self._saved = self._saved, None
        if step is not None:
            with self._disk_errors(f"the checkpoint of step {step}"):
                self._manager.wait_until_finished()
            if processes.is_first():
                self._sealing = self._sealer.submit(seal, self.folder, step)

    def restore(self, step: int, abstract_state: dict) -> dict:
        """The state of a step's checkpoint; sets the data to its position there.

        Args:
          step: as by `choose`.
          abstract_state: the state's shapes and dtypes, from `jax.eval_shape`: only with them
            does orbax give back the optimizer's own types. With shardings, on a mesh; whatever
            devices wrote the checkpoint.
        """
        checked = step in sealed(self.folder)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(_placed(abstract_state))),
            )
            self.data.set_state(position(self.folder, step))
        except Exception as error:
            if checked:
                raise
            # Whole when the process died, but the machine may have died with it.
            where = self.folder / CHECKPOINTS / str(step)
            raise UserError(
                f"--resume: {str(where)!r} does not load, and has no checksums: the run died as"
                " it was saved. Remove it, and give the command again."
            ) from error
        if not checked:
            self._saved = step
        return restored["state"]

    def close(self) -> None:
        """Finishes what has begun."""
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            self._manager.close()

    def _disk_errors(self, what: str) -> contextlib.AbstractContextManager:
        return disk_errors(
            f"{what} could not be written",
            f"Make room there, then continue with --resume {self.folder}",
        )


@contextlib.contextmanager
def opened(folder: pathlib.Path, keep: int, data: grain.DatasetIterator) -> Iterator[Checkpoints]:
    """The checkpoints of a run, which are finished and sealed when the block is left.

    Args:
      folder: the run's folder.
      keep: how many to keep.
      data: the iterator over the run's data, whose position is saved too.
    """
    _tell_once()
    with disk_errors(f"no checkpoints in {str(folder)!r}", "Make room there."):
        checkpoints = Checkpoints(folder, keep, data)
    try:
        yield checkpoints
    except BaseException:
        # Of a full disk there is more than one error, and the first is the one to tell.
        with contextlib.suppress(UserError):
            checkpoints.close()
        raise
    checkpoints.close()


@functools.cache
def _tell_once() -> None:
    """Keeps tracebacks of a disk that refuses out of sight: orbax raises the error too.

    It logs several; writes that had begun find no event loop to report to; and tasks that nobody
    asked for their error tell it when they are collected. So it stays like this to the end.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return not (record.exc_info and refusal(record.exc_info[1]))

    def unraisable(args: Any) -> None:
        if "Event loop is closed" not in str(args.exc_value):
            before(args)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)
    before, sys.unraisablehook = sys.unraisablehook, unraisable


def _move(path: pathlib.Path, to: pathlib.Path) -> None:
    """Moves a file or folder that may not be there, over what may be there."""
    if path.exists():
        to.parent.mkdir(exist_ok=True)
        if to.is_dir():
            shutil.rmtree(to)
        path.replace(to)
