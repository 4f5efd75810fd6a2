"""What a training run needs, worked out from config.json before anything is loaded: memory, micro-batches, whether it fits.

The figures are estimates: what the tensors add up to, with what gaps add to an update, without the framework's own megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.weights import read_config
from grpo import slice_size
from model import LM, ModelConfig
from run.config import MAY_CHANGE, Config, flag
from sampler import PREFILL

GIB = 1 << 30
USABLE = 0.9  # of what is free
GAPS = 1.3  # freed pieces that fit nothing new: by how much they enlarge an update's work, on a CPU (test_plan.py)
LARGEST_MICRO_BATCH = 1 << 16
LEAST = {
    "rows": 1,
    "micro_batch": 1,
    "max_tokens": 1,
    "max_prompt": 1,
    "teacher_reply": 1,
    "teacher_prompt": 1500,
}  # the advice never goes lower: the exemplars alone take about 1,000


@dataclass
class Sizes:
    """What of the two models the memory depends on."""

    student: ModelConfig
    teacher: ModelConfig | None
    dtype: torch.dtype
    processes: int = 1
    self_taught: bool = (
        False  # the teacher is the initial policy, and so the KL term's reference too
    )
    device: str = "cpu"

    @classmethod
    def read(cls, student_path, teacher_path, dtype, processes=1, device="cpu") -> Sizes:
        student = ModelConfig(**read_config(student_path)[0])
        teacher = teacher_path and ModelConfig(**read_config(teacher_path)[0])
        return cls(
            student,
            teacher,
            dtype,
            processes,
            student_path == teacher_path and processes == 1,
            device,
        )


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LM(config).parameters())


def memory(config: Config, sizes: Sizes) -> dict[str, int]:
    """Bytes of one process by what they are for. Sampling, asking the teacher and the update come one after the other.

    Of several processes each has its part of the float32 weights and the optimiser's state, for sampling also the whole
    weights, and its share of the rows.
    """
    student, item, N = sizes.student, sizes.dtype.itemsize, sizes.processes
    n, half = parameters(student), item < 4
    sequence = config.max_prompt + config.max_tokens
    parts = {
        "weights": n * item,
        "optimiser": n * (12 if half else 8),
    }  # two moments, and the master copy if there is one
    if N > 1:
        parts = {"weights": 4 * n // N, "optimiser": 8 * n // N, "weights in one piece": n * item}
    if config.kl_coef and not sizes.self_taught:
        parts["reference"] = n * item
    if sizes.teacher:
        parts["teacher"] = parameters(sizes.teacher) * item
        asked = min(
            config.teacher_prompt, config.max_prompt + config.max_tokens
        )  # a row's own; the exemplars are there once
        parts["asking the teacher"] = generation(
            sizes.teacher,
            config.rows,
            asked,
            config.teacher_reply,
            item,
            seen=config.teacher_prompt,
        )
    questions = min(config.questions, -(-config.rows // config.samples))
    parts["sampling"] = generation(
        student, config.rows, config.max_prompt, config.max_tokens, item, questions
    )
    tokens = max(config.micro_batch, sequence)
    logits = (
        12 * tokens * slice_size(tokens, sizes.device)
    )  # float32 scores, their exponentials, what became of either
    parts["update"] = 4 * n // N + int(
        GAPS * (tokens * token_bytes(config, student, item) + logits)
    )
    return parts


def generation(model, rows, prompt, reply, item, prompts=None, seen=0) -> int:
    """The KV cache of `rows` rows, that of one pass of prompts and a block's work on it, four copies of the last logits.

    `seen`: positions that a prompt behind a prefix sees, each an entry of its mask and of what that is made from.
    """
    cached = 2 * model.n_layers * model.n_kv_heads * model.head_dim * item
    at_once = max(prompt, min((prompts or rows) * prompt, PREFILL))
    work = at_once * (cached + block_bytes(model, item) + seen * (item + 2))
    return rows * (prompt + reply) * cached + work + 16 * rows * model.vocab_size


def block_bytes(model, item) -> int:
    """What one block's forward pass keeps of a token: norms, q/k/v before and after the rotation, attention, both projections."""
    heads = model.n_heads + 2 * model.n_kv_heads
    return item * (
        5 * model.dim + (2 * heads + 2 * model.n_heads) * model.head_dim + 4 * model.ffn_dim
    )


