"""What a run shows on the terminal: one progress line, colours, and the handling of Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager


def in_colour() -> bool:
    """On a terminal, unless NO_COLOR asks for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def coloured(text: str) -> str:
    """The text in yellow, which marks reflection, if colours are shown."""
    return f"\x1b[33m{text}\x1b[0m" if text and in_colour() else text


def clock(seconds: float) -> str:
    """Minutes and seconds, as 1:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


def progress(line: str, last=False, plain=True):
    """Show how far something is: on a terminal one line that is rewritten each time.

    Elsewhere only the lines marked `plain`, and the last one, are printed. A process that another
    has started (run/beside.py) leaves the terminal's line to it, but for its own last one.
    """
    if sys.stdout.isatty():
        if multiprocessing.parent_process() and not last:
            return
        width = shutil.get_terminal_size().columns
        line = line[: width - 1]  # a line that wraps could not be rewritten
        print(f"\r{line}\x1b[K", end="\n" if last else "", flush=True)
    elif plain or last:
        print(line, flush=True)


def note(line: str):
    """Print a line of its own; on a terminal it takes the place of the progress line."""
    start, end = ("\r", "\x1b[K\n") if sys.stdout.isatty() else ("", "\n")
    print(f"{start}{line}", end=end, flush=True)


@contextmanager
def ticking(line: str, shown=True, after=10.0):
    """On a terminal, show `line` and the time each second of what lasts longer than `after`.

    Yields an event that ends this when it is set.
    """
    ended, began = threading.Event(), time.monotonic()

    def tick():
        if ended.wait(after):
            return
        print()  # the line that stands there stays on the screen
        while True:
            progress(f"{line} has taken {clock(time.monotonic() - began)}")
            if ended.wait(1):
                return

    thread = threading.Thread(target=tick, daemon=True)
    if shown and sys.stdout.isatty() and not multiprocessing.parent_process():
        thread.start()
    try:
        yield ended
    finally:
        ended.set()


@contextmanager
def interruptible():
    """A first SIGINT or SIGTERM only sets `.is_set`, so that the run can finish its step.

    A second one ends the program at once.
    """

    class Flag:
        is_set = False

    flag = Flag()
    previous = {}

    def on_signal(number, frame):
        flag.is_set = True
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)
        for n, handler in previous.items():
            signal.signal(n, handler)

    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
