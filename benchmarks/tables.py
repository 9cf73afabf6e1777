"""The tables of README.md and docs/, written from the JSON of benchmarks/results/.

    python -m benchmarks.tables            # write them anew
    python -m benchmarks.tables --check    # end with 1 where text and JSON disagree

A Markdown file holds a table between two lines of their own:

    <!-- table: tiers -->
    <!-- end of table -->

Names are those of `benchmarks.rows.TABLES`. Nothing but Python is needed.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Sequence

from benchmarks.rows import TABLES

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "table: ", "end of table"
MARK = re.compile(rf"^ *<!-- *({START}.+?|{END}) *--> *(?:\n|\Z)", re.MULTILINE)


def markdown(name: str, results: pathlib.Path = RESULTS) -> str:
    """A table, from its JSON."""
    if name not in TABLES:
        raise ValueError(f"table {name!r} is unknown: there are {', '.join(TABLES)}")
    files, rows = TABLES[name]
    head, *body = rows(*(json.loads((results / f"{file}.json").read_text()) for file in files))
    lines = [head, ["---"] * len(head), *body]
    text = ("| " + " | ".join(line) + " |" for line in lines)
    return "".join(line.replace("|  ", "| ").replace("| --- ", "|---") + "\n" for line in text)


def rewritten(text: str, results: pathlib.Path = RESULTS) -> tuple[str, list[str]]:
    """A text with its tables written anew, and what is wrong with them, by name.

    Raises:
      ValueError: a name that `TABLES` does not have, a table without an end, an end without one.
    """
    before, *pieces = MARK.split(text)
    written, changed, name = [before], [], None
    for mark, piece in zip(pieces[::2], pieces[1::2], strict=True):
        if (mark == END) == (name is None):
            raise ValueError(f"table {name!r} has no end" if name else "an end of no table")
        name = None if mark == END else mark.removeprefix(START)
        if name is not None:
            new = markdown(name, results)
            changed += [name] * (piece != new)
            piece = new
        written += [f"<!-- {mark} -->\n", piece]
    if name is not None:
        raise ValueError(f"table {name!r} has no end")
    return "".join(written), changed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="default: README.md and docs/")
    args = parser.parse_args(argv)
    files = args.files or [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    wrong = 0
    for path in files:
        try:
            text, changed = rewritten(path.read_text())
        except ValueError as error:
            print(f"{path}: {error}")
            wrong += 1
            continue
        for name in changed:
            done = "is not that of its JSON" if args.check else "written"
            print(f"{path}: table {name!r} {done}")
        if args.check:
            wrong += len(changed)
        elif changed:
            path.write_text(text)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
