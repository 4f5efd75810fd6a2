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
from run.screen import interruptible, note, ticking
from run.world import World

T = TypeVar("T")

FAULTS = 10  # steps in a row without a finite gradient end a run

Metrics = dict[str, Any]  # numbers by name; `behaviours` counts by name


class Loop:
    """The steps of one run, each with its questions.

        loop = Loop(problems, config, ...)
        for step, questions in loop.steps(student, optimizer, ...):
            ...                                        # the method
            loop.record(step, rollouts, metrics)
        loop.history                                   # the metrics of every step

    It goes on where `run` has a checkpoint, evaluates on `validation` now and then, and ends after
    the step in which SIGINT or SIGTERM arrives. `has_flags` says that the settings came from
    train's flags, so that a hint may name them. `page()` is called after each evaluation, once the
    run has recorded it: it writes the report anew.

    Of several processes (`world`) each has its own questions and rollouts. They meet in `record`.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: Config,
        *,
        run: Run | None = None,
        validation: Sequence[Problem] = (),
        world: World = World(),
        has_flags: bool = False,
        page: Callable[[], None] = lambda: None,
    ) -> None:
        self.problems, self.config = problems, config.with_steps(len(problems))
        self.run, self.validation, self.world = run, validation, world
        self.has_flags, self.page = has_flags, page
        self.history: list[Metrics] = []
        self.began, self.stopped = time.perf_counter(), False

    def steps(
        self,
        student: LM,
        optimizer: torch.optim.Optimizer,
        teacher: Any = None,
        validate: Callable[[Loop], Metrics] | None = None,
        transcribe: Callable[..., list[Metrics]] | None = None,
    ) -> Iterator[tuple[int, list[Problem]]]:
        """The number and the questions of every step that is left to do.

        `validate(loop)` gives scores on `validation`, `transcribe(rollouts, step=...)` lines for
        transcripts.jsonl. `teacher` is only asked why its replies could not be parsed.
        """
        self.student, self.optimizer, self.teacher = student, optimizer, teacher
        self.validate, self.transcribe = validate, transcribe
        first, last = 0, self.config.steps
        if self.run:
            first, self.history = self.run.restore(student, optimizer)
        with interruptible() as self.interrupted:
            for step in range(first, last):
                self.began = time.perf_counter()
                shown = self.world.is_first
                with ticking(f"step {step + 1} of {last}", shown) as self.tick_ended:
                    yield step, self.questions(step)
                if self.stopped:
                    return

    @property
    def policy(self) -> LM:
        """The student as a model that samples: itself, or of several processes this one's copy."""
        return self.world.whole(self.student)

    def questions(self, step: int) -> list[Problem]:
        """This process's questions: its share of each mini-batch.

        So an update is on the same questions with any number of processes.
        """
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
        """Random numbers for sampling. They depend on seed, step and process, not on the past."""
        rank = self.world.rank
        seed = f"sampling {self.config.seed} {step}" + (f" {rank}" if rank else "")
        return torch.Generator().manual_seed(random.Random(seed).getrandbits(63))

    def record(self, step: int, rollouts: list[Any], metrics: Metrics) -> None:
        """End a step: its metrics, on some steps scores and a checkpoint too."""
        rollouts = self.world.gather(rollouts)
        seconds = time.perf_counter() - self.began
        metrics = {"step": step, **describe(rollouts, self.config.samples, seconds), **metrics}
        self.history.append(metrics)
        is_due = self.is_due(step, self.config.eval_every)
        if self.world.is_first:
            self.hint(is_due)
        if is_due and self.validate and self.validation and not self.signalled():
            metrics.update(self.validate(self))
        self.tick_ended.set()  # the step's numbers take that line now
        if self.run:
            transcripts = self.transcribe(rollouts, step=step) if self.transcribe else []
            self.run.log(metrics, self.config.steps, transcripts)
            if is_due and self.world.is_first:
                self.page()
        self.stopped = self.signalled()  # last, because a signal may come at any of this
        saves = self.config.save_every > 0
        if self.run and saves and (self.stopped or self.is_due(step, self.config.save_every)):
            self.run.save(step + 1, self.student, self.optimizer)
        self.check_gradients()

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps, and after the last, is due after this one."""
        return step + 1 == self.config.steps or (every > 0 and (step + 1) % every == 0)

    def hint(self, is_due: bool) -> None:
        """Print what the numbers so far suggest to change, if anything."""
        if self.has_flags and first_step_cut_off(self.history):
            note(
                f"no rollout of step {len(self.history)} ended within {self.config.max_tokens} "
                "tokens, and only a finished one is rewarded: raise --max-tokens"
            )
        if is_due and self.teacher is not None:
            warn_if_unparsed(self.teacher, self.history, self.has_flags)

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


def first_step_cut_off(history: Sequence[Metrics]) -> bool:
    """Whether the newest step is the first of which no rollout finished."""
    *earlier, newest = [metrics.get("finished") == 0 for metrics in history]
    return newest and not any(earlier)


def warn_if_unparsed(teacher: Any, history: Sequence[Metrics], has_flags: bool) -> None:
    """Warn when almost none of the teacher's replies can be parsed, because it teaches nothing."""
    asked = sum(metrics["teacher_asked"] for metrics in history)
    parsed = sum(metrics["teacher_parsed"] for metrics in history)
    if not asked or parsed >= asked / 10:
        return
    reply, prompt = f"{teacher.max_tokens} tokens", f"{teacher.max_prompt} tokens"
    if has_flags:
        reply, prompt = "--teacher-reply", "--teacher-prompt"
    note(
        f"{parsed} of the teacher's {asked} replies followed the format; {teacher.cut} ran "
        f"into {reply}, {teacher.dropped} requests were longer than {prompt}"
    )
