"""What a run is said to need: counted from the models themselves, and against what a process really takes."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import LM, ModelConfig
from run.config import Config
from show import plan
from show.plan import GIB, USABLE, Sizes, fit, memory, peak
from thinktuning import main

LLAMA_3B = ModelConfig(
    128256, 3072, 28, 24, 8, 128, 8192, rope_theta=500000.0, max_seq_len=131072, tie_embeddings=True
)
SMALL = ModelConfig(16000, 384, 4, 6, 3, 64, 1056, max_seq_len=1024)


def test_parameters_are_those_of_the_model():
    small = ModelConfig(300, 32, 2, 4, 2, 8, 64, qkv_bias=True, tie_embeddings=True)
    assert plan.parameters(small) == sum(p.numel() for p in LM(small).parameters())
    assert plan.parameters(LLAMA_3B) == 3_212_749_824  # its model card says 3.21B


def test_parts_by_hand():
    config = Config(micro_batch=4096, kl_coef=0.1, rows=20, samples=5)
    n = plan.parameters(LLAMA_3B)
    parts = memory(config, Sizes(LLAMA_3B, LLAMA_3B, torch.bfloat16))
    assert parts["weights"] == parts["teacher"] == parts["reference"] == 2 * n
    assert parts["optimizer"] == 12 * n  # float32: master, two moments
    cached = 2 * 28 * 8 * 128 * 2  # bytes a position: k and v
    assert parts["sampling"] > (20 * (512 + 1024) + 4 * 512) * cached
    assert parts["asking the teacher"] > 20 * (3072 + 1024) * cached
    assert memory(config, Sizes(LLAMA_3B, LLAMA_3B, torch.float32))["optimizer"] == 8 * n
    assert peak(parts) == sum(
        b for k, b in parts.items() if k not in ("sampling", "asking the teacher", "update")
    ) + max(parts["sampling"], parts["asking the teacher"], parts["update"])


def test_more_rows_need_larger_caches_but_no_larger_passes():
    few, more = (
        memory(Config(rows=rows), Sizes(LLAMA_3B, LLAMA_3B, torch.bfloat16))["asking the teacher"]
        for rows in (256, 257)
    )
    cached = 2 * 28 * 8 * 128 * 2
    assert (
        more - few == (512 + 1024 + 1024) * cached + 16 * 128256
    )  # the request and the reply; logits


def test_a_pass_of_prompts_is_as_large_as_they_are_but_holds_at_least_one():
    small = ModelConfig(300, 32, 2, 4, 2, 8, 64)

    def work(rows, prompt, prompts=None):  # without the rows' cache and logits
        cached = 2 * 2 * 2 * 8 * 4
        return (
            plan.generation(small, rows, prompt, 7, 4, prompts)
            - rows * (prompt + 7) * cached
            - 16 * rows * 300
        ) / (cached + plan.block_bytes(small, 4))

    assert work(16, 10) == 160 and work(16, 10, prompts=2) == 20
    assert work(2, plan.PREFILL) == plan.PREFILL and work(2, 3 * plan.PREFILL) == 3 * plan.PREFILL


@pytest.mark.parametrize("free", [4, 5, 9, 30])
def test_the_micro_batch_is_the_largest_that_fits(free):
    sizes, config = Sizes(SMALL, SMALL, torch.float32), Config(rows=8)
    chosen = fit(config, sizes, "cpu", free * GIB)
    assert peak(memory(chosen, sizes)) <= USABLE * free * GIB
    larger = replace(chosen, micro_batch=2 * chosen.micro_batch)
    assert (
        chosen.micro_batch == plan.LARGEST_MICRO_BATCH
        or peak(memory(larger, sizes)) > USABLE * free * GIB
    )
    given = replace(config, micro_batch=2048)
    assert fit(given, sizes, "cpu", free * GIB) == given  # what the user asks for stands


def test_a_run_that_cannot_fit_is_refused_with_the_two_best_flags():
    config, sizes = Config(rows=512, micro_batch=8192), Sizes(SMALL, SMALL, torch.float32)
    needed = peak(memory(config, sizes))
    with pytest.raises(
        ValueError,
        match=r"the run needs about .* GiB free; what helps most is (--\S+ \S+) .* and (--\S+)",
    ) as error:
        fit(config, sizes, "cuda", needed)
    advice = {
        flag: needed - peak(memory(*changed)) for flag, *changed in plan.economies(config, sizes)
    }
    named = [flag for flag in advice if flag in str(error.value)]
    assert sorted(named) == sorted(sorted(advice, key=advice.get, reverse=True)[:2])
    flag, changed, less = next(e for e in plan.economies(config, sizes) if e[0] == named[0])
    assert peak(memory(changed, less)) < needed


def test_the_refusal_reaches_the_user_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    LM(ModelConfig(300, 32, 2, 2, 1, 16, 64)).save(tmp_path / "model")
    monkeypatch.delattr(LM, "load")
    command = [
        "train",
        "--model",
        str(tmp_path / "model"),
        "--data",
        "wordproblems",
        "--out",
        str(tmp_path / "run"),
    ]
    for free, flags, words in (
        (1 << 28, 2, "what helps most is --"),
        (1 << 20, 0, "take a device with more memory or a smaller model"),
    ):
        monkeypatch.setattr(plan, "free_memory", lambda device, free=free: free)
        assert main(command) == 2
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1
            and "GiB" in error
            and error.count("--") == flags
            and words in error
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("half_precision", [False, True])
def test_whoever_follows_the_advice_arrives(resumed, half_precision, monkeypatch):
    """From far too little memory, again and again what the message names first: it fits, or the message says it cannot."""
    sizes = Sizes(SMALL, SMALL, torch.bfloat16 if half_precision else torch.float32)
    count = plan.parameters(SMALL)
    monkeypatch.setattr(plan, "parameters", lambda config: count)  # hundreds of times
    least = plan.least_memory(Config(micro_batch=8192, kl_coef=0.1), sizes, resumed)
    for free, can_fit in ((int(1.2 * least / USABLE), True), (int(0.99 * least / USABLE), False)):
        config, changed = Config(micro_batch=8192, kl_coef=0.1, recompute=False), sizes
        for _ in range(60):
            try:
                fit(config, changed, "cuda", free, resumed)
                assert can_fit
                break
            except ValueError as error:
                message = str(error)
            if not can_fit:
                assert (
                    "take a device with more memory" in message
                    and ("smaller model" in message) != resumed
                )
                break
            ways = {flag: rest for flag, *rest in plan.economies(config, changed, resumed)}
            named = [flag for flag in ways if re.search(rf"{re.escape(flag)}( |$)", message)]
            assert 1 <= len(named) <= 2
            flags = {flag.split()[0] for flag in named}
            assert not resumed or flags <= {"--rows", "--micro-batch", "--recompute"}
            config, changed = ways[min(named, key=message.find)]
            assert config.teacher_prompt >= 1500
        else:
            raise AssertionError(message)


def test_free_memory_is_a_number_of_this_machine():
    assert 1 << 20 < plan.free_memory("cpu") < 1 << 61


# What both scripts begin and end with: each setting is measured in a process of its own, which has
# the imports from the one that it is forked from.
BEGIN = """
import ctypes, os, random, sys
import torch
import torch._dynamo  # the optimizer imports it, and it is no part of the estimate
from tools.bench import status
from run.config import Config
from grpo import MasterAdamW, Rollout, update
from model import LM
from sampler import generate, prefill
from show.plan import Sizes, generation, memory, peak
from show.test_plan import SMALL

