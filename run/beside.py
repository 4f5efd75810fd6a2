"""A function that runs in a process of its own, on another core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from run.config import RunFailed


@contextmanager
def beside(function: Callable[..., Any], *args: Any) -> Iterator[Callable[[], Any]]:
    """Start `function(*args)` in a new process; yields a function that waits for its result.

    Tensors in `args` are shared, not copied: neither side may write to them. An exception is raised
    where one waits, and RunFailed if the process ends without a result. Leaving the context ends
    the process. Ctrl-C and SIGTERM do not: this process decides what becomes of the other.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    # As many threads as here: by itself torch would take all cores.
    work = (sender, torch.get_num_threads(), function, args)
    process = context.Process(target=send_result, args=work, daemon=True)

    def result() -> Any:
        try:
            value, error = receiver.recv()
        except EOFError:
            process.join()
            raise RunFailed(
                f"another process of this run ended with status {process.exitcode}: see its "
                "message, if it left one; start again"
            ) from None
        if error is not None:
            raise error
        return value

    try:
        with signals_blocked():  # the new process inherits it
            process.start()
        sender.close()  # now the pipe ends with the other process
        yield result
    finally:
        if process.pid:  # it has been started
            process.kill()
            process.join()


def send_result(
    sender: Connection, threads: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """What the new process runs."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        sender.send((function(*args), None))
    except Exception as error:
        error.add_note(traceback.format_exc())  # what is sent loses its own
        sender.send((None, error))


def end_with_parent() -> None:
    """A process that is killed ends no other; the new one would go on by itself."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


@contextmanager
def signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows: Ctrl-C reaches both processes
        yield
        return
    resource_tracker.ensure_running()  # else process.start() does it, which unblocks them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
