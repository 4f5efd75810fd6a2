"""The memory that a training run needs, from config.json, before anything is loaded; does it fit?

The figures are estimates: the sum of the tensors, and for an update an allowance for gaps between
them. The framework's own megabytes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.weights import read_config
from model import LM, ModelConfig
from run.config import MAY_CHANGE, Config, flag
from run.head import slice_size
from sampler import PREFILL

GIB = 1 << 30
USABLE = 0.9  # of what is free
GAPS = 1.3  # freed memory that fits no new tensor enlarges an update by this factor, on a CPU
LARGEST_MICRO_BATCH = 1 << 16
# The advice never goes below these. The teacher's exemplars alone take about 1,000 tokens.
LEAST = dict.fromkeys(("rows", "micro_batch", "max_tokens", "max_prompt", "teacher_reply"), 1)
LEAST |= {"teacher_prompt": 1500}


@dataclass
class Sizes:
    """The properties of the two models on which the memory depends."""

    student: ModelConfig
    teacher: ModelConfig | None
    dtype: torch.dtype
    processes: int = 1
    self_taught: bool = False  # the teacher is the initial policy, so also the KL term's reference
    device: str = "cpu"

    @classmethod
    def read(cls, student_path, teacher_path, dtype, processes=1, device="cpu") -> Sizes:
        student = ModelConfig(**read_config(student_path)[0])
        teacher = ModelConfig(**read_config(teacher_path)[0]) if teacher_path else None
        self_taught = student_path == teacher_path and processes == 1
        return cls(student, teacher, dtype, processes, self_taught, device)


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LM(config).parameters())


def memory(config: Config, sizes: Sizes) -> dict[str, int]:
    """Bytes that one process needs, by purpose.

    Sampling, asking the teacher and the update come one after the other. Each of several processes
    has its part of the float32 weights and of the optimizer's state, its share of the rows, and
    the whole weights for sampling.
    """
    student, item, N, rows = sizes.student, sizes.dtype.itemsize, sizes.processes, config.rows
    n = parameters(student)
    sequence = config.max_prompt + config.max_tokens
    # The optimizer has two moments, and a master copy of weights that are not float32.
    parts = {"weights": n * item, "optimizer": n * (12 if item < 4 else 8)}
    if N > 1:
        parts = {"weights": 4 * n // N, "optimizer": 8 * n // N, "weights in one piece": n * item}
    if config.kl_coef and not sizes.self_taught:
        parts["reference"] = n * item
    if sizes.teacher:
        parts["teacher"] = parameters(sizes.teacher) * item
        seen = config.teacher_prompt
        asked = min(seen, sequence)  # of each row; the exemplars are there once
        reply = config.teacher_reply
        parts["asking the teacher"] = generation(sizes.teacher, rows, asked, reply, item, seen=seen)
    questions = min(config.questions, -(-rows // config.samples))
    prompt, reply = config.max_prompt, config.max_tokens
    parts["sampling"] = generation(student, rows, prompt, reply, item, questions)
    tokens = max(config.micro_batch, sequence)
    # In float32: logits, their exponentials, and a third tensor of the same size.
    logits = 12 * tokens * slice_size(tokens, sizes.device)
    mask = tokens * sequence * item  # which positions a response's tokens see
    work = tokens * token_bytes(config, student, item) + mask + logits
    parts["update"] = 4 * n // N + int(GAPS * work)
    return parts


def generation(model, rows, prompt, reply, item, prompts=None, seen=0) -> int:
    """Bytes to generate `rows` replies.

    These are the KV cache of the rows; that of one pass of prompts, and a block's work on it; and
    four copies of the last logits. A prompt after a prefix needs a mask over `seen` positions.
    """
    cached = 2 * model.n_layers * model.n_kv_heads * model.head_dim * item
    at_once = max(prompt, min((prompts or rows) * prompt, PREFILL))
    work = at_once * (cached + block_bytes(model, item) + seen * (item + 2))
    return rows * (prompt + reply) * cached + work + 16 * rows * model.vocab_size


def block_bytes(model, item) -> int:
    """Bytes that one block's forward pass keeps of a token.

    These are the norms, q/k/v before and after the rotation, attention, and both projections.
    """
    qkv_heads = model.n_heads + 2 * model.n_kv_heads
    heads = 2 * qkv_heads + 2 * model.n_heads
    return item * (5 * model.dim + heads * model.head_dim + 4 * model.ffn_dim)


def token_bytes(config: Config, model, item) -> int:
    """Bytes that the update keeps of one token until the backward pass has ended."""
    # Attention takes the tokens apart: queries and results once more, and keys and values of each
    # response's own positions and its prompt's.
    positions = 1 + config.max_prompt / config.max_tokens
    apart = 3 * model.n_heads + int(2 * model.n_kv_heads * positions)
    block = block_bytes(model, item) + item * model.head_dim * apart
    kept = model.n_layers * (model.dim * item if config.recompute else block)
    return kept + 2 * block  # a block's values and their gradients


def peak(parts: dict[str, int]) -> int:
    """The bytes that are needed all the time, and those of the largest of the three phases."""
    phases = ("sampling", "asking the teacher", "update")
    always = sum(size for name, size in parts.items() if name not in phases)
    return always + max(parts.get(phase, 0) for phase in phases)


def fit(config: Config, sizes: Sizes, device, free: int, resumed=False) -> Config:
    """The configuration with a micro-batch, which is chosen if it is 0.

    Raises ValueError if the run does not fit. The message names what helps most; for a `resumed`
    run only what may still change.
    """
    usable = int(USABLE * free)
    if not config.micro_batch:
        smallest = config.max_prompt + config.max_tokens  # one rollout
        size = LARGEST_MICRO_BATCH
        while size > smallest and peak(memory(replace(config, micro_batch=size), sizes)) > usable:
            size //= 2
        config = replace(config, micro_batch=max(size, smallest))
    needed = peak(memory(config, sizes))
    if needed <= usable:
        return config
    about = f"about {needed / GIB:.1f} GiB and {device} has {free / GIB:.1f} GiB free"
    raise ValueError(f"the run needs {about}; {advice(config, sizes, usable, resumed)}")


def advice(config: Config, sizes: Sizes, usable: int, resumed: bool) -> str:
    """What a reader can do about a run that needs more than `usable` bytes."""
    least = least_memory(config, sizes, resumed)
    if least > usable:
        device = "a device with more memory" + ("" if resumed else " or a smaller model")
        return f"the smallest settings still need {least / GIB:.1f} GiB: take {device}"
    needed = peak(memory(config, sizes))
    savings = {}
    for change, smaller_config, smaller_sizes in economies(config, sizes, resumed):
        savings[change] = needed - peak(memory(smaller_config, smaller_sizes))
    best = sorted(savings, key=savings.get, reverse=True)[:2]
    helpful = [f"{way} (saves {savings[way] / GIB:.1f} GiB)" for way in best if savings[way] > 0]
    return "what helps most is " + (" and ".join(helpful) or " together with ".join(best))


def economies(config: Config, sizes: Sizes, resumed=False):
    """(flag, configuration, sizes) of each change that needs less memory."""
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
    """The bytes that are needed when every size is 1 and everything that costs memory is off."""
    ones = {name: 1 for name in LEAST if name in MAY_CHANGE or not resumed}
    config = replace(config, **ones, recompute=True)
    if resumed:
        return peak(memory(config, sizes))
    config = replace(config, kl_coef=0.0)
    halved = replace(sizes, dtype=torch.bfloat16)
    return min(peak(memory(config, sizes)), peak(memory(config, halved)))


def describe(config: Config, sizes: Sizes, device, free: int) -> str:
    """Four lines about the run that begins."""
    parts = memory(config, sizes)
    kind = str(sizes.dtype).removeprefix("torch.")
    masters = ", float32 master weights" if sizes.dtype.itemsize < 4 else ""
    questions = f"{config.questions} questions x {config.samples} rollouts"
    micro_batch = f"micro-batches of {config.micro_batch:,} tokens"
    estimates = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    room = f"{peak(parts) / GIB:.2f} GiB of {free / GIB:.2f} GiB free"
    return f"""{parameters(sizes.student):,} parameters in {kind}{masters}, on {device}
{config.steps} steps of {questions} of up to {config.max_tokens} tokens; {micro_batch}
memory, estimated: {estimates}
at its peak {room}: it fits"""


def free_memory(device) -> int:
    """Bytes that a new process could have: of the GPU, or of this machine and its container."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: let the system's own limits decide
        return 1 << 60
    # A container's limit, in either version of the interface.
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            free = min(free, int((Path("/sys/fs/cgroup") / limit).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            pass
    return free
