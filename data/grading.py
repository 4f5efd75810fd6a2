"""Who says that two answers are equal in an evaluation: the built-in comparison, helped by math-verify where installed.

math-verify reads LaTeX into sympy and simplifies, which over a few characters (`9^{9^{9^9}}`) can take for ever, or all the
memory, out of reach of any signal. So it lives in a process of its own (`serve`) with a limit on both, which the model's
process asks one comparison at a time. Rewards never come from here: training has the built-in comparison alone.
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
PATIENCE = 60  # seconds by the clock; it alone counts where the system has no such timer or limit
MEMORY = 2 << 30  # bytes


class Grader:
    """`equal(given, answer)` for data.scores: right is what the built-in comparison or math-verify says is right.

    "auto" is math-verify where it is installed; str() of a grader says which it became. ValueError if "math-verify" is not.
    """

    def __init__(self, name: str = "auto"):
        installed = importlib.util.find_spec("math_verify") is not None
        if name == "math-verify" and not installed:
            raise ValueError("--grader math-verify: it is not installed; run `pip install math-verify` or give --grader builtin")
        self.math_verify = MathVerify() if installed and name != "builtin" else None
        self.note = "" if installed or name == "builtin" else " (math-verify is not installed)"

    def equal(self, given: str, answer: str) -> bool:
        return reward.equal(given, answer) or self.math_verify is not None and bool(self.math_verify.equal(given, answer))

    def __str__(self):
        if self.math_verify is None:
            return f"the built-in comparison{self.note}"
        left = f"; {self.math_verify.given_up} comparisons left to the built-in one alone" if self.math_verify.given_up else ""
        return f"math-verify {self.math_verify.version} or the built-in comparison{left}"

    def close(self):
        if self.math_verify is not None:
            self.math_verify.close()


class MathVerify:
    """math-verify's own opinion, from its process. An OSError if that does not start; `given_up` counts the Nones."""

    def __init__(self):
        self.known: dict[tuple[str, str], bool | None] = {}
        self.given_up = 0
        self._start()

    def equal(self, given: str, answer: str) -> bool | None:
        r"""None if it has no opinion: too long, a box in the box (it would look only at the inner one), beyond the limits."""
        if max(len(given), len(answer)) > reward.LONGEST or r"\boxed" in given or r"\fbox" in given:
            self.given_up += 1
            return None
        pair = (given, answer)
        if pair not in self.known:
            self.known[pair] = self._ask(pair)
        self.given_up += self.known[pair] is None
        return self.known[pair]

    def _ask(self, pair) -> bool | None:
        try:
            self.process.stdin.write(json.dumps(pair) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()  # comes, or the pipe closes: the process ends itself when time is up
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.close()
            self._start()
            return None
        return json.loads(reply)

    def _start(self):
        self.process = subprocess.Popen([sys.executable, "-m", "data.grading"], cwd=Path(__file__).resolve().parent.parent,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.version = self.process.stdout.readline().strip()
        if not self.version:
            self.close()
            raise ChildProcessError("math-verify is installed but does not start: `python -c 'import math_verify'` shows why; "
                                    "mend it; or, in eval, give --grader builtin")

    def close(self):
        self.process.kill()
        self.process.communicate()


def serve():
    """The other end: a JSON pair [given, answer] a line in, true or false a line out. Ends when its input or the time does."""
    from math_verify import LatexExtractionConfig, parse, verify

    limit_memory()
    box = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    @functools.lru_cache(1000)
    def read(answer):  # the box and nothing else: "first_match" stops it from looking for an answer anywhere else
        return parse(rf"\boxed{{{answer}}}", box, extraction_mode="first_match", parsing_timeout=None)

    print(importlib.metadata.version("math-verify"), flush=True)
    for line in sys.stdin:
        given, answer = json.loads(line)
        limit_time(SECONDS, PATIENCE)
        verdict = verify(read(answer), read(given), timeout_seconds=None)
        limit_time(0, 0)
        print(json.dumps(bool(verdict)), flush=True)


def limit_time(seconds, patience):
    """End this process after so long, even inside a call that never returns to Python; 0 calls it off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal is not handled, and so ends the process
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
    serve()
