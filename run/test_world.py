"""Two processes (gloo, CPU) do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import load_problems
from data.tokenizer import Tokenizer
from model import LM, ModelConfig
from run.world import World

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def launch(*command, processes=2, timeout=300, **environment):
    """Run a script of thinktuning.py, under torchrun if in several processes; (status, output of all)."""
    torchrun = "-m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint localhost:0"
    torchrun += f" --nproc-per-node {processes}"
    done = subprocess.run(
        [sys.executable, *(torchrun.split() if processes > 1 else []), *map(str, command)],
        cwd=HERE,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
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

world = World.start("cpu", torch.float32)

def compare(tie, kl, micro_batch, recompute, only_one):
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
        if only_one:  # process 0 has nothing to do, and joins the passes of the other
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

compare(tie=False, kl=0.0, micro_batch=10000, recompute=False, only_one=False)
compare(tie=True, kl=0.1, micro_batch=12, recompute=True, only_one=False)
compare(tie=False, kl=0.1, micro_batch=1, recompute=False, only_one=False)
compare(tie=True, kl=0.0, micro_batch=12, recompute=False, only_one=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_the_update_of_two_processes_is_that_of_one(tmp_path):
    script = tmp_path / "update.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n" + UPDATE)
    status, output = launch(script)
    assert status == 0, output
    assert output.count("worst difference") == 4


@pytest.fixture
def start(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer.builtin()
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 2, 1, 16, 64, max_seq_len=256)
    LM(config).save(tmp_path / "start", tokenizer)
    problems = [json.dumps(p._asdict()) for p in load_problems("wordproblems")[:40]]
    (tmp_path / "problems.jsonl").write_text("\n".join(problems))
    return tmp_path / "start"


# One start of the processes trains several runs: each line that it reads has a run's flags.
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
for flags in os.environ["RUNS"].splitlines():
    status = main(flags.split())
    if status:
        sys.exit(status)
"""
FLAGS = (
    "--questions 3 --samples 4 --max-tokens 10 --mini-batch 2 --learning-rate 1e-2 --teacher-reply 20 "
    "--teacher-prompt 100 --max-prompt 100 --save-every 1 --eval-count 5"
)


def train(tmp_path, runs, processes, extra="", timeout=300, **environment):
    """Train the runs, a dict from the name of each to its flags; (status, output of all processes)."""
    script, problems = tmp_path / "train.py", tmp_path / "problems.jsonl"
    script.write_text(TRAIN.format(here=str(HERE), extra=extra))
    lines = []
    for name, flags in runs.items():
        places = f"--model {tmp_path}/start --data {problems} --eval-data {problems} --out {tmp_path}/{name}"
        lines.append(f"train {places} {FLAGS} {flags}")
    environment["RUNS"] = "\n".join(lines)
    return launch(script, processes=processes, timeout=timeout, **environment)


def metrics(run):
    return [json.loads(line) for line in open(run / "metrics.jsonl")]


def test_checkpoints_go_from_one_process_to_two_and_back(start, tmp_path):
    stops = (
        "os.environ.get('STOP') and setattr(Run, 'log', lambda self, m, *a, log=Run.log: "
        "(log(self, m, *a), m['step'] == int(os.environ['STOP']) and os.kill(os.getpid(), signal.SIGTERM)))"
    )
    dtypes = ("float32", "bfloat16")
    runs = {dtype: f"--resume --dtype {dtype} --steps 6" for dtype in dtypes}
    for processes, stop in ((1, "1"), (2, "3"), (1, "")):
        status, output = train(tmp_path, runs, processes, stops, STOP=stop)
        assert status == 0, output
        assert output.count("it fits") == len(dtypes)  # only the first process prints
        assert "Traceback" not in output
    for dtype in dtypes:
        recorded = metrics(tmp_path / dtype)
        assert [m["step"] for m in recorded] == list(range(6))
        assert all(m["active_share"] > 0 for m in recorded)
        assert "eval_accuracy" in recorded[-1]
        assert LM.load(tmp_path / dtype / "model").embed.weight.isfinite().all()


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


def test_two_processes_train_as_one_does(start, tmp_path):
    """The same are helped, the same is learned from the same mini-batches."""
    flags = "--steps 4 --schedule constant --p-init 0.5 --kl-coef 0.1 --mini-batch"
    for processes in (1, 2):
        # In mini-batches of one question the first process has no questions.
        runs = {f"run{processes}-of-{size}": f"{flags} {size}" for size in (2, 1)}
        status, output = train(tmp_path, runs, processes, SAYS_THE_SAME)
        assert status == 0, output
        assert "Warning" not in output, output
    for size in (2, 1):
        one, two = (tmp_path / f"run{processes}-of-{size}" for processes in (1, 2))
        check_same_metrics(metrics(one), metrics(two))
        alone, together = (LM.load(run / "model").parameters() for run in (one, two))
        for ours, theirs in zip(alone, together, strict=True):
            assert (ours - theirs).abs().max() < 1e-3  # AdamW's steps of 1e-2, rounding apart


def check_same_metrics(one, two):
    assert sum(m["guided"] for m in one) > 3 and len(one) == len(two) == 4
    for ours, theirs in zip(one, two):
        del ours["tokens_per_second"], theirs["tokens_per_second"]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-4), key


def test_the_death_of_one_process_ends_the_others(start, tmp_path):
    dies = "Run.log = lambda self, m, *a, log=Run.log: (log(self, m, *a), self.is_first or m['step'] and os.kill(os.getpid(), 9))"
    status, output = train(tmp_path, {"run": "--steps 500"}, 2, dies, timeout=120)
    assert status != 0
    assert "another process of this run has ended" in output or "Signal 9" in output
    assert len(metrics(tmp_path / "run")) < 10


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_shares_are_even_and_in_order(size, n):
    shares = [World(rank, size).share(list(range(n))) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
