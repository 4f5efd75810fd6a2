"""A function in a process of its own: its result, its errors, its end."""

import os
import signal
import time

import pytest
import torch

from run.beside import beside
from run.config import RunFailed


def state():
    return os.getpid(), torch.get_num_threads(), signal.pthread_sigmask(signal.SIG_BLOCK, ())


def fail(words):
    raise RunFailed(words)


def die():
    os._exit(3)


def sleep(file):
    file.write_text(str(os.getpid()))
    time.sleep(600)


def test_the_result_comes_from_another_process_that_signals_do_not_end():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with beside(state) as result:
        pid, threads, blocked = result()
    assert pid != os.getpid() and threads == torch.get_num_threads()
    assert {signal.SIGINT, signal.SIGTERM} <= blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_its_errors_are_raised_where_one_waits():
    with beside(fail, "nothing was learned") as first, beside(die) as second:
        with pytest.raises(RunFailed, match="^nothing was learned$"):
            first()
        with pytest.raises(RunFailed, match="ended with status 3"):
            second()


def test_whoever_leaves_ends_it(tmp_path):
    file = tmp_path / "pid"
    with beside(sleep, file):
        while not (file.exists() and file.read_text()):
            time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
