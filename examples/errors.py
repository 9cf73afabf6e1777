"""The one exception for mistakes of the person at the keyboard."""

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """A wrong argument or input. Its message names the flag and says what to do."""


def exit_code(run: Callable[[], Any]) -> int:
    """Runs a command: 0 for success, 2 for a mistake of the user, which is told in one line."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
