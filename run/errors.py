"""How a command runs and ends: prepare, then run; an error becomes one sentence and a status."""

from __future__ import annotations

import sys

from run.config import RunFailed


def run_command(prepare, args) -> int:
    """Run the job that `prepare(args)` returns; the result is the exit status.

    0: done. 1: the run failed. 2: bad usage or input. 130: stopped with Ctrl-C.
    """
    try:
        return prepared_and_run(prepare, args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def prepared_and_run(prepare, args) -> int:
    try:
        job = prepare(args)
    except KeyboardInterrupt:
        print("\nstopped before it began: nothing was saved", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        return complain(error, 2)
    except RuntimeError as error:
        return complain(trouble(error, {}), 1)
    try:
        job()
    except (OSError, RunFailed) as error:
        return complain(error, 1)
    except RuntimeError as error:
        return complain(trouble(error, vars(args)), 1)
    return 0


OUT_OF_MEMORY = "out of memory: {memory}"
PEER_ENDED = "another process of this run has ended: see its message; {again}"
TROUBLE = {  # words in an error of torch: what it means
    "out of memory": OUT_OF_MEMORY,  # on a GPU
    "can't allocate memory": OUT_OF_MEMORY,  # on a CPU
    "Connection closed by peer": PEER_ENDED,
    "Connection reset by peer": PEER_ENDED,
}


def trouble(error: RuntimeError, advice: dict) -> str:
    """One sentence for an error of torch that is no fault of the program; raises any other again.

    `advice` is the command's own: what to do about "memory", and how to begin "again".
    """
    known = {
        "memory": "end what else runs on the device, or take a larger one",
        "again": "start again",
    }
    for words, sentence in TROUBLE.items():
        if words in str(error):
            return sentence.format_map({**known, **advice})
    raise error


def complain(error, status: int) -> int:
    """Print the error as one line; returns `status`."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'writing'}: {error.strerror}"
    # The message may quote a stranger's files: make it one line without control characters.
    message = "".join(c if c.isprintable() else "\ufffd" for c in str(error)[:2000])
    print("error:", message, file=sys.stderr)
    return status
