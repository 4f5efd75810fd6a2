"""What stands around the training loop: its questions, its random numbers, its mini-batches, its end."""

# ruff: noqa: F811 (the fixture model_directory is imported)

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from data import load_problems
from grpo import Rollout
from model import LM
from run.config import Config, RunFailed
from run.loop import FAULTS, Loop, questions_of_step, warn_if_unparsed
from run.screen import note, ticking
from run.world import World
from test_thinktuning import model_directory  # noqa: F401 (a fixture)

HERE = Path(__file__).parents[1]


def loop_of(config=None, problems=range(10), world=World(), run=None, **more):
    config = config or Config(steps=5, questions=2, samples=2, mini_batch=2)
    return Loop(problems, config, run=run, world=world, **more)


class Recorder:
    def __init__(self):
        self.logged, self.saved = [], []

    def restore(self, student, optimizer):
        return 0, []

    def log(self, metrics, steps, transcripts):
        self.logged.append(metrics["step"])

    def save(self, step, student, optimizer):
        self.saved.append(step)


def rollouts_of(questions, samples):
    return [
        Rollout([1], [2], True, question=q, answer="7", text=f"{q} {i}")
        for q in questions
        for i in range(samples)
    ]


UPDATED = {"skipped": 0.0, "loss": 0.5, "grad_norm": 1.0}


# Questions and mini-batches


def test_every_epoch_shows_every_problem_once_in_an_order_of_its_own():
    problems = list(range(10))
    shown = [p for step in range(5) for p in questions_of_step(problems, 4, 3, step)]
    assert (
        Counter(shown[:10]) == Counter(shown[10:]) == Counter(problems) and shown[:10] != shown[10:]
    )
    assert len(questions_of_step(problems, 25, 3, 0)) == 25  # a step may be longer than an epoch


def test_sampling_depends_on_seed_step_and_process_alone():
    def draws(seed, step, rank=0):
        loop = loop_of(Config(seed=seed, steps=1), world=World(rank, 3))
        return torch.rand(3, generator=loop.generator(step)).tolist()

    assert draws(1, 2) == draws(1, 2)
    places = [(seed, step, rank) for seed in range(9) for step in range(9) for rank in range(3)]
    assert len({str(draws(*place)) for place in places}) == len(places)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("questions, mini_batch", [(8, 2), (7, 3), (4, 9), (3, 1), (6, 6)])
def test_processes_share_each_mini_batch_and_together_see_all_of_it_once(
    size, questions, mini_batch
):
    config = Config(steps=3, questions=questions, mini_batch=mini_batch, samples=3, epochs=2)
    problems = [f"question {i}" for i in range(20)]
    loops = [loop_of(config, problems, World(rank, size)) for rank in range(size)]
    for step in range(3):
        batch = questions_of_step(problems, questions, config.seed, step)
        own = [rollouts_of(loop.questions(step), 3) for loop in loops]
        parts = [list(loop.mini_batches(mine)) for loop, mine in zip(loops, own)]
        # Every process makes the same number of updates: they wait for one another in each.
        whole = [batch[i : i + mini_batch] for i in range(0, questions, mini_batch)] * config.epochs
        assert {len(part) for part in parts} == {len(whole)}
        for expected, *shares in zip(whole, *parts, strict=True):
            assert max(map(len, shares)) - min(map(len, shares)) <= 3  # a question at most
            together = [(r.question, r.text) for share in shares for r in share]
            assert together == [(r.question, r.text) for r in rollouts_of(expected, 3)]


# The end of a run


def test_a_run_without_interruption_makes_every_step():
    run = Recorder()
    loop = loop_of(Config(steps=5, questions=2, samples=2, save_every=2), run=run)
    for step, questions in loop.steps(None, None):
        loop.record(step, rollouts_of(questions, 2), UPDATED)
    assert run.logged == [m["step"] for m in loop.history] == list(range(5))
    assert run.saved == [2, 4, 5]


@pytest.mark.parametrize("rank, written", [(0, [2, 4, 5]), (1, [])])
def test_the_first_process_writes_the_page_once_an_evaluation_is_recorded(rank, written):
    class Alike(World):  # of two processes that do the same
        def gather(self, values):
            return [*values, *values]

    run, pages = Recorder(), []
    config = Config(steps=5, questions=2, samples=2, eval_every=2)
    write = lambda: pages.append(len(run.logged))  # noqa: E731
    loop = loop_of(config, run=run, world=Alike(rank, 2), page=write)
    for step, questions in loop.steps(None, None):
        loop.record(step, rollouts_of(questions, 2), UPDATED)
    assert pages == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["in the step", "while evaluating", "while recording"])
