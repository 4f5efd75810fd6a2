"""Two processes (gloo, CPU) do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.tokenizer import Tokenizer
from model import LM, ModelConfig
from run.world import World

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def torchrun(*command, processes=2, timeout=300):
    """Run `thinktuning.py ...` or `-c`-like test files under torchrun; (status, output of all processes)."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    done = subprocess.run(
        [*launch, *map(str, command)],
        cwd=HERE,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout


UPDATE = """
import copy, dataclasses, sys
import torch
import torch.distributed as dist
from run.world import World, full
from grpo import MasterAdamW, update
from model import LM
from test_grpo import ragged_rollouts, tiny_model

tie, kl, micro_batch, recompute = sys.argv[1] == "tied", float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "recompute"
world = World.start("cpu", torch.float32)
alone = tiny_model()
if tie:
    alone = LM(dataclasses.replace(alone.config, tie_embeddings=True))
    for p in alone.parameters():
        dist.broadcast(p.data, 0)
rollouts = ragged_rollouts(alone, n=7)
spread, reference = copy.deepcopy(alone), tiny_model(seed=5)
spread.recompute = recompute
world.shard(spread)
options = dict(kl_coef=kl, reference=reference if kl else None, micro_batch=micro_batch)
# eps: AdamW's first step is otherwise a sign
optimizers = [MasterAdamW(m.parameters(), lr=1e-3, eps=1e-3) for m in (alone, spread)]
for step in range(3):
    for r in rollouts[step::2]:
        r.old_logprobs = None  # each process computes those of its own rollouts
    own = world.share(rollouts)
    if sys.argv[5] == "one":  # process 0 has nothing to do, and joins the passes of the other
        own = [] if world.is_first else rollouts
    ours = update(spread, optimizers[1], own, world=world, **options)
    for r in rollouts[step::2]:
        r.old_logprobs = None
    theirs = update(alone, optimizers[0], rollouts, **options)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert abs(ours[key] - theirs[key]) < 1e-5 * max(1, abs(theirs[key])), (key, ours[key], theirs[key])
worst = max((full(a) - b).abs().max().item() for a, b in zip(spread.parameters(), alone.parameters(), strict=True))
parts = sum(p.to_local().numel() for p in spread.parameters())
assert parts < 0.8 * sum(p.numel() for p in alone.parameters())
if world.is_first:
    print("worst difference of a weight", worst)
assert worst < 1e-5
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "settings",
    [
        ("untied", "0", "10000", "keep", "both"),
        ("tied", "0.1", "12", "recompute", "both"),
        ("untied", "0.1", "1", "keep", "both"),
        ("tied", "0", "12", "keep", "one"),
    ],
)
def test_the_update_of_two_processes_is_that_of_one(settings, tmp_path):
    script = tmp_path / "update.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n" + UPDATE)
    status, output = torchrun(script, *settings)
    assert status == 0, output
    assert "worst difference" in output


@pytest.fixture
def start(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer.builtin()
    LM(ModelConfig(tokenizer.vocab_size, 32, 2, 2, 1, 16, 64, max_seq_len=256)).save(
        tmp_path / "start", tokenizer
    )
    return tmp_path / "start"


TRAIN = """
import sys
sys.path.insert(0, {here!r})
import os, signal
import thinktuning
from thinktuning import main
from data import tokenizer
from run.record import Run
from teacher import Teacher
tokenizer.stop_ids = lambda *_: set(range(128, 256))
REPLY = "<opinion>incorrect</opinion><reason>Hmm.</reason><phrase>x</phrase>"
Teacher.ask = lambda self, questions, _: [REPLY] * len(questions)
thinktuning.is_correct = lambda text, answer: len(text) % 2 == 0
{extra}
sys.exit(main())
"""
FLAGS = (
    "--data wordproblems --questions 3 --samples 4 --max-tokens 10 --mini-batch 2 --learning-rate 1e-2 --teacher-reply 20 "
    "--teacher-prompt 100 --max-prompt 100 --save-every 1 --eval-data wordproblems --eval-count 5"
).split()


def script(tmp_path, extra=""):
    path = tmp_path / "train.py"
    path.write_text(TRAIN.format(here=str(HERE), extra=extra))
    return path


def metrics(run):
    return [json.loads(line) for line in open(run / "metrics.jsonl")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_go_from_one_process_to_two_and_back(start, tmp_path, dtype):
    run = tmp_path / "run"
    stops = (
        "os.environ.get('STOP') and setattr(Run, 'log', lambda self, m, *a, log=Run.log: "
        "(log(self, m, *a), m['step'] == int(os.environ['STOP']) and os.kill(os.getpid(), signal.SIGTERM)))"
    )
    command = [
        script(tmp_path, stops),
        "train",
        "--model",
        start,
        "--out",
        run,
        "--resume",
        "--dtype",
        dtype,
        "--steps",
        "6",
        *FLAGS,
    ]
    try:
        for processes, stop in ((1, "1"), (2, "3"), (1, "")):
            os.environ["STOP"] = stop
            status, output = torchrun(*command, processes=processes)
            assert status == 0, output
            assert (
                output.count("it fits") == 1 and "Traceback" not in output
            )  # only the first process prints
    finally:
        del os.environ["STOP"]
    assert [m["step"] for m in metrics(run)] == list(range(6)) and all(
        m["active_share"] > 0 for m in metrics(run)
    )
    assert "eval_accuracy" in metrics(run)[-1]
    assert LM.load(run / "model").embed.weight.isfinite().all()


SAYS_THE_SAME = """
# The student's words depend on the question alone, so one process and two sample the same rollouts.
import random
import torch
from grpo import token_logprobs
def generate(model, prompts, *, samples=1, logprobs=False, **_):
    responses = []
    for prompt in prompts:
        rng = random.Random(str(prompt))
        for _ in range(samples):
            words = [rng.randrange(300, 400) for _ in range(rng.randint(2, 9))]
            responses.append(words + [200] if rng.random() < 0.8 else words)
    known = [token_logprobs(model, torch.tensor([prompts[i // samples] + r]))[0, -len(r):].tolist()
             for i, r in enumerate(responses)]
    return (responses, known) if logprobs else responses
thinktuning.generate = generate
"""


@pytest.mark.parametrize("mini_batch", ["2", "1"])  # 1: the first process has no questions
def test_two_processes_train_as_one_does(start, tmp_path, mini_batch):
    """The same are helped, the same is learned from the same mini-batches."""
    for processes in (1, 2):
        command = [script(tmp_path, SAYS_THE_SAME), "train", "--model", start, "--steps", "4"]
        command += [
            "--out",
            tmp_path / f"run{processes}",
            "--schedule",
            "constant",
            "--p-init",
            "0.5",
        ]
        command += [*FLAGS, "--mini-batch", mini_batch, "--kl-coef", "0.1"]
        status, output = torchrun(*command, processes=processes)
        assert status == 0, output
        assert "Warning" not in output, output
    one, two = metrics(tmp_path / "run1"), metrics(tmp_path / "run2")
    assert sum(m["guided"] for m in one) > 3 and len(one) == len(two) == 4
    for ours, theirs in zip(one, two):
        del ours["tokens_per_second"], theirs["tokens_per_second"]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-4), key
    alone, together = (LM.load(tmp_path / f"run{n}" / "model") for n in (1, 2))
    for ours, theirs in zip(alone.parameters(), together.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-3  # AdamW's steps of 1e-2, rounding apart


def test_the_death_of_one_process_ends_the_others(start, tmp_path):
    dies = "Run.log = lambda self, m, *a, log=Run.log: (log(self, m, *a), self.is_first or m['step'] and os.kill(os.getpid(), 9))"
    status, output = torchrun(
        script(tmp_path, dies),
        "train",
        "--model",
        start,
        "--out",
        tmp_path / "run",
        "--steps",
        "500",
        *FLAGS,
        timeout=120,
    )
    assert status != 0
    assert "another process of this run has ended" in output or "Signal 9" in output
    assert len(metrics(tmp_path / "run")) < 10


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_shares_are_even_and_in_order(size, n):
    shares = [World(rank, size).share(list(range(n))) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
