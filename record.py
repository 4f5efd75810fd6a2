"""What is recorded of a run and read back: metrics, transcripts, the run directory; the progress line and the stop signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import checkpoint
from config import MAY_CHANGE, RunFailed
from data.reward import is_correct
from data.scores import reflects
from distributed import World
from files import parse_json, read_json, regular
from grpo import shaped_ratio
from model import LM
from sinks import open_sinks
from teacher import behaviour

try:
    import fcntl
except ImportError:  # Windows has none: there, nothing keeps two runs apart
    fcntl = None


class Run:
    """A run directory, written as the run goes, its checkpoints and its progress line.

    With `resume` it goes on where the directory's newest checkpoint ends, if there is one. Raises ValueError while
    another run writes to the same directory. Of several processes only the first writes. `sinks`: where else (sinks.py).
    """

    def __init__(self, path, config: dict, label: str, resume=False, world=World(), sinks=()):
        self.path, self.config, self.label, self.began = Path(path), config, label, time.perf_counter()
        self.files = [self.path / "metrics.jsonl", self.path / "transcripts.jsonl"]
        self.resume, self.began_at, self.is_first, self.sink_names, self.sinks = resume, 0, world.is_first, sinks, []
        if not self.is_first:
            return
        writable(self.path)
        self.lock = lock(self.path / "lock")
        stored = self.path / "config.json"
        if resume and (steps := steps_without_checkpoint(self.path)):
            raise ValueError(f"{self.path} holds {steps} steps but no checkpoint, so --resume would begin "
                             "again and delete them: give another --out")
        if resume and stored.exists():
            same_settings(stored, config)
        else:
            for file in self.files:
                file.write_bytes(b"")
            write_json(stored, config)
        self.metrics, self.transcripts = (open(file, "a") for file in self.files)

    def restore(self, student: LM, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
        """(steps done, their metrics), with the weights and moments as they were then; (0, []) for a new run."""
        history: list[dict[str, Any]] = []
        if self.resume:
            self.began_at = checkpoint.restore(self.path / "checkpoint", student, optimizer, self.config)
            history, _ = (cut(file, self.began_at, self.is_first) for file in self.files)
            needed = ("skipped", "teacher_asked", "teacher_parsed")
            if any(type(m.get(key)) not in (int, float) for m in history for key in needed):
                raise RunFailed(f"{self.files[0]} is not what a run writes: start anew with another --out")
            if self.is_first:
                write_json(self.path / "config.json", self.config)  # what may change may have changed
                self.close()
                self.metrics, self.transcripts = (open(file, "a") for file in self.files)
        if self.is_first:
            self.sinks = open_sinks(self.sink_names, self.path, self.config, self.began_at)
        return self.began_at, history

    def save(self, step: int, student: LM, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint after `step` steps, with the lines written so far on the disk before it."""
        for file in self.files if self.is_first else ():
            checkpoint.flush(file)
        checkpoint.save(self.path / "checkpoint", step, student, optimizer, self.config, self.config["keep"], self.is_first)

    def log(self, metrics: dict[str, Any], steps: int, transcripts: list[dict[str, Any]]) -> None:
        if not self.is_first:
            return
        print(json.dumps(metrics), file=self.metrics, flush=True)
        for line in transcripts:
            print(json.dumps(line), file=self.transcripts, flush=True)
        for sink in self.sinks:
            sink.log(metrics["step"], metrics)
        done = metrics["step"] + 1
        left = (time.perf_counter() - self.began) / (done - self.began_at) * (steps - done)
        progress(f"{self.label} {done}/{steps}  reward {metrics['reward']:.2f}  accuracy {metrics['sampled_accuracy']:.2f}  "
                 f"reflects {metrics['reflection_rate']:.2f}  guided {metrics['guided_share_of_rollouts']:.2f}  "
                 f"{metrics['tokens_per_second']:,.0f} tok/s  {clock(left)} left",
                 last=done == steps, plain=done % max(1, steps // 10) == 0 or done == 1)

    def close(self):
        if self.is_first:
            for file in (self.metrics, self.transcripts, *self.sinks):
                file.close()


def same_settings(path: Path, config: dict):
    """Raises ValueError, naming what differs, unless the run to be resumed has the settings in the file.

    MAY_CHANGE may differ, but no run is made shorter than it was.
    """
    before, now = read_json(path), json.loads(json.dumps(config))
    keys = sorted((before.keys() | now.keys()) - MAY_CHANGE)
    changed = [k for k in keys if before.get(k) != now.get(k)]
    if type(before.get("steps")) is int and now.get("steps", 0) < before["steps"]:
        changed.append("steps")
    if changed:
        told = ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed)
        raise ValueError(f"{path.parent} is a run with other settings ({told}): give them as they were to "
                         "resume it, or another --out")


def steps_without_checkpoint(path: Path) -> int:
    """How many steps a run has recorded of which it kept no checkpoint, more than a crash can leave behind."""
    metrics, stored = path / "metrics.jsonl", path / "config.json"
    if not metrics.exists() or any((path / "checkpoint").glob("step-*")):
        return 0
    steps = regular(metrics).read_text(errors="replace").count("\n")
    every = read_json(stored).get("save_every") if stored.exists() else 0
    return steps if type(every) is not int or steps > every else 0


def write_json(path: Path, content) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def lock(path: Path):
    """The open file that marks a run directory as taken until this process ends, however it ends."""
    file = open(path, "a")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path.parent} is in use by another run: wait for it, "
                             "or give another directory with --out") from None
    return file


