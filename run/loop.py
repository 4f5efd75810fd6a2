"""What stands around the training loop: where it begins, when it ends, what it writes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from data import Problem
from model import LM
from run.config import Config, RunFailed
from run.record import Run, describe
from run.screen import interruptible
from run.world import World

T = TypeVar("T")

FAULTS = 10  # steps in a row without a finite gradient end a run

Metrics = dict[str, Any]  # numbers by name; `behaviours` counts by name


class Loop:
    """The steps of one run, each with its questions.

        with Loop(student, optimizer, problems, config, ...) as loop:
            for step, questions in loop:
                ...                                        # the method
                loop.record(step, rollouts, metrics)
        loop.history                                       # the metrics of every step

    It goes on where `run` has a checkpoint and ends after the step in which SIGINT or SIGTERM
    arrives. `validate()` gives scores on held-out problems, `transcribe(step, rollouts)` lines for
    transcripts.jsonl. `teacher` is only asked why its replies could not be parsed. Raises
    RunFailed after FAULTS steps in a row without a finite gradient.

    Of several processes (`world`) each has its own questions and rollouts. They meet in `record`.
    """

    def __init__(
        self,
        student: LM,
        optimizer: torch.optim.Optimizer,
        problems: Sequence[Problem],
        config: Config,
        *,
        run: Run | None,
        world: World,
        teacher: Any = None,
        validate: Callable[[], Metrics] | None = None,
        transcribe: Callable[[int, list[Any]], list[Metrics]],
    ) -> None:
        self.student, self.optimizer, self.problems, self.config = (
            student,
            optimizer,
            problems,
            config,
        )
        self.run, self.world, self.teacher = run, world, teacher
        self.validate, self.transcribe = validate, transcribe
        self.steps = config.steps or max(1, len(problems) // config.questions)
        self.schedule_steps = config.schedule_steps or self.steps
        self.first, self.history = run.restore(student, optimizer) if run else (0, [])
        self.began, self.stopped = time.perf_counter(), False

    def __enter__(self) -> Loop:
        self.signals = interruptible()
        self.interrupted = self.signals.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.signals.__exit__(*error)

    def __iter__(self) -> Iterator[tuple[int, list[Problem]]]:
        for step in range(self.first, self.steps):
            self.began = time.perf_counter()
            yield step, self.questions(step)
            if self.stopped:
                return

    @property
    def policy(self) -> LM:
        """The student as a model that samples: itself, or of several processes this one's copy."""
        return self.world.whole(self.student)

    def questions(self, step: int) -> list[Problem]:
        """This process's questions: its share of each mini-batch, so that every update has all."""
        batch = questions_of_step(self.problems, self.config.questions, self.config.seed, step)
        return [question for part in self.shares(batch) for question in part]

    def shares(self, batch: Sequence[T]) -> list[list[T]]:
        """This process's share of each mini-batch."""
        size = self.config.mini_batch
        starts = range(0, len(batch), size)
        return [self.world.share(batch[start : start + size]) for start in starts]

    def mini_batches(self, rollouts: list[Any]) -> Iterator[list[Any]]:
        """This process's rollouts of each mini-batch, `epochs` times over."""
        parts, end = [], 0
        for questions in self.shares(range(self.config.questions)):
            start, end = end, end + len(questions) * self.config.samples
            parts.append(rollouts[start:end])
        for _ in range(self.config.epochs):
            yield from parts

    def generator(self, step: int) -> torch.Generator:
        """Random numbers for sampling. They depend on the step alone, so a resumed run has them."""
        rank = self.world.rank
        seed = f"sampling {self.config.seed} {step}" + (f" {rank}" if rank else "")
        return torch.Generator().manual_seed(random.Random(seed).getrandbits(63))

    def record(self, step: int, rollouts: list[Any], metrics: Metrics) -> None:
        """End a step: its metrics, on some steps scores and a checkpoint too."""
        rollouts = self.world.gather(rollouts)
        seconds = time.perf_counter() - self.began
        metrics = {"step": step, **describe(rollouts, self.config.samples, seconds), **metrics}
        self.history.append(metrics)
        if self.is_due(step, self.config.eval_every):
            if self.teacher is not None and self.world.is_first:
                warn_if_unparsed(self.teacher, self.history)
            if self.validate is not None and not self.signalled():
                metrics.update(self.validate())
        if self.run:
            self.run.log(metrics, self.steps, self.transcribe(step, rollouts))
        self.stopped = self.signalled()  # last, because a signal may come at any of this
        saves = self.config.save_every > 0
        if self.run and saves and (self.stopped or self.is_due(step, self.config.save_every)):
            self.run.save(step + 1, self.student, self.optimizer)
        self.check_gradients()

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is done after this one."""
        return step + 1 == self.steps or (every > 0 and (step + 1) % every == 0)

    def signalled(self) -> bool:
        """If any process is signalled, all stop; otherwise the rest would wait for ever."""
        return any(self.world.gather([self.interrupted.is_set]))

    def check_gradients(self) -> None:
        recent = self.history[-FAULTS:]
        if len(recent) < FAULTS or any(metrics["skipped"] != 1 for metrics in recent):
            return
        loss, norm = recent[-1]["loss"], recent[-1]["grad_norm"]
        raise RunFailed(
            f"{FAULTS} steps in a row had a gradient that is not finite (loss {loss:.3g}, "
            f"gradient norm {norm:.3g}), and nothing was learned in them: start anew with a lower "
            "learning rate (of train: --learning-rate, another --out)"
        )


def questions_of_step(
    problems: Sequence[Problem], size: int, seed: int, step: int
) -> list[Problem]:
    """A step's questions: every problem once before any comes again, each epoch shuffled anew."""
    n, batch, orders = len(problems), [], {}
    for place in range(step * size, (step + 1) * size):
        epoch, position = divmod(place, n)
        if epoch not in orders:
            orders[epoch] = random.Random(f"data {seed} {epoch}").sample(problems, n)
        batch.append(orders[epoch][position])
    return batch


def warn_if_unparsed(teacher: Any, history: Sequence[Metrics]) -> None:
    """Warn when almost none of the teacher's replies can be parsed, because it teaches nothing."""
    asked = sum(metrics["teacher_asked"] for metrics in history)
    parsed = sum(metrics["teacher_parsed"] for metrics in history)
    if asked and parsed < asked / 10:
        print(
            f"{parsed} of the teacher's {asked} replies followed the format; {teacher.cut} ran "
            f"into --teacher-reply, {teacher.dropped} requests were longer than --teacher-prompt"
        )
