"""A run that is killed, starved of disk space or damaged ends as if nothing had happened."""

import errno
import hashlib
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401 (every run imports it; a forked child has it from here)

import thinktuning
from data import load_problems, tokenizer
from grpo import MasterAdamW
from model import LM, ModelConfig
from run import checkpoint
from run.record import Run
from teacher import Teacher, guidance_fraction
from thinktuning import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = 6
REPLY = "<opinion>incorrect</opinion><reason>Hmm.</reason><phrase>x</phrase>"
SETTINGS = (
    "--steps",
    str(STEPS),
    "--questions",
    "3",
    "--samples",
    "4",
    "--max-tokens",
    "10",
    "--mini-batch",
    "2",
    "--no-recompute",
    "--learning-rate",
    "1e-2",
    "--teacher-reply",
    "20",
    "--teacher-prompt",
    "100",
    "--max-prompt",
    "100",
    "--save-every",
    "2",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    torch.manual_seed(0)
    builtin = tokenizer.Tokenizer.builtin()
    path = tmp_path_factory.mktemp("start") / "model"
    LM(ModelConfig(builtin.vocab_size, 32, 2, 2, 1, 16, 64, max_seq_len=256)).save(path, builtin)
    # A file, because to make the 8,000 built-in problems takes longer than to train on a few.
    problems = [json.dumps(p._asdict()) for p in load_problems("wordproblems")[:40]]
    (path.parent / "problems.jsonl").write_text("\n".join(problems))
    return path


def child(
    start,
    out,
    *flags,
    before=lambda: None,
    kill_after=None,
    wait=True,
    settings=SETTINGS,
    named=("--model", "--data"),
) -> int:
    """Run the command in a forked process; its exit status, or minus the signal that ended it (its number if not waited for)."""
    argv = ["train", "--out", str(out), "--resume", *settings, *flags]
    problems = start.parent / "problems.jsonl"
    for flag, value in {"--model": str(start), "--data": str(problems)}.items():
        if flag in named:
            argv += [flag, value]
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            torch.set_num_threads(1)
            # A random model never ends its turn, gives no feedback and is never right. Here any byte above 127 ends a turn,
            # the teacher always says the same, and texts of even length are paid for, so that there is something to learn.
            tokenizer.stop_ids = lambda *_: set(range(128, 256))
            Teacher.ask = lambda self, questions, _: [REPLY] * len(questions)
            thinktuning.is_correct = lambda text, answer: len(text) % 2 == 0
            sys.stdout = sys.stderr = open(f"{out}.log", "a", buffering=1)
            before()
            status = main(argv)
        finally:
            os._exit(status)
    if not wait:
        return pid
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def outcome(out: Path):
    """What must not depend on any interruption: the weights, the metrics but for times, the transcripts."""
    metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
    for m in metrics:
        m.pop("tokens_per_second")
    return (
        hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest(),
        metrics,
        (out / "transcripts.jsonl").read_text(),
    )


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    began = time.perf_counter()
    assert child(start, out) == 0
    whole = outcome(out)
    assert [m["step"] for m in whole[1]] == list(range(STEPS)) and all(
        m["active_share"] > 0 for m in whole[1]
    )
    assert sum(m["guided"] for m in whole[1]) > 2
    assert whole[0] != hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()
    return whole, time.perf_counter() - began


def steps_of(out):
    return sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoint").glob("step-*"))


def signal_after(steps, number=signal.SIGTERM):
    """What a child does before it begins, so that it gets a signal once so many steps are done."""
    log = Run.log

    def log_and_signal(run, metrics, *rest):
        log(run, metrics, *rest)
        if metrics["step"] + 1 == steps:
            os.kill(os.getpid(), number)

    return lambda: setattr(Run, "log", log_and_signal)


def test_an_interrupted_and_resumed_run_is_the_undisturbed_one(start, undisturbed, tmp_path):
    out = tmp_path / "run"
    assert child(start, out, before=signal_after(3)) == 0
    assert "stopped; --resume goes on" in (tmp_path / "run.log").read_text()
    assert steps_of(out) == [2, 3] and len(open(out / "metrics.jsonl").readlines()) == 3
    with open(
        out / "metrics.jsonl", "a"
    ) as file:  # lines of steps that no checkpoint holds, the last one torn
        file.write('{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert child(start, out) == 0
    assert outcome(out) == undisturbed[0]
    assert steps_of(out) == [4, 6]  # --keep 2
    assert (
        child(start, out) == 0 and outcome(out) == undisturbed[0]
    )  # a finished run has nothing left to do


def test_other_settings_are_not_resumed(start, undisturbed, tmp_path):
    out = tmp_path / "run"
    assert child(start, out) == 0
    assert child(start, out, "--clip", "0.3") == 2
    assert "clip was 0.2 and is 0.3" in (tmp_path / "run.log").read_text()
    assert outcome(out) == undisturbed[0]


def test_flags_that_are_left_out_on_resume_are_the_runs_own(start, undisturbed, tmp_path):
    out = tmp_path / "run"
    assert child(start, out, before=signal_after(3)) == 0
    assert child(start, out, settings=(), named=()) == 0  # the model and the problems, too
    assert outcome(out) == undisturbed[0]
    assert child(start, tmp_path / "new", settings=(), named=()) == 2
    assert "these flags are required: --model, --data" in (tmp_path / "new.log").read_text()
    assert child(start, out, "--preset", "demo", settings=()) == 2
    assert "preset was 'paper' and is 'demo'" in (tmp_path / "run.log").read_text()
    assert child(start, out, "--teacher", str(start / "other"), settings=()) == 2


def test_what_changes_no_result_may_change_on_resume(start, undisturbed, tmp_path):
    out, changed = (
        tmp_path / "run",
        {"rows": 2, "micro_batch": 150, "recompute": True, "save_every": 3, "keep": 1},
    )
    assert child(start, out, before=signal_after(3)) == 0
    flags = [
        "--rows",
        "2",
        "--micro-batch",
        "150",
        "--recompute",
        "--save-every",
        "3",
        "--keep",
        "1",
    ]
    assert child(start, out, *flags, before=signal_after(5)) == 0
    for _ in range(2):
        assert {
            k: v for k, v in json.loads((out / "config.json").read_text()).items() if k in changed
        } == changed
        assert child(start, out, settings=()) == 0  # they have become the run's own
    weights, metrics, transcripts = outcome(out)
    assert steps_of(out) == [6] and len(metrics) == STEPS
    for ours, theirs in zip(
        metrics, undisturbed[0][1]
    ):  # but for what is added up in another order
        assert {k: ours[k] for k in ("reward", "mean_length", "guided")} == {
            k: theirs[k] for k in ("reward", "mean_length", "guided")
        }
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_more_steps_go_on_with_the_schedule_that_the_run_began_with(start, undisturbed, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    longer = ("--steps", "8", "--schedule-steps", str(STEPS))
    assert child(start, whole, *longer) == 0
    assert child(start, out) == 0 and outcome(out) == undisturbed[0]
    assert child(start, out, "--steps", "60", before=signal_after(8), settings=()) == 0
    said = (tmp_path / "run.log").read_text()
    assert (
        f"60 steps instead of {STEPS}; the teacher's share p_s stays that of a run of {STEPS} steps"
        in said
    )
    assert outcome(out) == outcome(whole)
    # By the schedule of 60 steps the teacher, gone since step 1, would have come back.
    assert guidance_fraction(7, 60) > 0
    assert [m["fraction"] > 0 for m in outcome(out)[1]] == [
        guidance_fraction(step, STEPS) > 0 for step in range(8)
    ]
    assert child(start, out, "--steps", "59", settings=()) == 2
    assert "steps was 60 and is 59" in (tmp_path / "run.log").read_text()


def test_a_run_without_checkpoints_says_so_and_loses_nothing_on_resume(start, tmp_path):
    out, log = tmp_path / "run", tmp_path / "run.log"
    assert child(start, out, "--save-every", "0", before=signal_after(2)) == 0
    assert (
        "stopped; it cannot be resumed, because --save-every 0 kept no checkpoint"
        in log.read_text()
    )
    assert "--resume goes on" not in log.read_text()
    recorded = (out / "metrics.jsonl").read_bytes()
    assert child(start, out, "--save-every", "2") == 2
    assert "holds 2 steps and no checkpoint: give another --out" in log.read_text()
    assert (out / "metrics.jsonl").read_bytes() == recorded


def test_a_run_that_dies_before_its_first_checkpoint_begins_again(start, undisturbed, tmp_path):
    out = tmp_path / "run"
    assert (
        child(start, out, "--save-every", "3", before=signal_after(2, signal.SIGKILL))
        == -signal.SIGKILL
    )
    assert child(start, out, settings=()) == 0 and outcome(out) == undisturbed[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "state.json").write_text("{"),
        lambda p: (p / "model.safetensors").unlink(),
        lambda p: os.truncate(p / "optimizer.safetensors", 100),
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:-1] + b"\x01"
        ),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(start, undisturbed, tmp_path, damage):
    out = tmp_path / "run"
    assert child(start, out) == 0
    damage(out / "checkpoint" / "step-00000006")
    assert child(start, out) == 0
    assert "step-00000006 is damaged" in (tmp_path / "run.log").read_text()
    assert outcome(out) == undisturbed[0]
    for step in (4, 6):
        damage(out / "checkpoint" / f"step-{step:08}")
    assert child(start, out) == 1
    assert "no checkpoint" in (tmp_path / "run.log").read_text()


def at_call(n, action):
    """Let the n-th call of anything that a checkpoint changes the disk with end in `action`."""
    calls = [0]

    def patched(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == n:
                action()
            return function(*args, **kwargs)

        return call

    def install():
        for holder, name in (
            (checkpoint.os, "fsync"),
            (checkpoint.os, "rename"),
            (checkpoint, "save_file"),
            (checkpoint.shutil, "rmtree"),
            (checkpoint.Path, "write_text"),
            (checkpoint.Path, "mkdir"),
        ):
            setattr(holder, name, patched(getattr(holder, name)))

    return install


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    raise OSError(number, os.strerror(number))


@pytest.mark.slow
@pytest.mark.parametrize(
    "actions",
    [[kill_self], [partial(fail, e) for e in (errno.ENOSPC, errno.EACCES, errno.EIO)]],
    ids=["SIGKILL", "ENOSPC, EACCES or EIO"],
)
def test_no_write_that_fails_or_never_returns_loses_the_run(start, tmp_path, actions):
    # The second checkpoint takes the place of the first.
    flags = ("--steps", "2", "--save-every", "1", "--keep", "1")
    assert child(start, tmp_path / "whole", *flags) == 0
    whole, reached = outcome(tmp_path / "whole"), 0
    # Every call is killed; of the errors every second one, because no call is handled apart.
    for n in range(1, 200, min(2, len(actions))):
        out = tmp_path / f"run{n}"
        action = actions[
            n % len(actions)
        ]  # the errors in turn: nothing in the program tells one from another
        status = child(start, out, *flags, before=at_call(n, action))
        if status == 0:
            break  # fewer than n calls were made
        reached = n
        assert status == -signal.SIGKILL if action is kill_self else status in (1, 2)
        assert "Traceback" not in (tmp_path / f"run{n}.log").read_text()
        assert child(start, out, *flags) == 0
        assert outcome(out) == whole
    assert reached > 20


@pytest.mark.slow
def test_15_kills_at_random_moments_change_nothing(start, undisturbed, tmp_path):
    whole, seconds = undisturbed
    rng, out, kills, finished = random.Random(0), tmp_path / "run0", 0, 0
    while kills < 15:
        status = child(start, out, "--save-every", "1", kill_after=rng.uniform(0, 1.2 * seconds))
        if status == -signal.SIGKILL:
            kills += 1
        else:
            assert status == 0
        if status == 0 or kills == 15:
            assert child(start, out, "--save-every", "1") == 0
            assert outcome(out) == whole
            finished += 1
            out = tmp_path / f"run{finished}"
    assert finished >= 1


def test_a_second_run_in_one_directory_is_refused_and_a_dead_ones_lock_is_not(start, tmp_path):
    out = tmp_path / "run"
    ready, release = os.pipe(), os.pipe()
    log = Run.log

    def hold(run, metrics, *rest):
        log(run, metrics, *rest)
        os.write(ready[1], b"x")
        os.read(release[0], 1)

    holder = child(start, out, before=lambda: setattr(Run, "log", hold), wait=False)
    os.read(ready[0], 1)  # it holds the directory now
    assert child(start, out) == 2
    assert "in use by another run" in (tmp_path / "run.log").read_text()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert child(start, out) == 0


def test_the_state_of_half_precision_comes_back_with_its_masters(tmp_path):
    def make():
        torch.manual_seed(0)
        model = LM(ModelConfig(50, 16, 1, 2, 1, 8, 24)).bfloat16()
        return model, MasterAdamW(model.parameters(), lr=1e-3)

    def step(model, optimizer):
        model(torch.arange(20)[None]).float().logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    checkpoint.save(tmp_path, 3, model, optimizer, {}, keep=1)
    again, its_optimizer = make()
    assert checkpoint.restore(tmp_path, again, its_optimizer, {}) == 3
    for m, o in ((model, optimizer), (again, its_optimizer)):
        step(m, o)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(optimizer.copies, its_optimizer.copies))
