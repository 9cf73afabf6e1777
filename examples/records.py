"""Rows of a table from files (jsonl, json, csv, tsv, parquet) or a Hugging Face dataset.

Each row comes with where it is, for messages.
"""

import csv
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from examples import data as data_lib
from examples.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Record(NamedTuple):
    """A row: its fields, and where it is."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """A field that has to be text."""
        found = self.fields.get(name)
        if not isinstance(found, str):
            has = "there is no such field" if name not in self.fields else f"it is {found!r}"
            raise UserError(
                f"{self.where}: {name} must be text; {has}. The fields are"
                f" {', '.join(self.fields)}."
            )
        return found


def load(
    data: Sequence[str], eval_data: Sequence[str], validation: str
) -> tuple[list[Record], list[Record]]:
    """Rows to train and to validate on; of these none where nobody says which.

    Args:
      data: files, or one dataset, which has a split to train on.
      eval_data: files to validate on.
      validation: the split to validate on, of a dataset.
    """
    train = read("--data", data, "train")
    if not eval_data and _is_dataset(data):
        eval_data = data
    return train, read("--eval-data", eval_data, validation) if eval_data else []


def _is_dataset(sources: Sequence[str]) -> bool:
    return len(sources) == 1 and data_lib.is_dataset_name(sources[0])


def read(flag: str, sources: Sequence[str], split: str) -> list[Record]:
    """All rows of files, or of a split of one dataset (`owner/name[:config]`).

    Args:
      flag: that named the sources.
      sources: paths, or the name of a dataset.
      split: of a dataset.
    """
    if _is_dataset(sources):
        path, _, config = sources[0].removeprefix(data_lib.PREFIX).partition(":")
        return from_hub(flag, path, config or None, split)
    found: list[Record] = []
    for name in sources:
        path = pathlib.Path(name).expanduser()
        if path.suffix not in KINDS:
            raise UserError(f"{flag}: {name!r} is none of {', '.join(KINDS)}.")
        try:
            found += _READERS[path.suffix](path)
        except OSError as error:
            raise UserError(f"{flag}: {path}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{flag}: {path} is not UTF-8 text ({error}).") from error
    if not found:
        raise UserError(f"{flag}: there are no rows in {', '.join(sources)}.")
    return found


def from_hub(flag: str, path: str, config: str | None, split: str) -> list[Record]:
    """A split of a dataset on the hub, or of one on disk."""
    import datasets  # Only here: it takes a second.

    try:
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # The hub raises some ten kinds, ValueError to ConnectionError.
        raise UserError(
            f"{flag}: cannot open the split {split!r} of the Hugging Face dataset {path!r}"
            f" ({str(error).splitlines()[0]}). Check the name and the network, or give files with"
            " --data and --eval-data."
        ) from error
    return [Record(f"{path} {split} row {i}", dict(row)) for i, row in enumerate(rows)]


def _jsonl(path: pathlib.Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield _checked(where, json.loads(line))
                except ValueError as error:
                    raise UserError(f"{where}: not JSON ({error}).") from error


def _json(path: pathlib.Path) -> Iterator[Record]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}). One row a line is .jsonl.") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a list of objects. One row a line is .jsonl.")
    for number, row in enumerate(rows):
        yield _checked(f"{path}[{number}]", row)


def _checked(where: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object.")
    return Record(where, row)


def _csv(path: pathlib.Path) -> Iterator[Record]:
    # GLUE's own files have quotes that open nothing.
    dialect: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    )
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True, **dialect)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: it has not the columns of the first line.")
                yield Record(where, row)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}.") from error


def _parquet(path: pathlib.Path) -> Iterator[Record]:
    import pyarrow.lib  # datasets brings it, and reads with it.
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.lib.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({error}).") from error
    for number, row in enumerate(rows):
        yield Record(f"{path} row {number}", row)


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
