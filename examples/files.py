"""Files that are whole or not there, and disks that refuse, in one line."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from examples.errors import UserError

# What a disk says that takes no more. Libraries under orbax hand on its words alone.
_REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EIO),
)


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Puts a file there in one piece: nobody reads half of it, whenever this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name for each process: two that start together write the same cache.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a file of JSON that is not ours; what is wrong with it is a `UserError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object.")
    return found


@contextlib.contextmanager
def disk_errors(what: str, advice: str) -> Iterator[None]:
    """Turns what the disk refuses into an error of one line; other errors stay as they are.

    Args:
      what: what could not be written, with its flag if there is one.
      advice: what to do.
    """
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else refusal(error)
        if isinstance(error, UserError) or reason is None:
            raise
        raise UserError(f"{what}: {reason}. {advice}") from error


def refusal(error: BaseException | None) -> str | None:
    """What a disk said, somewhere behind an error; None for an error of another kind."""
    while error is not None:
        for words in map(os.strerror, _REFUSALS):
            if words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None
