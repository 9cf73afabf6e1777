"""Stopping at the end of a step when the system asks for it."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

# What schedulers send before they kill, and Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTICE = b"\nstopping after this step, with a checkpoint; once more stops at once\n"


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether a SIGTERM or a Ctrl-C has come.

    Of each the first is taken down, and the next one does what it always did.
    """
    asked = threading.Event()
    before = {}

    def take_down(number, frame):
        asked.set()
        signal.signal(number, before[number])
        # Not by print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE)

    # Python hands signals to the main thread alone.
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # As under nohup.
                before[number] = signal.signal(number, take_down)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