torch.set_num_threads(1)
rng = random.Random(0)
ids = lambda n: [rng.randrange(16000) for _ in range(n)]
"""
END = """
for setting in sys.argv[1:]:
    if os.fork() == 0:
        print(measure(*setting.split()), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
UPDATE = """
def measure(dtype, micro_batch, recompute):
    dtype, micro_batch, recompute = getattr(torch, dtype), int(micro_batch), recompute == "recompute"
    config = Config(method="grpo", rows=16, samples=4, questions=4, max_prompt=128, max_tokens=256, micro_batch=micro_batch, recompute=recompute)
    # Four rollouts are 1,536 tokens: more than a micro-batch.
    rollouts = [Rollout(ids(128), ids(256), True, advantage=rng.choice((-1.0, 1.0))) for _ in range(4)]
    torch.ones(8, 8, dtype=dtype) @ torch.ones(8, 8, dtype=dtype)
    before = status("VmRSS")
    with torch.device("meta"):
        model = LM(SMALL).to(dtype)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.recompute = recompute
    optimizer = MasterAdamW(model.parameters(), lr=1e-5, fused=True)
    # The first step makes the optimizer's state, which a short rollout does as well.
    update(model, optimizer, [Rollout(ids(2), ids(2), True, advantage=1.0)])
    update(model, optimizer, rollouts, micro_batch=micro_batch)
    return (status("VmHWM") - before) / peak(memory(config, Sizes(SMALL, None, dtype)))
"""
GENERATION = """
def measure(*setting):
    prompts, samples, prompt, reply, exemplars = map(int, setting)
    model = LM(SMALL)
    prefix = prefill(model, [ids(exemplars)])[0] if exemplars else None
    generate(model, [ids(9)], max_tokens=2, stop=())
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    generate(model, [ids(prompt) for _ in range(prompts)], samples=samples, max_tokens=reply, stop=(), prefix=prefix)
    seen = exemplars and exemplars + prompt
    return (status("VmHWM") - before) / generation(SMALL, prompts * samples, prompt, reply, 4, prompts, seen)
"""


def measured(script, settings):
    """Of each setting, what a process takes as a multiple of the estimate."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script + END, *settings],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    print("measured / estimated", done.stdout)
    return dict(zip(settings, map(float, done.stdout.split()), strict=True))


@pytest.mark.slow
def test_the_estimate_of_an_update_is_near_what_a_process_takes():
    settings = ["float32 1280 keep", "float32 1280 recompute", "float32 512 recompute"]
    for setting, ratio in measured(UPDATE, settings).items():
        assert 0.7 < ratio < 1.3, setting


@pytest.mark.slow
def test_the_estimate_of_generation_is_near_what_a_process_takes():
    # Prompts, samples, tokens of a prompt, of a reply, of exemplars.
    settings = ["20 1 512 4 0", "2 32 512 8 0", "8 16 128 24 0", "32 1 128 8 700"]
    for setting, ratio in measured(GENERATION, settings).items():
        assert 0.7 < ratio < 1.3, setting
