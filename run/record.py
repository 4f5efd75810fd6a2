"""What is recorded of a run and read back: metrics, transcripts, the run directory; the progress line and the stop signal."""

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
from data.scores import reflects
from model import LM
from run import checkpoint
from run.config import MAY_CHANGE, RunFailed
from run.screen import clock, progress
from run.sinks import open_sinks
from run.world import World

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
        self.path, self.config, self.label, self.began = (
            Path(path),
            config,
            label,
            time.perf_counter(),
        )
        self.files = [self.path / "metrics.jsonl", self.path / "transcripts.jsonl"]
        self.resume, self.began_at, self.is_first, self.sink_names, self.sinks = (
            resume,
            0,
            world.is_first,
            sinks,
            [],
        )
        if not self.is_first:
            return
        writable(self.path)
        self.lock = lock(self.path / "lock")
        stored = self.path / "config.json"
        if resume and (steps := steps_without_checkpoint(self.path)):
            raise ValueError(
                f"{self.path} holds {steps} steps but no checkpoint, so --resume would begin "
                "again and delete them: give another --out"
            )
        if resume and stored.exists():
            same_settings(stored, config)
        else:
            for file in self.files:
                file.write_bytes(b"")
            write_json(stored, config)
        self.metrics, self.transcripts = (open(file, "a") for file in self.files)

    def restore(
        self, student: LM, optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[dict[str, Any]]]:
        """(steps done, their metrics), with the weights and moments as they were then; (0, []) for a new run."""
        history: list[dict[str, Any]] = []
        if self.resume:
            self.began_at = checkpoint.restore(
                self.path / "checkpoint", student, optimizer, self.config
            )
            history, _ = (cut(file, self.began_at, self.is_first) for file in self.files)
            needed = ("skipped", "teacher_asked", "teacher_parsed")
            if any(type(m.get(key)) not in (int, float) for m in history for key in needed):
                raise RunFailed(
                    f"{self.files[0]} is not what a run writes: start anew with another --out"
                )
            if self.is_first:
                write_json(
                    self.path / "config.json", self.config
                )  # what may change may have changed
                self.close()
                self.metrics, self.transcripts = (open(file, "a") for file in self.files)
        if self.is_first:
            self.sinks = open_sinks(self.sink_names, self.path, self.config, self.began_at)
        return self.began_at, history

    def save(self, step: int, student: LM, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint after `step` steps, with the lines written so far on the disk before it."""
        for file in self.files if self.is_first else ():
            checkpoint.flush(file)
        checkpoint.save(
            self.path / "checkpoint",
            step,
            student,
            optimizer,
            self.config,
            self.config["keep"],
            self.is_first,
        )

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
        progress(
            f"{self.label} {done}/{steps}  reward {metrics['reward']:.2f}  accuracy {metrics['sampled_accuracy']:.2f}  "
            f"reflects {metrics['reflection_rate']:.2f}  guided {metrics['guided_share_of_rollouts']:.2f}  "
            f"{metrics['tokens_per_second']:,.0f} tok/s  {clock(left)} left",
            last=done == steps,
            plain=done % max(1, steps // 10) == 0 or done == 1,
        )

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
        raise ValueError(
            f"{path.parent} is a run with other settings ({told}): give them as they were to "
            "resume it, or another --out"
        )


def earlier_settings(path: Path, resume: bool) -> dict:
    """The config.json of the run that is to be resumed; {} where there is none.

    Raises ValueError where the directory holds a run and `resume` is not given.
    """
    if (path / "metrics.jsonl").exists() and not resume:
        go_on = "" if steps_without_checkpoint(path) else "continue it with --resume, or "
        raise ValueError(f"{path} already holds a run: {go_on}give another directory with --out")
    stored = path / "config.json"
    return read_json(stored) if resume and stored.exists() else {}


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
            raise ValueError(
                f"{path.parent} is in use by another run: wait for it, "
                "or give another directory with --out"
            ) from None
    return file


def cut(path: Path, step: int, write: bool) -> list[dict]:
    """Take the lines of `step` and later out of a .jsonl file, a half-written last one too; returns those that stay."""
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
    """Make the directory `path`; raises OSError now, not after an hour's work, if files cannot be made in it.

    ValueError if it holds a link, through which what is written would end up elsewhere, or a pipe or device.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"no directory can be made at {path} ({error.strerror}): give another --out"
        ) from None
    if other := next(
        (p for p in path.iterdir() if p.is_symlink() or not (p.is_file() or p.is_dir())), None
    ):
        raise ValueError(
            f"{other} is a link or a device, and a run writes only in its own directory: take it away, or give "
            "another --out"
        )
    with tempfile.TemporaryFile(dir=path):
        return path


def read_lines(path: Path) -> Iterator[tuple[str, dict | None]]:
    """Each line of a run's .jsonl file with its JSON object, which has a step; None for any other line."""
    with open(regular(path), encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            step = entry.get("step") if isinstance(entry, dict) else None
            yield line, entry if type(step) is int and 0 <= step < 10**9 else None


def describe(rollouts: list[Any], samples: int, seconds: float) -> dict[str, Any]:
    """A step's metrics from all its rollouts, question-major: what the student did alone, then with help."""
    own_length = sum(len(own_part(r)) for r in rollouts)
    n = len(rollouts)
    groups = [rollouts[start : start + samples] for start in range(0, n, samples)]
    equal = sum(len({r.reward for r in group}) == 1 for group in groups)
    return {
        "reflection_rate": sum(reflects(r.attempt) for r in rollouts) / n,
        "finished": sum(r.finished for r in rollouts) / n,
        "mean_length": own_length / n,
        "sampled_accuracy": sum(r.finished and is_correct(r.attempt, r.answer) for r in rollouts)
        / n,
        "tokens_per_second": own_length / seconds,
        "reward": sum(r.reward for r in rollouts) / n,
        "groups_equal": equal / len(groups),
        **describe_help(rollouts),
    }


def own_part(rollout: Any) -> list[int]:
    """The ids that the student sampled, its stop token included."""
    start = rollout.guided_from
    return rollout.response if start is None else [*rollout.response[:start], rollout.response[-1]]


def describe_help(rollouts: list[Any]) -> dict[str, Any]:
    """What the teacher did: replies that parse, opinions that are right, what its words earned."""
    asked = [r for r in rollouts if r.asked]
    parsed = [r for r in asked if r.feedback is not None]
    guided = [r for r in parsed if r.guided_from is not None]
    said_correct, opinion_right, behaviours = 0, 0, Counter()
    for r in parsed:
        opinion, reason, phrase = r.feedback
        said_correct += opinion == "correct"
        opinion_right += (opinion == "correct") == is_correct(r.attempt, r.answer)
        if shown := behaviour(f"{reason} {phrase}"):
            behaviours[shown] += 1
    return {
        "teacher_asked": len(asked),
        "teacher_parsed": len(parsed),
        "guided": len(guided),
        "guided_share_of_rollouts": len(guided) / len(rollouts),
        "teacher_said_correct": said_correct,
        "teacher_opinion_right": opinion_right,
        "guided_reward": sum(r.reward for r in guided),
        "guided_original_reward": sum(is_correct(r.attempt, r.answer) for r in guided),
        "behaviours": behaviours,
    }
