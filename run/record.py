"""The record of a run: settings, metrics and transcripts, written and read back."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.exemplars import behaviour
from data.files import parse_json, read_json, regular
from data.reward import is_correct
from data.scores import first_is_right, reflects, share_among
from model import LM
from run import checkpoint
from run.config import MAY_CHANGE, RunFailed
from run.screen import clock, progress
from run.sinks import open_sinks
from run.world import World

try:
    import fcntl
except ImportError:  # Windows has no fcntl, so nothing stops two runs in one directory there
    fcntl = None


class Run:
    """A run directory, written step by step: records, checkpoints, and the progress line.

    With `resume` the run continues after the directory's newest checkpoint, if there is one. Raises
    ValueError while another run writes to the directory. With several processes only the first
    writes. `sinks` names where else the metrics go (run/sinks.py).
    """

    def __init__(self, path, config: dict, label: str, resume=False, world=World(), sinks=()):
        self.path, self.config, self.label = Path(path), config, label
        self.resume, self.is_first = resume, world.is_first
        self.sink_names, self.sinks = sinks, []
        self.began, self.began_at = time.perf_counter(), 0  # when, and at which step
        self.files = [self.path / "metrics.jsonl", self.path / "transcripts.jsonl"]
        if self.is_first:
            writable(self.path)
            self.lock = lock(self.path / "lock")
            self.prepare_files()

    def prepare_files(self) -> None:
        stored = self.path / "config.json"
        if self.resume and stored.exists():
            same_settings(stored, self.config)
        else:
            write_json(stored, self.config)  # first: the report looks for directories with metrics
            for file in self.files:
                file.write_bytes(b"")
        self.open_files()

    def open_files(self) -> None:
        self.metrics, self.transcripts = (open(file, "a") for file in self.files)

    def restore(
        self, student: LM, optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[dict[str, Any]]]:
        """(steps done, their metrics), after loading the weights and moments of that step.

        A new run gives (0, []).
        """
        history: list[dict[str, Any]] = []
        if self.resume:
            kept = self.path / "checkpoint"
            self.began_at = checkpoint.restore(kept, student, optimizer, self.config)
            history, _ = (cut(file, self.began_at, self.is_first) for file in self.files)
            check_history(self.files[0], history)
            if self.is_first:
                write_json(self.path / "config.json", self.config)  # with the settings of now
                self.close()
                self.open_files()
        if self.is_first:
            self.sinks = open_sinks(self.sink_names, self.path, self.config, self.began_at)
        return self.began_at, history

    def save(self, step: int, student: LM, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint after `step` steps, once the disk has all lines written so far."""
        if self.is_first:
            for file in self.files:
                checkpoint.flush(file)
        kept, keep = self.path / "checkpoint", self.config["keep"]
        checkpoint.save(kept, step, student, optimizer, self.config, keep, self.is_first)

    def log(self, metrics: dict[str, Any], steps: int, transcripts: list[dict[str, Any]]) -> None:
        """Write a step's metrics and transcripts, and show the progress among all `steps`."""
        if not self.is_first:
            return
        print(json.dumps(metrics), file=self.metrics, flush=True)
        for line in transcripts:
            print(json.dumps(line), file=self.transcripts, flush=True)
        for sink in self.sinks:
            sink.log(metrics["step"], metrics)
        done = metrics["step"] + 1
        left = (time.perf_counter() - self.began) / (done - self.began_at) * (steps - done)
        shown = {
            "reward": metrics["reward"],
            "accuracy": metrics["sampled_accuracy"],
            "reflects": metrics["reflection_rate"],
            "guided": metrics["guided_share_of_rollouts"],
        }
        numbers = "  ".join(f"{name} {value:.2f}" for name, value in shown.items())
        speed = f"{metrics['tokens_per_second']:,.0f} tok/s"
        line = f"{self.label} {done}/{steps}  {numbers}  {speed}  {clock(left)} left"
        is_tenth = done == 1 or done % max(1, steps // 10) == 0
        progress(line, last=done == steps, plain=is_tenth)

    def close(self) -> None:
        if self.is_first:
            for file in (self.metrics, self.transcripts, *self.sinks):
                file.close()


def check_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Raises RunFailed unless every step has the metrics that the loop reads again."""
    for metrics in history:
        for key in ("skipped", "teacher_asked", "teacher_parsed"):
            if type(metrics.get(key)) not in (int, float):
                raise RunFailed(f"{path} is damaged at step {metrics['step']}: give another --out")


def same_settings(path: Path, config: dict):
    """Raises ValueError, naming what differs, unless the file's settings are those in `config`.

    The settings in MAY_CHANGE may differ, but the steps must not become fewer.
    """
    before, now = read_json(path), json.loads(json.dumps(config))
    keys = sorted((before.keys() | now.keys()) - MAY_CHANGE)
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if type(before.get("steps")) is int and now.get("steps", 0) < before["steps"]:
        changed.append("steps")
    if changed:
        changes = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed]
        raise ValueError(f"{path.parent} is a run with other settings: {', '.join(changes)}")


def earlier_settings(path: Path, resume: bool) -> dict:
    """The config.json of the run that is to be resumed; {} if there is none.

    Raises ValueError if the directory holds a run and `resume` is not given, or if its steps would
    be lost because it has no checkpoint.
    """
    stored, lost = path / "config.json", steps_without_checkpoint(path)
    if lost:
        raise ValueError(f"{path} holds {lost} steps and no checkpoint: give another --out")
    if (path / "metrics.jsonl").exists() and not resume:
        raise ValueError(f"{path} holds a run: continue it with --resume, or give another --out")
    if resume and stored.exists():
        return read_json(stored)
    if resume:
        print(f"{path} holds no run: a new one begins, with the flags as given")
    return {}


def steps_without_checkpoint(path: Path) -> int:
    """The number of steps of a run that has none of its checkpoints.

    0 if it has a checkpoint, or if it may have crashed before it was due to write its first one.
    """
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
    """Mark a run directory as taken; returns the open file that does so until this process ends."""
    file = open(path, "a")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path.parent} is in use by another run: give another --out"
            ) from None
    return file


def cut(path: Path, step: int, write: bool) -> list[dict]:
    """Drop the lines of `step` and later from a .jsonl file, and an unfinished last line.

    Returns the lines that stay. The file itself is changed only if `write` is set.
    """
    kept = []
    for line, entry in read_lines(path) if path.exists() else ():
        if entry is None or entry["step"] >= step or not line.endswith("\n"):
            break
        kept.append((line, entry))
    if write:
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(line for line, _ in kept))
        checkpoint.flush(shorter)
        shorter.replace(path)
    return [entry for _, entry in kept]


def writable(path) -> Path:
    """Make the directory `path`. Raises OSError now, not after an hour, if it takes no files.

    Raises ValueError if it holds a pipe, a device, or a link: through a link the program would
    write into another directory.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: give another --out") from None
    for entry in path.iterdir():
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{entry} is a link or a device: take it away, or give another --out")
    with tempfile.TemporaryFile(dir=path):
        return path


def read_lines(path: Path) -> Iterator[tuple[str, dict | None]]:
    """Each line of a run's .jsonl file with its JSON object; None if that has no valid step."""
    with open(regular(path), encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            step = entry.get("step") if isinstance(entry, dict) else None
            is_valid = type(step) is int and 0 <= step < 10**9
            yield line, entry if is_valid else None


def describe(rollouts: list[Any], samples: int, seconds: float) -> dict[str, Any]:
    """A step's metrics from all its rollouts, question-major."""
    n = len(rollouts)
    own_length = sum(len(own_part(r)) for r in rollouts)
    right = sum(r.finished and is_correct(r.attempt, r.answer) for r in rollouts)
    equal = 0  # groups with the same reward for all: these have no gradient
    for start in range(0, n, samples):
        equal += len({r.reward for r in rollouts[start : start + samples]}) == 1
    reflecting = [reflects(r.attempt) for r in rollouts]
    first_right = [first_is_right(r.attempt, r.answer) for r in rollouts]
    first_wrong = [not right for right in first_right]
    return {
        "reflection_rate": sum(reflecting) / n,
        "reflection_rate_first_wrong": share_among(reflecting, first_wrong),
        "reflection_rate_first_right": share_among(reflecting, first_right),
        "finished": sum(r.finished for r in rollouts) / n,
        "mean_length": own_length / n,
        "sampled_accuracy": right / n,
        "tokens_per_second": own_length / seconds,
        "reward": sum(r.reward for r in rollouts) / n,
        "groups_equal": equal / (n / samples),
        **describe_help(rollouts),
    }


def own_part(rollout: Any) -> list[int]:
    """The ids that the student sampled, its stop token included."""
    start = rollout.guided_from
    if start is None:
        return rollout.response
    return [*rollout.response[:start], rollout.response[-1]]


def describe_help(rollouts: list[Any]) -> dict[str, Any]:
    """What the teacher did: replies that parse, opinions that are right, rewards with its words."""
    asked = [r for r in rollouts if r.asked]
    parsed = [r for r in asked if r.feedback is not None]
    guided = [r for r in parsed if r.guided_from is not None]
    opinion_right, behaviours = 0, Counter()
    for r in parsed:
        opinion, reason, phrase = r.feedback
        opinion_right += (opinion == "correct") == is_correct(r.attempt, r.answer)
        if shown := behaviour(f"{reason} {phrase}"):
            behaviours[shown] += 1
    return {
        "teacher_asked": len(asked),
        "teacher_parsed": len(parsed),
        "guided": len(guided),
        "guided_share_of_rollouts": len(guided) / len(rollouts),
        "teacher_opinion_right": opinion_right,
        "guided_reward": sum(r.reward for r in guided),
        "guided_original_reward": sum(is_correct(r.attempt, r.answer) for r in guided),
        "behaviours": behaviours,
    }
