"""Speed and memory of this program on this machine: a table, and the same as JSON.

    python -m tools.bench                                 tiny and 135m on a CPU
    python -m tools.bench --device cuda                   0.5b and 3b on a GPU, compiled and eager
    python -m tools.bench --parts update --shapes 0.5b    one part of one shape
    python -m tools.bench --base out/base-...             also a profile of training steps

Weights are random and responses have a fixed length, so the work is that of a real model of the
shape. What is compared is measured in turns within one run. A floor is a time that no program can
beat on this machine: for each pass the larger of (weights and cache) / memory bandwidth and
floating-point operations / matrix rate. Both rates are measured first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import sampler
from data import load_problems
from data.tokenizer import Tokenizer
from grpo import MasterAdamW, Rollout, collate, logprobs_at, token_logprobs, update
from model import LM, ModelConfig
from run.batches import SharedPrompts
from run.compiled import RECORDER, RECORDING_DEVICES, compile_step
from run.config import DEMO, Config
from run.head import HeadLogprobs
from run.loop import Loop
from sampler import generate, prefill
from teacher import make_teacher
from thinktuning import train
from tools.peers import beside_trl, transformers_generate

HOME = Path(__file__).resolve().parents[1]  # where the program is


def shape(vocab_size, dim, n_layers, n_heads, n_kv_heads, ffn_dim, **more) -> ModelConfig:
    sizes = (vocab_size, dim, n_layers, n_heads, n_kv_heads, dim // n_heads, ffn_dim)
    return ModelConfig(*sizes, tie_embeddings=True, max_seq_len=4096, **more)


SHAPES = {
    "tiny": shape(512, 128, 4, 4, 2, 384),
    "135m": shape(49_152, 576, 30, 9, 3, 1536),
    "0.5b": shape(151_936, 896, 24, 14, 2, 4864, qkv_bias=True),
    "3b": shape(128_256, 3072, 28, 24, 8, 8192),
}
PROMPTS = {"tiny": 8, "135m": 2, "0.5b": 2, "3b": 8}
BATCH = {"0.5b": (4, 128), "3b": (8, 1536)}  # rows and tokens of an update, or those of rollouts
SAMPLES, LENGTH = 8, 64  # samples a prompt; tokens of a prompt, and of a response
SAMPLING = dict(max_tokens=LENGTH, stop=(), logprobs=True)
PARTS = ("rollouts", "update", "teacher", "step")


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        check(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_of_update(args.peak, args.shapes[0], args.dtype))
        return 0
    bench = Bench(args)
    print(
        f"{bench.about['device']}, {args.threads} threads, torch {torch.__version__}, "
        f"{args.dtype}; {bench.bandwidth / 1e9:.1f} GB/s, {bench.flops / 1e9:,.0f} GFLOP/s; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'shape':<8}{'part':<10}{'what':<50}{'median':>9}   {'spread':<19}")
    for name in args.shapes:
        bench.model = model_of(name, args.device, getattr(torch, args.dtype))
        for part in args.parts:
            bench.place = (name, part)
            getattr(bench, part)()
    bench.other_parts(args)
    if args.json:
        Path(args.json).write_text(json.dumps({**bench.about, "results": bench.results}, indent=1))
    return 0


def check(args) -> None:
    """Raises ValueError or OSError for what would otherwise end a run of minutes."""
    for flag in ("repeats", "threads"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine, or this build of torch, has none")
    if args.base:
        Tokenizer.load(args.base)
        LM.load(args.base)
    if args.json:
        Path(args.json).touch()


class Bench:
    def __init__(self, args):
        self.device, self.dtype = args.device, getattr(torch, args.dtype)
        self.repeats, self.threads = args.repeats, args.threads
        self.model, self.results = None, []
        self.place = ("", "")  # the shape and the part that are measured
        size, side = (1 << 28, 8192) if args.device == "cuda" else (1 << 26, 1024)
        store = torch.ones(size, device=args.device)
        reading = self.times({"": store.sum})[""]
        self.bandwidth = store.nbytes / min(reading)  # bytes a second
        a, b = torch.randn(2, side, side, device=args.device, dtype=self.dtype)
        multiplying = self.times({"": lambda: a @ b})[""]
        self.flops = 2 * side**3 / min(multiplying)  # floating-point operations a second
        cpu = f"{platform.processor() or platform.machine()} CPU"
        self.about = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
            "threads": args.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
            "dtype": args.dtype,
            "repeats": args.repeats,
            "load": os.getloadavg(),
            "bytes_per_second": self.bandwidth,
            "flops_per_second": self.flops,
        }

    def times(self, functions: dict) -> dict[str, list[float]]:
        """Seconds of each function, called in turns, after one call of each that does not count."""
        seconds = {name: [] for name in functions}
        for repeat in range(self.repeats + 1):
            for name, function in functions.items():
                spent = timed(function)
                if repeat:
                    seconds[name].append(spent)
        return seconds

    def report(self, what, seconds, note="", **more) -> None:
        median = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        self.note(f"{what:<50}{median:>8.3f}s   {spread}  {note}")
        self.results[-1] |= {"what": what, "median_s": median, "seconds": seconds, **more}

    def note(self, sentence, **more) -> None:
        shape, part = self.place
        print(f"{shape:<8}{part:<10}{sentence}", flush=True)
        self.results.append({"shape": shape, "part": part, "what": sentence, **more})

    def prompts(self, count, length=LENGTH):
        g = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (count, length), generator=g).tolist()

    # What this machine needs at the least.

    def cost(self, rows, tokens, before, head_rows) -> tuple[float, float]:
        """Bytes read and operations of a pass of `tokens` tokens in each of `rows` rows, after
        `before` positions. The output head works on `head_rows` tokens."""
        c, m = self.model.config, self.model
        head = m.head.weight.numel()
        body = sum(p.numel() for p in m.layers.parameters())
        reach = before + (tokens + 1) / 2  # positions that a token sees, on average
        flops = 2 * body * rows * tokens + 2 * head * head_rows
        flops += 4 * c.n_layers * c.n_heads * c.head_dim * reach * rows * tokens
        cache = 2 * c.n_layers * c.n_kv_heads * c.head_dim * rows * (before + tokens)
        return (body + head + cache) * self.dtype.itemsize, flops

    def floor(self, *costs) -> float:
        """Seconds of passes that may be made as one: the weights are then read once."""
        read, flops = zip(*costs)
        return max(max(read) / self.bandwidth, sum(flops) / self.flops)

    def rollout_floor(self, prompts, rows):
        steps = (self.floor(self.cost(rows, 1, LENGTH + t, rows)) for t in range(LENGTH - 1))
        return self.floor(self.cost(prompts, LENGTH, 0, prompts)) + sum(steps)

    def update_floor(self, prompts, rows):
        """The floor of an update: a forward pass with each prompt once, twice that for the backward
        pass, and AdamW, which reads weights, gradients and two moments, and writes all but the
        gradients."""
        size = sum(p.numel() for p in self.model.parameters())
        responses = self.cost(rows, LENGTH, LENGTH, rows * LENGTH)
        forward = self.floor(self.cost(prompts, LENGTH, 0, 0), responses)
        return 3 * forward + 7 * 4 * size / self.bandwidth

    # The parts.

    def rollouts(self):
        if self.device == "cuda":
            for count in (1, 8, 32):
                self.rollouts_on_a_gpu(count)
            self.kernels(lambda: generate(self.model, self.prompts(1), samples=SAMPLES, **SAMPLING))
            return
        count = PROMPTS[self.place[0]]
        prompts = self.prompts(count)
        repeated = [p for p in prompts for _ in range(SAMPLES)]
        rivals = {
            "ours": lambda: generate(self.model, prompts, samples=SAMPLES, **SAMPLING),
            "the prompt once a sample": lambda: generate(self.model, repeated, **SAMPLING),
        }
        if peer := transformers_generate(self.model, repeated, LENGTH):
            rivals["transformers"] = peer
        else:
            self.note("transformers is not installed: it is not compared")
        self.compare_rollouts(count, rivals)
        # Without a cache every step costs more than the last: four of them stand for all.
        steps = range(0, LENGTH, LENGTH // 4)
        s = self.times({"": lambda: [self.uncached_step(repeated, t) for t in steps]})[""]
        s = [x * LENGTH / len(steps) for x in s]
        self.report(f"no cache, {count} x {SAMPLES} (16 times every 16th step)", s)

    def rollouts_on_a_gpu(self, count):
        prompts = self.prompts(count)

        def ours():
            generate(self.model, prompts, samples=SAMPLES, **SAMPLING)

        eager = mock.patch.object(self.model, "compile_step", None)(ours)
        rivals = {"compiled": ours, "eager": eager}
        traces, recordings, first = RECORDER.traces, RECORDER.count, timed(ours)
        seconds = self.compare_rollouts(count, rivals)["compiled"]
        traced, recorded = RECORDER.traces - traces, RECORDER.count - recordings
        self.note(
            f"the first call took {first - statistics.median(seconds):.2f}s longer: "
            f"{traced} steps traced; {recorded} recordings in {self.repeats + 2} calls",
            first_s=first,
        )

    def compare_rollouts(self, count, rivals) -> dict[str, list[float]]:
        rows = count * SAMPLES
        floor, seconds = self.rollout_floor(count, rows), self.times(rivals)
        for what, s in seconds.items():
            share = floor / statistics.median(s)
            speed = rows * LENGTH / statistics.median(s)
            numbers = dict(tokens_per_second=speed, floor_s=floor, share_of_floor=share)
            what = f"{what}, {count} x {SAMPLES}, {LENGTH}+{LENGTH} tokens"
            self.report(
                what, s, f"{speed:,.0f} tokens/s, {share:.0%} of the floor's speed", **numbers
            )
        return seconds

    def kernels(self, function):
        """The names of the kernels that a function runs."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        names = set()
        for event in profile.events():
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            if on_gpu and not event.name.startswith(("Mem", "Activity", "Buffer")):
                names.add(event.name)
        triton = ", ".join(name for name in sorted(names) if "triton" in name.lower()) or "none"
        self.note(f"of {len(names)} kernels that ran, Triton's: {triton}", kernels=sorted(names))

    @torch.no_grad()
    def uncached_step(self, prompts, t):
        tokens = torch.tensor([p + [0] * t for p in prompts], device=self.device)
        torch.multinomial(self.model(tokens)[:, -1].float().softmax(-1), 1)

    def update(self):
        rows, width = batch_of(self.place[0])
        rollouts, peaks = rollouts_of(self.place[0]), {}
        for name in PASSES:
            try:
                peaks[name] = self.peak(name, rollouts)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.note(f"{name}, {rows} x {width} tokens: out of memory")
        passes = {name: lambda f=PASSES[name]: f(self.model, rollouts) for name in peaks}
        seconds = self.times(passes)
        for name, s in seconds.items():
            speed, peak = rows * width / statistics.median(s), peaks[name]
            what = f"{name}, {rows} x {width} tokens, forward + backward"
            note = f"{speed:,.0f} tokens/s, peak {peak / 2**20:,.0f} MB"
            self.report(what, s, note, tokens_per_second=speed, peak_bytes=peak)
        for name in seconds.keys() - {"ours"}:
            slower = statistics.median(seconds["ours"]) / statistics.median(seconds[name])
            larger = peaks["ours"] / peaks[name]
            sentence = f"ours to {name}: time {slower:.2f}, memory {larger:.2f}"
            self.note(sentence, time_ratio=slower, memory_ratio=larger)
        self.model.zero_grad(set_to_none=True)

    def peak(self, name, rollouts):
        """Bytes that a pass needs beyond weights and gradients.

        On a CPU only a process's whole memory can be measured, so the pass gets its own process.
        """
        if self.device == "cuda":
            PASSES[name](self.model, rollouts)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            PASSES[name](self.model, rollouts)
            return torch.cuda.max_memory_allocated() - before
        dtype = str(self.dtype).removeprefix("torch.")
        flags = f"--shapes {self.place[0]} --threads {self.threads} --device cpu --dtype {dtype}"
        command = [sys.executable, "-m", "tools.bench", "--peak", name, *flags.split()]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HOME)
        return int(done.stdout)

    def teacher(self):
        """16 requests of 100 tokens answered with 64, behind 1,500 tokens of exemplars or none."""
        prompts, (exemplars,) = self.prompts(16, 100), self.prompts(1, 1500)
        options = dict(max_tokens=LENGTH, stop=(), temperature=0)
        once = self.times({"": lambda: prefill(self.model, [exemplars])})[""]
        prefix, _ = prefill(self.model, [exemplars])
        rivals = {
            "no exemplars": lambda: generate(self.model, prompts, **options),
            "1,500 tokens of exemplars": lambda: generate(
                self.model, prompts, prefix=prefix, **options
            ),
        }
        seconds = self.times(rivals)
        for what, s in seconds.items():
            self.report(f"16 requests, {what}", s)
        plain, behind = (statistics.median(s) for s in seconds.values())
        ratio = (behind + statistics.median(once) / 100) / plain
        note = f"ratio over 100 calls: {ratio:.2f}"
        self.report("the exemplars, once a run", once, note, ratio=ratio)

    def step(self):
        prompts = self.prompts(PROMPTS[self.place[0]])
        optimizer = MasterAdamW(self.model.parameters(), lr=1e-6, fused=True)
        spent = {"rollouts": [], "forward and backward": [], "AdamW": []}
        places = {"rollouts": (sys.modules[__name__], "generate"), "AdamW": (optimizer, "step")}

        def step():
            with clocked(places) as clocks:
                responses, logs = generate(self.model, prompts, samples=SAMPLES, **SAMPLING)
                rollouts = []
                for i, (ids, log) in enumerate(zip(responses, logs)):
                    prompt, advantage = prompts[i // SAMPLES], 1.0 - i % 2 * 2
                    rollouts.append(
                        Rollout(prompt, ids, True, advantage=advantage, old_logprobs=log)
                    )
                updating = timed(lambda: update(self.model, optimizer, rollouts))
                clocks["forward and backward"] = updating - clocks["AdamW"]
            for name in spent:
                spent[name].append(clocks[name])

        seconds = self.times({"": step})[""]
        rows = len(prompts) * SAMPLES
        floor = self.rollout_floor(len(prompts), rows) + self.update_floor(len(prompts), rows)
        median = statistics.median(seconds)
        ratio = median / floor
        note = f"{ratio:.2f} times the floor's time"
        self.report("whole GRPO step", seconds, note, floor_s=floor, ratio=ratio)
        for name, s in spent.items():
            self.report(f"  {name}", s[1:], f"{statistics.median(s[1:]) / median:.0%}")
        if self.device != "cpu":
            return
        pair = beside_trl(self.model, prompts, SAMPLES, LENGTH, self.repeats, step)
        if pair is None:
            self.note("TRL is not installed (pip install trl): it is not compared")
            return
        ours, theirs = pair
        self.report("whole GRPO step, in turns with TRL's", ours)
        ratio = statistics.median(theirs) / statistics.median(ours)
        self.report("TRL's", theirs, f"{ratio:.2f} times the time of ours", ratio=ratio)

    def other_parts(self, args):
        """What is measured of no shape."""
        if args.startup:
            self.place = ("", "startup")
            self.startup()
        if args.base:
            for method in ("grpo", "thinktuning"):
                self.place = ("demo", method)
                self.demonstration(args.base, method)

    def startup(self):
        def run(*arguments):
            command = [sys.executable, *arguments]
            return lambda: subprocess.run(command, check=True, capture_output=True, cwd=HOME)

        commands = {
            "import torch": run("-c", "import torch"),
            "import torch, model": run("-c", "import torch, model"),
            "thinktuning.py --help": run("thinktuning.py", "--help"),
        }
        for what, s in self.times(commands).items():
            self.report(what, s)

    def demonstration(self, base, method, steps=20):
        """Where the time of the demonstration's training steps goes."""
        tokenizer, problems = Tokenizer.load(base), load_problems("wordproblems", "train")
        config = Config(**DEMO | dict(steps=steps, method=method, schedule="constant"))
        student, teacher = LM.load(base), None
        if method == "thinktuning":
            teacher = make_teacher(LM.load(base), tokenizer, config)
        kernels = {
            "forward, sampling": (LM, "forward"),
            "choosing tokens": (sampler, "sample"),
            "forward, update": (LM, "hidden"),
            "output head, update": (HeadLogprobs, "apply"),
            "backward": (torch.Tensor, "backward"),
            "AdamW": (MasterAdamW, "step"),
        }
        with clocked(kernels) as clocks:
            total = timed(lambda: train(student, tokenizer, Loop(problems, config), teacher))
        self.report(f"{steps} training steps", [total])
        for name in kernels:
            self.report(f"  {name}", [clocks[name]], f"{clocks[name] / total:.0%}")
        share = sum(clocks[name] for name in kernels) / total
        sentence = f"  in the model {share:.0%}; the rest: texts, rewards, collating, rows"
        self.note(sentence, share=share)


@contextmanager
def clocked(places: dict):
    """Seconds spent in each of the functions {name: (owner, attribute)} while the context lasts.

    A function that another one calls is counted only for the outer one.
    """
    clocks, running = dict.fromkeys(places, 0.0), []
    with ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            original = getattr(owner, attribute)

            def wrapped(*args, name=name, original=original, **kwargs):
                result = []
                if running:
                    return original(*args, **kwargs)
                running.append(name)
                clocks[name] += timed(lambda: result.append(original(*args, **kwargs)))
                running.clear()
                return result[0]

            stack.enter_context(mock.patch.object(owner, attribute, wrapped))
        yield clocks


def timed(function) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


# One micro-batch of an update, forward and backward. Gradients of earlier micro-batches are there.


def our_pass(model, rollouts, share=True):
    prepare_gradients(model)
    model.embed.sparse = True  # as grpo.update does
    tokens, mask, *_ = collate(rollouts, device=model.device)
    logprobs, _ = token_logprobs(
        model,
        tokens,
        mask,
        entropy=True,
        head_grad=model.head.weight.grad,
        shared=SharedPrompts(rollouts, model) if share else None,
    )
    logprobs[mask].mean().backward()
    model.embed.sparse = False


def full_logits_pass(model, rollouts):
    prepare_gradients(model)
    tokens, mask, *_ = collate(rollouts, device=model.device)
    with mock.patch("model.RECOMPUTE_FROM", float("inf")):
        log_p = model(tokens[:, :-1]).float().log_softmax(-1)
        with torch.no_grad():
            (log_p.exp() * log_p).sum(-1)  # the entropy
        log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)[mask].mean().backward()