def token_bytes(config: Config, model, item) -> int:
    """What the update keeps of one token until the backward pass is through."""
    kept = model.n_layers * (model.dim * item if config.recompute else block_bytes(model, item))
    return kept + 2 * block_bytes(model, item)  # a block's values and their gradients


def peak(parts: dict[str, int]) -> int:
    phases = ("sampling", "asking the teacher", "update")
    return sum(b for k, b in parts.items() if k not in phases) + max(
        parts.get(k, 0) for k in phases
    )


def fit(config: Config, sizes: Sizes, device, free: int, resumed=False) -> Config:
    """The configuration with its micro-batch chosen, where that is open. Raises ValueError if the run cannot fit.

    The message names what helps most, of a `resumed` run only what may still change.
    """
    usable = int(USABLE * free)
    smallest = config.max_prompt + config.max_tokens  # one rollout
    chosen = config
    if not config.micro_batch:
        size = LARGEST_MICRO_BATCH
        while size > smallest and peak(memory(replace(config, micro_batch=size), sizes)) > usable:
            size //= 2
        chosen = replace(config, micro_batch=max(size, smallest))
    needed = peak(memory(chosen, sizes))
    if needed <= usable:
        return chosen
    raise ValueError(
        f"the run needs about {needed / GIB:.1f} GiB and {device} has {free / GIB:.1f} GiB free; "
        + advice(chosen, sizes, usable, resumed)
    )


def advice(config: Config, sizes: Sizes, usable: int, resumed: bool) -> str:
    """What a reader can do about a run that needs more than `usable` bytes."""
    least = least_memory(config, sizes, resumed)
    if least > usable:
        return (
            f"the smallest settings still need {least / GIB:.1f} GiB: take a device with more memory"
            + " or a smaller model" * (not resumed)
        )
    needed = peak(memory(config, sizes))
    savings = {
        way: needed - peak(memory(smaller, less))
        for way, smaller, less in economies(config, sizes, resumed)
    }
    best = sorted(savings, key=savings.get, reverse=True)[:2]
    told = [f"{way} (saves {savings[way] / GIB:.1f} GiB)" for way in best if savings[way] > 0]
    return "what helps most is " + (" and ".join(told) or " together with ".join(best))


def economies(config: Config, sizes: Sizes, resumed=False):
    """(flag, configuration, sizes) of each way to need less."""
    for name, least in LEAST.items():
        value = getattr(config, name)
        half = max(value // 2, least)
        if half < value and (name in MAY_CHANGE or not resumed):
            yield f"{flag(name)} {half}", replace(config, **{name: half}), sizes
    yield "--recompute", replace(config, recompute=True), sizes
    if not resumed:
        yield "--kl-coef 0", replace(config, kl_coef=0.0), sizes
        yield "--dtype bfloat16", config, replace(sizes, dtype=torch.bfloat16)


def least_memory(config: Config, sizes: Sizes, resumed=False) -> int:
    """What no economy can save: every size is 1."""
    ones = {name: 1 for name in LEAST if name in MAY_CHANGE or not resumed}
    config = replace(config, **ones, recompute=True)
    if resumed:
        return peak(memory(config, sizes))
    config = replace(config, kl_coef=0.0)
    return min(
        peak(memory(config, replace(sizes, dtype=dtype))) for dtype in (sizes.dtype, torch.bfloat16)
    )


def describe(config: Config, sizes: Sizes, device, free: int) -> str:
    parts = memory(config, sizes)
    kind = str(sizes.dtype).removeprefix("torch.") + (
        ", float32 master weights" if sizes.dtype.itemsize < 4 else ""
    )
    lines = [
        f"{parameters(sizes.student):,} parameters in {kind}, on {device}",
        f"{config.steps} steps of {config.questions} questions x {config.samples} rollouts of up to {config.max_tokens} "
        f"tokens; micro-batches of {config.micro_batch:,} tokens",
        "memory, estimated: " + ", ".join(f"{k} {b / GIB:.2f}" for k, b in parts.items()),
        f"at its peak {peak(parts) / GIB:.2f} GiB of {free / GIB:.2f} GiB free: it fits",
    ]
    return "\n".join(lines)


def free_memory(device) -> int:
    """Bytes that a new process could have: of the GPU, or of this machine and its container."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: let the system's own limits decide
        return 1 << 60
    for limit in (
        "memory.max",
        "memory/memory.limit_in_bytes",
    ):  # of a container, in either version of its interface
        try:
            free = min(free, int((Path("/sys/fs/cgroup") / limit).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            pass
    return free
