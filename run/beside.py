"""A function that runs in a process of its own, on another core."""

from __future__ import annotations

import multiprocessing
import signal
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

    OSError and RunFailed are raised where one waits, RunFailed also for a process that ends without
    a result. Whoever leaves the context ends the process: Ctrl-C and SIGTERM do not.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    # One thread each, as here: more would only wait for each other.
    work = (sender, torch.get_num_threads(), function, args)
    process = context.Process(target=send_result, args=work, daemon=True)
    with signals_blocked():  # the new process inherits it
        process.start()
    sender.close()  # now the pipe ends with the other process

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
        yield result
    finally:
        process.kill()
        process.join()


def send_result(
    sender: Connection, threads: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send((function(*args), None))
    except (OSError, RunFailed) as error:  # run_command makes a sentence of these
        sender.send((None, error))


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