def compiled_pass(model, rollouts):
    # One graph each way, of PyTorch's own kernels. torch keeps it from one call to the next.
    compiled = torch.compile(logprobs_at, backend="aot_eager", fullgraph=True)
    with mock.patch("grpo.logprobs_at", compiled):
        our_pass(model, rollouts)


PASSES = {
    "ours": our_pass,
    "the prompt once a sample": partial(our_pass, share=False),
    "full logits": full_logits_pass,
    "compiled": compiled_pass,
}


def prepare_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def model_of(shape, device, dtype):
    # The weights are drawn on the device: on a CPU those of 3b take longer than the measurements.
    with torch.device(device):
        model = LM(SHAPES[shape]).to(dtype)
    if device in RECORDING_DEVICES:
        model.compile_step = compile_step
    return model


def batch_of(shape) -> tuple[int, int]:
    """Rows and tokens of an update. Half of a row's tokens are its prompt."""
    return BATCH.get(shape, (PROMPTS[shape] * SAMPLES, 2 * LENGTH))


def rollouts_of(shape) -> list[Rollout]:
    """Of an update: SAMPLES responses to each prompt."""
    (rows, width), g = batch_of(shape), torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPES[shape].vocab_size, (rows, width), generator=g).tolist()
    first = [ids[row // SAMPLES * SAMPLES][: width // 2] for row in range(rows)]
    return [Rollout(prompt, row[width // 2 :], True) for prompt, row in zip(first, ids)]


def peak_of_update(name, shape, dtype) -> int:
    """Bytes that a pass needs at its peak beyond weights and gradients."""
    model = model_of(shape, "cpu", getattr(torch, dtype))
    rollouts = rollouts_of(shape)
    prepare_gradients(model)
    PASSES[name](model, rollouts)  # compiling, and what a first pass allocates for good
    ctypes.CDLL(None).malloc_trim(0)  # or the pass would be given what is still held of the first
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = status("VmRSS")
    PASSES[name](model, rollouts)
    return status("VmHWM") - before


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add, parts, shapes = p.add_argument, ",".join(PARTS), ",".join(SHAPES)
    add("--parts", type=some_of(PARTS), default=list(PARTS), help=f"some of {parts} (all)")
    default = ["0.5b", "3b"] if cuda else ["tiny", "135m"]
    add("--shapes", type=some_of(SHAPES), default=default, help=f"some of {shapes} ({default})")
    about = "how long the program takes to start"
    add("--startup", action=argparse.BooleanOptionalAction, default=True, help=about)
    add("--base", help="base model of a demonstration: a profile of its training steps")
    add("--repeats", type=int, default=5, help="after one that does not count (5)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (its own choice)")
    add("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    dtypes = ("float32", "bfloat16")
    add("--dtype", default="bfloat16" if cuda else "float32", choices=dtypes)
    add("--json", help="write the results there as well")
    add("--peak", choices=PASSES, help=argparse.SUPPRESS)  # in a process of its own
    return p


def some_of(known):
    """Parses a list of known names with commas between them."""

    def parse(text):
        chosen = text.split(",")
        if unknown := set(chosen) - set(known):
            names = ", ".join(sorted(unknown))
            raise argparse.ArgumentTypeError(f"{names}: choose from {', '.join(known)}")
        return chosen

    return parse


if __name__ == "__main__":
    sys.exit(main())
