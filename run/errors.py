"""How a command ends: a job that is prepared and then run, one sentence where it cannot, and an exit status."""

from __future__ import annotations

import sys

from run.config import RunFailed


def run_command(prepare, args) -> int:
    """Run the job that `prepare(args)` returns. 2 for bad usage or input, 1 for a failed run, 130 for Ctrl-C, 0 else."""
    try:
        return prepared_and_run(prepare, args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def prepared_and_run(prepare, args) -> int:
    try:
        job = prepare(args)
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


TROUBLE = {  # what torch's own errors say on a GPU, on a CPU, and of several processes: what that means
    "out of memory": "out of memory: {memory}",
    "can't allocate memory": "out of memory: {memory}",
    "Connection closed by peer": "another process of this run has ended: see its message; {again}",
    "Connection reset by peer": "another process of this run has ended: see its message; {again}",
}


def trouble(error: RuntimeError, advice: dict) -> str:
    """One sentence for an error of torch's that is no fault of the program; all others go on."""
    known = {
        "memory": "end what else runs on the device, or take a larger one",
        "again": "start again",
    }
    for telling, sentence in TROUBLE.items():
        if telling in str(error):
            return sentence.format_map({**known, **advice})
    raise error


def complain(error, status: int) -> int:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'writing'}: {error.strerror}"
    # Names and values out of a stranger's files may stand in it: one line, which moves no cursor.
    print(
        "error:",
        "".join(c if c.isprintable() else "\ufffd" for c in str(error)[:2000]),
        file=sys.stderr,
    )
    return status