def cut(path: Path, step: int, write: bool) -> list[dict]:
    """Take the lines of `step` and later out of a .jsonl file, a half-written last one too; returns those that stay."""
    kept = []
    for line in regular(path).read_text(errors="replace").splitlines(keepends=True) if path.exists() else ():
        entry = parse(line)
        if not is_entry(entry) or entry["step"] >= step or not line.endswith("\n"):
            break
        kept.append((line, entry))
    if write:
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(line for line, _ in kept))
        checkpoint.flush(shorter)
        shorter.replace(path)
    return [entry for _, entry in kept]


def writable(path) -> Path:
    """Make the directory `path`; raises OSError now, not after an hour's work, if files cannot be made in it.

    ValueError if it holds a link, through which what is written would end up elsewhere, or a pipe or device.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"no directory can be made at {path} ({error.strerror}): give another --out") from None
    if other := next((p for p in path.iterdir() if p.is_symlink() or not (p.is_file() or p.is_dir())), None):
        raise ValueError(f"{other} is a link or a device, and a run writes only in its own directory: take it away, or give "
                         "another --out")
    with tempfile.TemporaryFile(dir=path):
        return path


class Recorded(NamedTuple):
    """A run directory read back."""
    path: Path
    config: dict
    metrics: list[dict]
    transcripts: list[dict]


def read_runs(paths) -> tuple[list[Recorded], list[dict]]:
    """The runs in `paths`, each a run directory or one that holds some (a demonstration's), and the summaries found there.

    ValueError names the file, and the line, that is not what a run writes.
    """
    runs, summaries = {}, {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory; give that of a run or of a demonstration")
        found = [path] if (path / "metrics.jsonl").exists() else sorted(p.parent for p in path.glob("*/metrics.jsonl"))
        if not found:
            raise ValueError(f"{path} holds no metrics.jsonl, nor does a directory in it; give the directory of a run")
        for p in found:
            lines = read_lines(p / "transcripts.jsonl") if (p / "transcripts.jsonl").exists() else []
            runs[p.resolve()] = Recorded(p, read_object(p / "config.json"), read_lines(p / "metrics.jsonl"), lines)
        if (path / "summary.json").exists():
            summaries[path.resolve()] = read_object(path / "summary.json")
    return list(runs.values()), list(summaries.values())


def read_object(path: Path) -> dict:
    value = parse(regular(path).read_text(encoding="utf-8", errors="replace"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; restore it or run again")
    return value


def read_lines(path: Path) -> list[dict]:
    entries = []
    for number, line in enumerate(regular(path).read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if line.strip():
            entry = parse(line)
            if not is_entry(entry):
                raise ValueError(f'{path}, line {number}: not a JSON object with a "step"; restore or delete that line')
            entries.append(entry)
    return entries


def is_entry(value) -> bool:
    return isinstance(value, dict) and type(value.get("step")) is int and 0 <= value["step"] < 10**9


def parse(text: str):
    try:
        return parse_json(text)
    except ValueError:
        return None


def in_colour() -> bool:
    """On a terminal, unless NO_COLOR asks for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def coloured(text: str) -> str:
    """Yellow, which is for reflection, where colours are shown."""
    return f"\x1b[33m{text}\x1b[0m" if text and in_colour() else text


def clock(seconds: float) -> str:
    return "{}:{:02}".format(*divmod(round(seconds), 60))


def progress(line: str, last=False, plain=True):
    """One line that rewrites itself on a terminal; elsewhere the lines marked `plain`, each on its own."""
    if sys.stdout.isatty():
        line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be rewritten
        print(f"\r{line}\x1b[K", end="\n" if last else "", flush=True)
    elif plain or last:
        print(line, flush=True)


@contextmanager
def interruptible():
    """SIGINT and SIGTERM only set `.is_set`, so a step is finished before the run ends; a second one ends it at once."""
    class Flag:
        is_set = False

    flag = Flag()
    previous = {}

    def on_signal(number, frame):
        flag.is_set = True
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)
        for n, handler in previous.items():
            signal.signal(n, handler)

    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)


