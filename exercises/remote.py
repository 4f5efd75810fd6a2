"""A submission in a process of its own: what the grader knows of it, and what runs there.

The grader sends inputs and gets results. It compares them where the submission cannot reach, so
nothing that a submission changes in its own process makes a wrong result right. All that passes
between the two is JSON, because reading a stranger's pickle would run the stranger's code.
"""

import json
import os
import socket
import sys
import time
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EXERCISES = sorted((f.stem for f in HERE.glob("[0-9]*_*.py")), key=lambda s: int(s.split("_")[0]))
MOST_BYTES = 1 << 24  # of one answer; the largest right one has about 1 MB
MOST_NUMBERS = 1 << 20  # of one tensor in it
MOST_MEMORY = 4 << 30  # bytes of data that a submission may use
DTYPES = ("bool", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def starter():
    """How processes are started: from one that has imported torch, where the system can do that."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


# The grader's side.


class Submission:
    """A file of a stranger, loaded in a process of its own, which ends with the `with` block."""

    def __init__(self, file, seconds):
        self.line, theirs = socket.socketpair()
        try:
            self.process = started(theirs, file)
        except OSError:  # an earlier submission may have ended the process that starts others
            time.sleep(0.5)
            self.process = started(theirs, file)
        theirs.close()
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.arrived = b""  # what has come, but belongs to the next answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.line.close()
        try:
            os.killpg(self.process.pid, 9)  # with what it has started
        except (AttributeError, ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.join()

    def call(self, name, arguments):
        """What the submission's function gives, as plain data. Raises calling.Wrong."""
        from calling import Wrong

        request = json.dumps([name, encode(arguments)]).encode() + b"\n"
        try:
            self.line.settimeout(self.left())
            self.line.sendall(request)
            answer = self.answer()
        except TimeoutError:
            raise Wrong(f"takes longer than {self.seconds:g} seconds") from None
        except OSError:
            raise Wrong(self.ended()) from None
        try:
            kind, content = json.loads(answer)
            if kind == "result":
                return decode(content)
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError):
            raise Wrong("gives an answer that cannot be read") from None
        raise Wrong(printable(content))

    def left(self):
        """Seconds until the deadline."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def answer(self):
        """The next line that comes, however slowly it comes."""
        while b"\n" not in self.arrived:
            self.line.settimeout(self.left())
            part = self.line.recv(1 << 16)
            self.arrived += part
            if not part or len(self.arrived) > MOST_BYTES:
                raise ConnectionError
        line, _, self.arrived = self.arrived.partition(b"\n")
        return line

    def ended(self):
        if len(self.arrived) > MOST_BYTES:
            return f"gives more than {MOST_BYTES >> 20} MB"
        self.process.join(min(5, max(0.1, self.deadline - time.monotonic())))
        status = self.process.exitcode
        if status is not None and status < 0:
            return f"ends its process by signal {-status}"
        return f"ends its process with status {status}" if status is not None else "answers nothing"


def started(line, file):
    process = starter().Process(target=serve, args=(line, str(file)), daemon=True)
    process.start()
    return process


def printable(text):
    """One line of a stranger's text, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text)[:500])


# Plain data as JSON, on both sides.


def encode(x):
    import torch

    if isinstance(x, torch.Tensor) and x.numel() <= MOST_NUMBERS:
        name = str(x.dtype).removeprefix("torch.")
        return {"tensor": name, "shape": list(x.shape), "numbers": x.detach().flatten().tolist()}
    if isinstance(x, (list, tuple)):
        return {"list" if isinstance(x, list) else "tuple": [encode(part) for part in x]}
    if x is None or type(x) in (bool, int, float, str):
        return x
    return {"other": repr(x)[:100]}


class Other:
    """What is no plain data; it is like nothing else."""

    def __init__(self, text):
        self.text = printable(text)

    def __repr__(self):
        return self.text


def decode(x):
    import torch

    if not isinstance(x, dict):
        return x
    if "tensor" in x:
        if x["tensor"] not in DTYPES:
            return Other(f"a tensor of {x['tensor']}")
        numbers = torch.tensor(x["numbers"], dtype=getattr(torch, x["tensor"]))
        return numbers.view(x["shape"])
    ((kind, parts),) = x.items()
    if kind == "other":
        return Other(parts)
    return tuple(map(decode, parts)) if kind == "tuple" else list(map(decode, parts))


# The submission's side.


def serve(line, file):
    """Load the file and answer requests until the grader hangs up."""
    import calling
    import torch

    torch.set_num_threads(1)
    be_modest(line.fileno())
    reader, writer = line.makefile("rb"), line.makefile("wb")
    fence_in(Path(file).resolve())
    module = None
    for request in reader:
        name, arguments = json.loads(request)
        try:
            module = module or calling.load(file)
            answer = ["result", encode(calling.call(module, name, decode(arguments)))]
        except calling.Wrong as wrong:
            answer = ["wrong", str(wrong)[:500]]
        writer.write(json.dumps(answer).encode() + b"\n")
        writer.flush()


def be_modest(line):
    """Have no file open but the line, a process group of its own, and bounds, where there are."""
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    os.closerange(3, line)
    os.closerange(line + 1, 1 << 16)
    if hasattr(os, "setsid"):
        os.setsid()
        import resource

        for kind, most in (("DATA", MOST_MEMORY), ("FSIZE", 1 << 20), ("CORE", 0)):
            limit = getattr(resource, f"RLIMIT_{kind}")
            hard = resource.getrlimit(limit)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (most, most))


class NoProgram:
    """An importer that finds none of the program's modules, and says so."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PROGRAM:
            raise ImportError(f"{name} belongs to the program, which a submission may not import")


PROGRAM = {p.stem for p in (*ROOT.glob("*.py"), *HERE.glob("*.py"))}
PROGRAM |= {p.parent.name for p in ROOT.glob("*/__init__.py")}
FORBIDDEN = {  # what Python reports when processes are started or signalled
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "subprocess.Popen",
}


def fence_in(file):
    """Keep the program's sources, other submissions and new processes away from this one.

    This stops the careless. It is no sandbox: see README.md.
    """

    def in_program(path):
        return path.is_relative_to(ROOT) and "site-packages" not in path.parts

    def refuse(event, arguments):
        if event in FORBIDDEN:
            raise PermissionError("a submission may not start or signal processes")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = Path(os.fsdecode(arguments[0])).resolve()
            theirs = in_program(path) and path.suffix in (".py", ".pyc") or path.stem in EXERCISES
            if theirs and path != file:
                raise PermissionError(f"a submission may not read {path.name}")

    sys.path[:] = [place for place in sys.path if not in_program(Path(place).resolve())]
    sys.meta_path.insert(0, NoProgram())
    sys.addaudithook(refuse)
