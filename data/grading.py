"""How an evaluation compares answers: the built-in comparison, and math-verify where installed.

math-verify reads LaTeX into sympy and simplifies. For a few characters (`9^{9^{9^9}}`) this can
take for ever or all the memory, and no signal stops it. So it runs in a process of its own
(`serve`) with limits on both, and gets one comparison at a time. Training uses the built-in
comparison alone.
"""

import faulthandler
import functools
import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

from data import reward

SECONDS = 5  # of processor time for one comparison; an ordinary one takes a few hundredths of one
PATIENCE = 60  # seconds by the clock: the only limit where the system cannot set the others
MEMORY = 2 << 30  # bytes


class Grader:
    """`equal(given, answer)` for data.scores: the built-in comparison or math-verify says so.

    The name "auto" uses math-verify if it is installed; "math-verify" raises ValueError if it is
    not. str() of a grader says what it uses.
    """

    def __init__(self, name: str = "auto"):
        installed = importlib.util.find_spec("math_verify") is not None
        if name == "math-verify" and not installed:
            raise ValueError("run `pip install math-verify`, or give --grader builtin")
        self.math_verify = MathVerify() if installed and name != "builtin" else None
        self.note = "" if installed or name == "builtin" else " (math-verify is not installed)"

    def equal(self, given: str, answer: str) -> bool:
        if reward.equal(given, answer):
            return True
        return self.math_verify is not None and bool(self.math_verify.equal(given, answer))

    def __str__(self):
        if self.math_verify is None:
            return f"the built-in comparison{self.note}"
        used = f"math-verify {self.math_verify.version} or the built-in comparison"
        if given_up := self.math_verify.given_up:
            used += f"; {given_up} comparisons left to the built-in one alone"
        return used

    def close(self) -> None:
        if self.math_verify is not None:
            self.math_verify.close()


class MathVerify:
    """math-verify, in a process of its own. Raises OSError if that does not start.

    `given_up` counts the comparisons without a result.
    """

    def __init__(self):
        self.known: dict[tuple[str, str], bool | None] = {}
        self.given_up = 0
        self._start()

    def equal(self, given: str, answer: str) -> bool | None:
        r"""What math-verify says; None if the answers are too long or it runs into the limits.

        None also for a box inside an answer, because math-verify would compare only that box.
        """
        pair, verdict = (given, answer), None
        has_box = r"\boxed" in given or r"\fbox" in given
        if max(len(given), len(answer)) <= reward.LONGEST and not has_box:
            if pair not in self.known:
                self.known[pair] = self._ask(pair)
            verdict = self.known[pair]
        self.given_up += verdict is None
        return verdict

    def _ask(self, pair) -> bool | None:
        try:
            self.process.stdin.write(json.dumps(pair) + "\n")
            self.process.stdin.flush()
            # This cannot wait for ever: when its time is up the process ends, and the pipe closes.
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.close()
            self._start()
            return None
        return json.loads(reply)

    def _start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.grading", str(SECONDS)],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = self.process.stdout.readline().strip()
        if not self.version:
            self.close()
            raise ChildProcessError(
                "math-verify does not start: see `python -c 'import math_verify'`, "
                "or give eval --grader builtin"
            )

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(seconds: int):
    """The other process: for each line, a JSON pair [given, answer], it writes true or false.

    It ends with its input, or when a comparison exceeds the limits.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    limit_memory()
    box = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    @functools.lru_cache(1000)
    def parsed(answer):
        # "first_match" reads the box alone: it looks for no answer anywhere else.
        options = {"extraction_mode": "first_match", "parsing_timeout": None}
        return parse(rf"\boxed{{{answer}}}", box, **options)

    print(importlib.metadata.version("math-verify"), flush=True)
    for line in sys.stdin:
        given, answer = json.loads(line)
        limit_time(seconds, PATIENCE)
        verdict = verify(parsed(answer), parsed(given), timeout_seconds=None)
        limit_time(0, 0)
        print(json.dumps(bool(verdict)), flush=True)


def limit_time(seconds, patience):
    """End this process after so many seconds, even in a call that never returns to Python.

    0 and 0 cancel the limits.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal, not handled, ends the process
    if patience:
        faulthandler.dump_traceback_later(patience, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def limit_memory():
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    serve(int(sys.argv[1]))