def test_a_signal_ends_the_run_after_the_step_in_which_it_comes(number, moment, capsys):
    run, evaluated = Recorder(), []

    def now(which, step):
        if (which, step) == (moment, 2):
            os.kill(os.getpid(), number)

    def validate(loop):
        now("while evaluating", len(evaluated))
        evaluated.append(1)
        return {}

    log = run.log
    run.log = lambda metrics, *rest: (log(metrics, *rest), now("while recording", metrics["step"]))
    before = signal.getsignal(number)
    config = Config(steps=50, questions=2, samples=2, save_every=20, eval_every=1)
    loop = loop_of(config, run=run, validation=["a problem"])
    for step, questions in loop.steps(None, None, validate=validate):
        now("in the step", step)
        loop.record(step, rollouts_of(questions, 2), UPDATED)
    assert run.logged == [m["step"] for m in loop.history] == [0, 1, 2]
    assert run.saved == [3]
    assert len(evaluated) == (2 if moment == "in the step" else 3)  # whoever stops does not wait
    assert signal.getsignal(number) == before
    assert "stopping after this step" in capsys.readouterr().err


def test_a_signal_to_one_process_stops_all():
    """World.gather is played here: this process was not signalled, another one was."""

    class Two(World):
        def gather(self, items):
            return items + [True] if items == [False] else items

    run = Recorder()
    loop = loop_of(run=run, world=Two())
    for step, questions in loop.steps(None, None):
        loop.record(step, rollouts_of(questions, 2), UPDATED)
    assert run.logged == [0] and run.saved == [1]


def test_steps_without_a_finite_gradient_end_the_run_only_if_there_are_too_many_in_a_row():
    skipped = {**UPDATED, "skipped": 1.0, "grad_norm": float("nan")}

    def made(updates):
        loop = loop_of(Config(steps=len(updates), questions=1, samples=2))
        for step, questions in loop.steps(None, None):
            loop.record(step, rollouts_of(questions, 2), updates[step])
        return len(loop.history)

    few = [skipped] * (FAULTS - 1) + [UPDATED]
    assert made(few * 2) == 2 * FAULTS
    assert made(few + [{**skipped, "skipped": 0.5}] * FAULTS) == 2 * FAULTS  # half its updates
    with pytest.raises(RunFailed, match="--learning-rate"):
        made([UPDATED] + [skipped] * FAULTS)


def test_a_teacher_that_is_hardly_understood_is_told_of_with_the_reason(capsys):
    class Teacher:
        cut, dropped, max_tokens, max_prompt = 7, 2, 120, 180

    def told(asked, parsed, has_flags=True):
        history = [{"teacher_asked": asked, "teacher_parsed": parsed}] * 2
        warn_if_unparsed(Teacher, history, has_flags)
        return capsys.readouterr().out

    assert told(0, 0) == "" and told(10, 1) == "" and told(10, 10) == ""
    assert told(11, 1) == (
        "2 of the teacher's 22 replies followed the format; 7 ran into --teacher-reply, "
        "2 requests were longer than --teacher-prompt\n"
    )
    assert told(11, 1, has_flags=False) == (  # as in the demonstration, which has no such flags
        "2 of the teacher's 22 replies followed the format; 7 ran into 120 tokens, "
        "2 requests were longer than 180 tokens\n"
    )


@pytest.mark.parametrize("has_flags, hints", [(True, 1), (False, 0)])
def test_a_step_without_any_finished_rollout_gives_one_hint(has_flags, hints, capsys):
    loop = loop_of(Config(steps=4, questions=2, samples=2, max_tokens=24), has_flags=has_flags)
    for step, questions in loop.steps(None, None):
        rollouts = rollouts_of(questions, 2)
        for rollout in rollouts:
            rollout.finished = step == 0
        loop.record(step, rollouts, UPDATED)
    out = capsys.readouterr().out
    assert out.count("\n") == hints and out.count("--max-tokens") == hints
    assert hints == 0 or "no rollout of step 2 ended within 24 tokens" in out


def test_a_failure_in_a_step_gives_the_signals_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        for _ in loop_of().steps(None, None):
            assert signal.getsignal(signal.SIGINT) != before
            raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before


def test_a_long_step_shows_its_time_on_a_terminal_alone(capsys, monkeypatch):
    def shown():
        with ticking("step 3 of 9", after=0.01):
            time.sleep(0.2)
        return capsys.readouterr().out

    assert shown() == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert shown() == "\n\rstep 3 of 9 has taken 0:00\x1b[K"


def test_a_note_takes_the_place_of_a_terminals_progress_line(capsys, monkeypatch):
    note("wait")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    note("wait")
    assert capsys.readouterr().out == "wait\n\rwait\x1b[K\n"


def test_ctrl_c_saves_and_exits_cleanly(model_directory, tmp_path):
    """SIGTERM, which takes the same way, is what run/test_resume.py sends."""
    run, problems = tmp_path / "run", tmp_path / "problems.jsonl"
    lines = [json.dumps(problem._asdict()) for problem in load_problems("wordproblems", "test")]
    problems.write_text("\n".join(lines))
    flags = "--method grpo --steps 100000 --questions 2 --samples 2 --max-tokens 8"
    command = [
        sys.executable,
        "thinktuning.py",
        "train",
        "--model",
        model_directory,
        "--out",
        run,
        "--data",
        problems,
        *flags.split(),
    ]
    process = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    LM.load(run / "model")
    assert all(json.loads(line) for line in open(run / "metrics.jsonl"))