def describe_sampled(rollouts) -> dict[str, float]:
    """What the student does on its own, before any help."""
    n = len(rollouts)
    return {"reflection_rate": sum(reflects(r.text) for r in rollouts) / n,
            "finished": sum(r.finished for r in rollouts) / n,
            "mean_length": sum(len(r.response) for r in rollouts) / n,
            "sampled_accuracy": sum(r.finished and is_correct(r.text, r.answer) for r in rollouts) / n}


def describe_help(asked, rollouts) -> dict:
    """What the teacher did: replies that parse, opinions that are right, what its words earned against the attempts alone."""
    parsed = [(i, f, is_correct(attempt, rollouts[i].answer)) for i, f, attempt in asked if f is not None]
    guided = [(rollouts[i], was_right) for i, _, was_right in parsed if rollouts[i].guided_from is not None]
    return {"teacher_asked": len(asked), "teacher_parsed": len(parsed), "guided": len(guided),
            "guided_share_of_rollouts": len(guided) / len(rollouts),
            "teacher_said_correct": sum(f.opinion == "correct" for _, f, _ in parsed),
            "teacher_opinion_right": sum((f.opinion == "correct") == was_right for _, f, was_right in parsed),
            "guided_reward": sum(r.reward for r, _ in guided), "guided_original_reward": sum(right for _, right in guided),
            "behaviours": Counter(filter(None, (behaviour(f"{f.reason} {f.phrase}") for _, f, _ in parsed)))}


def transcripts(rollouts, asked, tokenizer, step, config, most=3) -> list[dict]:
    """A few of the step's rollouts as text: guided ones first, the student's part and the teacher's apart."""
    picked = [i for i, f, _ in asked if f is not None][: most - 1]
    picked += [i for i in range(len(rollouts)) if i not in picked][: most - len(picked)]
    replies = {i: f for i, f, _ in asked}
    lines = []
    for i in picked:
        r, f = rollouts[i], replies.get(i)
        own = tokenizer.decode(r.response if r.guided_from is None else r.response[: r.guided_from])
        guidance = "" if r.guided_from is None else tokenizer.decode(r.response[r.guided_from :])
        lines.append({"step": step, "question": r.question, "answer": r.answer, "student": own,
                      "attempt_right": is_correct(own, r.answer), "guidance": guidance, "opinion": f and f.opinion,
                      "reason": f and f.reason, "phrase": f and f.phrase, "reward": r.reward, "advantage": r.advantage,
                      "guidance_tokens": guidance_tokens(r, tokenizer, config)})
    return lines


def guidance_tokens(rollout, tokenizer, config) -> list[list]:
    """[text, w, π_old] of each of the teacher's tokens; w is None where AAS does not weigh it: guard (c), other shapings.

    The texts add up to the guidance: a character spelt by several tokens stands with the last of them.
    """
    if rollout.guided_from is None:
        return []
    start, lines, waiting = rollout.guided_from, [], []
    logprobs, advantage = torch.tensor([rollout.old_logprobs[start:]]), torch.tensor([[rollout.advantage]])
    w = shaped_ratio(logprobs, advantage, config.guards, gamma_min=config.gamma_min, gamma_max=config.gamma_max,
                     published="gamma" in config.published_items)
    for token, weight, pi in zip(rollout.response[start:], w[0].tolist(), logprobs[0].exp().tolist()):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd")  # or else half a character: wait for the rest
        weighed = config.shaping == "aas" and not (rollout.advantage < 0 and pi < config.unlikely)
        lines.append([text if whole else "", round(weight, 4) if weighed else None, round(pi, 4)])
        waiting = [] if whole else waiting
    if waiting:
        lines[-1][0] = tokenizer.decode(waiting)  # bytes that never became a character
    return lines
