"""Fuzzing: readers of files and of model output get spoilt inputs, chosen by the code that they
reach (atheris, libFuzzer).

Each reader runs in a process of its own, from the valid inputs in hostile.py, for a fixed number of
runs with a fixed seed. A finding is anything that the reader lets through or says wrongly (see
hostile.py), SECONDS of computing, memory beyond MEGABYTES, a file written outside the input's
directory, a process, a connection, or anything unpickled.

    python -m pytest -q -m slow tools/test_fuzz.py    all of them, as CI does
    python -m tools.test_fuzz model -max_total_time=600 -seed=7    one, for ten minutes
    python -m tools.test_fuzz model crash-HASH                     an input that was found, again
"""

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import (
    hostile,  # and nothing else of the program: what is imported before `main` is not instrumented
)

HERE = Path(__file__).resolve().parents[1]
MEGABYTES = 2000  # of one process; torch takes some 400
SECONDS = 10  # of computing for one input: wall time would count what else the machine does
LONGEST = 30_000  # bytes of an input


# What the harness itself must find, or a silent target would say nothing.


def lets_an_error_through(data, directory):
    if data.startswith(b"=== a"):
        [][0]


def writes_elsewhere(data, directory):
    (directory.parent.parent / "fuzz-wrote-this").write_text("x")


def never_ends(data, directory):
    while True:
        pass


def takes_memory(data, directory):
    time.sleep(min(1, len(bytearray(3 << 30))))  # libFuzzer looks at the memory once a second


def unpickles(data, directory):
    import pickle

    pickle.loads(b"cos\ngetpid\n(tR.")


PLANTED = {
    lets_an_error_through: "IndexError",
    writes_elsewhere: "Escape: open",
    never_ends: "TooLong",
    takes_memory: "out-of-memory",
    unpickles: "Escape: pickle.find_class",
}
TARGETS = hostile.READERS | {f.__name__: (f, lambda: [b"=== a\n1"], 100) for f in PLANTED}


def fuzz(name, *flags, **options):
    """A finished process that fuzzed one target."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
        command = [
            sys.executable,
            "-m",
            "tools.test_fuzz",
            "--in",
            os.path.realpath(home),
            name,
            "-seed=1",
            *flags,
        ]
        return subprocess.run(command, cwd=HERE, **options)


CAPTURED = dict(capture_output=True, text=True, errors="replace", timeout=1800)
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None or not hasattr(os, "fork"),
    reason="atheris cannot be imported here: pip install -r requirements-dev.txt (Linux, CPython)",
)


@pytest.mark.slow
@needs_atheris
@pytest.mark.parametrize("name", hostile.READERS)
def test_no_input_breaks_a_reader(name, tmp_path):
    runs = hostile.READERS[name][2]
    done = fuzz(name, f"-runs={runs}", f"-artifact_prefix={tmp_path}/", **CAPTURED)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"Done {runs} runs" in done.stderr
    assert int(re.findall(r"cov: (\d+)", done.stderr)[-1]) >= 12, (
        "the code under test is not instrumented"
    )


@pytest.mark.slow
@needs_atheris
@pytest.mark.parametrize("planted", PLANTED, ids=lambda f: f.__name__)
def test_the_harness_finds_what_is_planted(planted, tmp_path):
    done = fuzz(planted.__name__, "-runs=100", f"-artifact_prefix={tmp_path}/", **CAPTURED)
    assert done.returncode != 0 and PLANTED[planted] in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )[-3000:]


@pytest.mark.parametrize("name", hostile.READERS)
def test_no_spoilt_value_breaks_a_reader(name, tmp_path_factory):
    """The same without atheris: some values of the JSON texts in a valid input become others."""
    reader, seeds, _ = hostile.READERS[name]
    seeds, directory = seeds(), tmp_path_factory.mktemp("input") / "x"

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(seeds), st.lists(st.integers(0, 2**32), max_size=4))
    def check(data, changes):
        for change in changes:
            data = hostile.spoil(data, random.Random(change))
        reader(data, directory)

    check()


@pytest.mark.parametrize("name", hostile.READERS)
def test_the_valid_inputs_are_valid(name, tmp_path, monkeypatch, capsys):
    """Or everything made from them would end at the same first complaint."""
    from teacher import parse_feedback

    reader, seeds, _ = hostile.READERS[name]
    monkeypatch.setattr(
        hostile, "refusing", lambda read, *args: read(*args)
    )  # what is refused fails
    for seed in seeds():
        reader(seed, tmp_path / "x")
    assert "damaged" not in capsys.readouterr().err
    assert name != "feedback" or parse_feedback(seeds()[0].decode())


# The process that fuzzes.


class Escape(BaseException):
    """No Exception: no reader may catch it."""


class TooLong(BaseException):
    pass


def too_long(*_):
    raise TooLong


def watch(home: str):
    """Raise Escape on whatever a reader of data has no business doing; it cannot be taken back."""

    def outside(path, dir_fd=-1):
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False  # a file that is open already
        at = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd > -1 else ""
        return not os.path.realpath(os.path.join(at, os.fsdecode(path))).startswith(home)

    def on_event(event, args):
        if event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "subprocess.Popen",
            "socket.connect",
            "pickle.find_class",
        ):
            raise Escape(event)
        writes = (
            event == "open"
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR)
            and outside(args[0])
        )
        removes = event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod") and outside(
            args[0], args[-1]
        )
        links = event in ("os.rename", "os.link", "os.symlink", "os.truncate") and any(
            map(outside, args[:2])
        )
        if writes or removes or links:
            raise Escape(f"{event} {args[0]}")

    sys.addaudithook(on_event)


def main(home, name, *flags):
    import atheris

    with atheris.instrument_imports(include=["data", "run", "show", "teacher"]):
        import teacher  # noqa: F401
        from data import chat, reward, tokenizer  # noqa: F401
        from run import record  # noqa: F401
        from show import report  # noqa: F401
    reader, seeds, _ = TARGETS[name]
    home = Path(home)
    (home / "corpus").mkdir()
    for i, seed in enumerate(seeds()):
        (home / "corpus" / str(i)).write_bytes(seed)
        if name in hostile.READERS:
            reader(seed, home / "seed")  # what is imported late is imported here, unwatched

    def mutate(data, most, seed):
        rng = random.Random(seed)
        data = hostile.spoil(data, rng) if rng.random() < 0.7 else bytes(atheris.Mutate(data, most))
        return data[:most]

    def run(data):
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS if name in hostile.READERS else 1)
        reader(data, home / "input")
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    inputs = [] if any(not flag.startswith("-") for flag in flags) else [str(home / "corpus")]
    atheris.Setup(
        [
            __file__,
            f"-max_len={LONGEST}",
            "-timeout=600",
            f"-rss_limit_mb={MEGABYTES}",
            *flags,
            *inputs,
        ],
        run,
        custom_mutator=mutate,
    )
    signal.signal(signal.SIGVTALRM, too_long)
    watch(str(home))
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--in":
        main(*sys.argv[2:])
    else:
        sys.exit(fuzz(*sys.argv[1:]).returncode)
