"""A function in a process of its own: its result, its errors, its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def divide(by):
    return 1 / by


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
        with pytest.raises(RunFailed, match="^nothing was learned"):
            first()
        with pytest.raises(RunFailed, match="ended with status 3"):
            second()
    with beside(divide, 0) as third, pytest.raises(ZeroDivisionError) as error:
        third()
    assert "in divide" in error.value.__notes__[0]  # the traceback that it had there


def test_whoever_leaves_ends_it(tmp_path):
    file = tmp_path / "pid"
    with beside(sleep, file):
        while not (file.exists() and file.read_text()):
            time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_it_ends_with_a_parent_that_is_killed(tmp_path):
    file = tmp_path / "pid"
    script = f"""if __name__ == "__main__":
    import os, pathlib, time
    from run.beside import beside
    from run.test_beside import sleep
    file = pathlib.Path({str(file)!r})
    with beside(sleep, file):
        while not file.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
"""
    (tmp_path / "parent.py").write_text(script)
    root = Path(__file__).parent.parent
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    )
    parent.communicate(timeout=60)  # the pipe ends when both have ended
    assert parent.returncode == -signal.SIGKILL and file.exists()
