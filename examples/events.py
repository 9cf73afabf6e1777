"""A run's metrics as event files, for `tensorboard --logdir runs`.

They say what metrics.jsonl does. A resumed run, which has forgotten the rows behind its checkpoint,
writes them anew from there, so no step is in them twice.
"""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from examples import processes, runs
from examples.errors import UserError
from examples.files import disk_errors

FOLDER = "tensorboard"
Rows = Sequence[dict[str, Any]]


@contextlib.contextmanager
def opened(folder: pathlib.Path, wanted: bool) -> Iterator[Callable[[Rows], None]]:
    """What writes rows of metrics, of one process, behind those that the run has already.

    Args:
      folder: of the run.
      wanted: whether to write any.
    """
    if not wanted or not processes.is_first():
        yield lambda rows: None
        return
    try:
        from tensorboardX.event_file_writer import EventsWriter  # type: ignore
    except ImportError as error:
        raise UserError(
            "--tensorboard: tensorboardX is not installed. pip install tensorboardX, or leave the"
            " flag out."
        ) from error

    def writing() -> contextlib.AbstractContextManager:
        return disk_errors(
            f"{str(folder / FOLDER)!r} could not be written",
            f"Make room there, then continue with --resume {folder}",
        )

    def write(rows: Rows) -> None:
        with writing():
            for row in rows:
                writer.write_event(_event(row))
            writer.flush()

    with writing():
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (folder / FOLDER).mkdir()
        writer = EventsWriter(str(folder / FOLDER / "events"))
    write(runs.read_metrics(folder))
    try:
        yield write
    finally:
        with contextlib.suppress(OSError):  # Each row was flushed.
            writer.close()


def _event(row: dict[str, Any]) -> Any:
    """All figures of a step."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    figures = ((name, x) for name, x in row.items() if name != "step" and not isinstance(x, str))
    values = [Summary.Value(tag=name, simple_value=float(x)) for name, x in figures]
    return Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
