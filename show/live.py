"""The report of a run while it lasts, for a browser that stays open beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from show.report import write_report


@contextmanager
def live_report(directory: Path, shown=True) -> Iterator[Callable[[], None]]:
    """Yields a function that writes report.html in `directory` anew; browsers reload that page.

    At the end, also of a run that is stopped or fails, the page is written once more and reloads
    no more. Only a process that is killed leaves a page that reloads. `shown`: say where it is.
    """
    is_written = False

    def write() -> None:
        nonlocal is_written
        is_written = True
        write_report(directory, live=True)

    if shown:
        words = (
            "shows the run from its first evaluation on: open it in a browser, it reloads itself"
        )
        print(f"{directory / 'report.html'} {words}")
    try:
        yield write
    finally:
        if is_written:
            write_report(directory)
