"""Speed and memory of this program on this machine: a table, and the same as JSON.

    python bench.py                                     everything that this machine can run in some minutes
    python bench.py --parts rollouts,step --shapes tiny --repeats 3

Weights are random and responses of fixed length: the work is that of a real model of the shape. What is compared is
measured in turns within one run. A floor is the time below which this machine cannot do the work however it is
programmed: for each pass the larger of (weights and cache) / memory bandwidth and floating-point operations / matrix rate,
both rates measured here first, at full size and with nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date

import torch

from grpo import Rollout, token_logprobs, update
from model import LM, ModelConfig, generate, prefill

SHAPES = {
    "tiny": dict(vocab_size=512, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=384, tie_embeddings=True),
    "135m": dict(vocab_size=49_152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, tie_embeddings=True),
    "0.5b": dict(vocab_size=151_936, dim=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, ffn_dim=4864, tie_embeddings=True,
                 qkv_bias=True),
    "3b": dict(vocab_size=128_256, dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, head_dim=128, ffn_dim=8192, tie_embeddings=True),
    "quarter": dict(vocab_size=37_984, dim=224, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=16, ffn_dim=1216, tie_embeddings=True,
                    qkv_bias=True),  # 0.5b with every width a quarter: for the memory of an update in a quick test
}
PROMPTS = {"tiny": 8, "135m": 2, "0.5b": 2, "3b": 8, "quarter": 2}
SAMPLES, LENGTH = 8, 64  # samples a prompt; tokens of a prompt, and of a response
PARTS = ("rollouts", "update", "teacher", "step", "startup")


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_of_update(args.peak, args.shapes[0], args.device, args.dtype))
        return 0
    bench = Bench(args)
    print(f"{bench.about['device']}, {args.threads} threads, torch {torch.__version__}, {args.dtype}; "
          f"{bench.bandwidth / 1e9:.1f} GB/s, {bench.rate / 1e9:.0f} GFLOP/s; load {os.getloadavg()[0]:.1f}")
    print(f"{'shape':<9}{'part':<10}{'what':<44}{'median':>10}  {'spread':<19}")
    for shape in args.shapes:
        bench.model = LM(ModelConfig(**SHAPES[shape], max_seq_len=4096)).to(args.device, getattr(torch, args.dtype))
        for part in args.parts:
            if part != "startup":
                getattr(bench, part)(shape)
    if "startup" in args.parts:
        bench.startup()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**bench.about, "results": bench.results}, file, indent=1)
    return 0


class Bench:
    def __init__(self, args):
        self.device, self.dtype, self.repeats, self.threads = args.device, getattr(torch, args.dtype), args.repeats, args.threads
        self.model, self.results = None, []
        size = 1 << (28 if args.device == "cuda" else 26)
        store, square = torch.ones(size, device=args.device), torch.randn(2, 1024, 1024, device=args.device, dtype=self.dtype)
        self.bandwidth = store.nbytes / min(self.times({"read": store.sum})["read"])
        self.rate = 2 * 1024**3 / min(self.times({"multiply": lambda: square[0] @ square[1]})["multiply"])
        name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
        self.about = {"device": name, "threads": args.threads, "torch": torch.__version__, "python": platform.python_version(),
                      "date": date.today().isoformat(), "dtype": args.dtype, "repeats": args.repeats, "load": os.getloadavg(),
                      "bytes_per_second": self.bandwidth, "flops_per_second": self.rate}

    def times(self, functions: dict) -> dict[str, list[float]]:
        """Seconds of each function, called in turns, after one call of each that does not count."""
        seconds = {name: [] for name in functions}
        for repeat in range(self.repeats + 1):
            for name, function in functions.items():
                began = time.perf_counter()
                function()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    seconds[name].append(time.perf_counter() - began)
        return seconds

    def report(self, shape, part, what, seconds, note="", **more):
        median = statistics.median(seconds)
        print(f"{shape:<9}{part:<10}{what:<44}{median:>9.3f}s  {min(seconds):.3f} to {max(seconds):.3f}  {note}", flush=True)
        self.results.append({"shape": shape, "part": part, "what": what, "median_s": median, "seconds": seconds, **more})
        return median

    def prompts(self, count, length=LENGTH):
        g = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (count, length), generator=g).tolist()

    # What this machine needs at the least.

    def pass_floor(self, rows, tokens, before, head_rows):
        """Seconds of one pass of `tokens` tokens in each of `rows` rows behind `before` positions; `head_rows` see the head."""
        c, m = self.model.config, self.model
        head = m.head.weight.numel()
        body = sum(p.numel() for p in m.layers.parameters())
        reach = before + (tokens + 1) / 2  # positions that a token sees, on average
        flops = 2 * body * rows * tokens + 2 * head * head_rows + 4 * c.n_layers * c.n_heads * c.head_dim * reach * rows * tokens
        cache = 2 * c.n_layers * c.n_kv_heads * c.head_dim * rows * (before + tokens)
        moved = (body + head + cache) * torch.finfo(self.dtype).bits // 8
        return max(moved / self.bandwidth, flops / self.rate)

    def rollout_floor(self, prompts, rows):
        return self.pass_floor(prompts, LENGTH, 0, prompts) + sum(self.pass_floor(rows, 1, LENGTH + t, rows) for t in range(LENGTH - 1))

    def update_floor(self, rows, tokens, response):
        """Forward, and twice that backward; AdamW reads weight, gradient and two moments and writes all but the gradient."""
        size = sum(p.numel() for p in self.model.parameters())
        return 3 * self.pass_floor(rows, tokens, 0, rows * response) + 7 * 4 * size / self.bandwidth

    # The parts.

    def rollouts(self, shape):
        prompts = self.prompts(PROMPTS[shape])
        rows = len(prompts) * SAMPLES
        repeated = [p for p in prompts for _ in range(SAMPLES)]
        options = dict(max_tokens=LENGTH, stop=(), logprobs=True)
        seconds = self.times({"ours": lambda: generate(self.model, prompts, samples=SAMPLES, **options),
                              "prompt once a sample": lambda: generate(self.model, repeated, **options)})
        floor = self.rollout_floor(len(prompts), rows)
        for what, s in seconds.items():
            median = statistics.median(s)
            self.report(shape, "rollouts", f"{what}, {len(prompts)} x {SAMPLES}, {LENGTH}+{LENGTH} tokens", s,
                        f"{rows * LENGTH / median:,.0f} tokens/s, {floor / median:.0%} of the floor",
                        tokens_per_second=rows * LENGTH / median, floor_s=floor, share_of_floor=floor / median)
        steps = range(0, LENGTH, LENGTH // 4)  # without a cache every step costs more than the last: four of them stand for all
        s = self.times({"": lambda: [self.uncached_step(repeated, t) for t in steps]})[""]
        self.report(shape, "rollouts", "no cache (every 16th step, times 16)", [x * LENGTH / len(steps) for x in s])

    @torch.no_grad()
    def uncached_step(self, prompts, t):
        tokens = torch.tensor([p + [0] * t for p in prompts], device=self.device)
        torch.multinomial(self.model(tokens)[:, -1].float().softmax(-1), 1)

    def update(self, shape):
        rows, width = (4, 128) if shape in ("0.5b", "quarter") else (PROMPTS[shape] * SAMPLES, 2 * LENGTH)
        width = 32 if shape == "quarter" else width
        tokens = torch.tensor(self.prompts(rows, width + 1), device=self.device)
        seconds = self.times({name: lambda f=f: f(self.model, tokens) for name, f in PASSES.items()})
        ours, full = (statistics.median(s) for s in seconds.values())
        peaks = {name: int(subprocess.run(
            [sys.executable, __file__, "--peak", name, "--shapes", shape, "--threads", str(self.threads), "--device", self.device,
             "--dtype", str(self.dtype).removeprefix("torch.")], check=True, capture_output=True, text=True).stdout) for name in PASSES}
        for name, s in seconds.items():
            self.report(shape, "update", f"{name}, {rows} x {width} tokens, forward and backward", s,
                        f"{rows * width / statistics.median(s):,.0f} tokens/s, peak {peaks[name] / 2**20:,.0f} MB",
                        tokens_per_second=rows * width / statistics.median(s), peak_bytes=peaks[name])
        print(f"{'':<19}ours to full logits: time {ours / full:.2f}, memory {peaks['ours'] / peaks['full logits']:.2f}")
        self.model.zero_grad(set_to_none=True)

    def teacher(self, shape):
        """16 requests of 100 tokens answered with 64, behind 1,500 tokens of exemplars or none."""
        prompts, (exemplars,) = self.prompts(16, 100), self.prompts(1, 1500)
        options = dict(max_tokens=LENGTH, stop=(), temperature=0)
        (once,) = self.times({"": lambda: prefill(self.model, [exemplars])}).values()
        prefix, _ = prefill(self.model, [exemplars])
        seconds = self.times({"no exemplars": lambda: generate(self.model, prompts, **options),
                              "1,500 tokens of exemplars": lambda: generate(self.model, prompts, prefix=prefix, **options)})
        plain, behind = (statistics.median(s) for s in seconds.values())
        for what, s in seconds.items():
            self.report(shape, "teacher", f"16 requests, {what}", s)
        amortised = behind + statistics.median(once) / 100
        self.report(shape, "teacher", "the exemplars themselves, once a run", once,
                    f"ratio over a run of 100 calls: {amortised / plain:.2f}", ratio=amortised / plain)

    def step(self, shape):
        prompts = self.prompts(PROMPTS[shape])
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        spent = {"rollouts": [], "forward and backward": [], "AdamW": []}

        def step():
            began = time.perf_counter()
            responses, logs = generate(self.model, prompts, max_tokens=LENGTH, stop=(), samples=SAMPLES, logprobs=True)
            sampled = time.perf_counter()
            rollouts = [Rollout(prompts[i // SAMPLES], ids, True, advantage=1.0 - i % 2 * 2, old_logprobs=log)
                        for i, (ids, log) in enumerate(zip(responses, logs))]
            stepping = [0.0]
            apply, optimizer.step = optimizer.step, lambda: stepping.__setitem__(0, timed(apply))
            update(self.model, optimizer, rollouts)
            optimizer.step = apply
            updated = time.perf_counter()
            for name, s in zip(spent, (sampled - began, updated - sampled - stepping[0], stepping[0])):
                spent[name].append(s)

        (seconds,) = self.times({"": step}).values()
        rows = len(prompts) * SAMPLES
        floor = self.rollout_floor(len(prompts), rows) + self.update_floor(rows, 2 * LENGTH, LENGTH)
        median = statistics.median(seconds)
        self.report(shape, "step", "whole GRPO step", seconds, f"{median / floor:.2f} times the floor", floor_s=floor, ratio=median / floor)
        for name, s in spent.items():
            self.report(shape, "step", f"  {name}", s[1:], f"{statistics.median(s[1:]) / median:.0%}")

    def startup(self):
        def run(*arguments):
            return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

        seconds = self.times({"import torch": run("-c", "import torch"), "import torch, model": run("-c", "import torch, model"),
                              "thinktuning.py --help": run("thinktuning.py", "--help")})
        for what, s in seconds.items():
            self.report("", "startup", what, s)


def timed(function) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


# One micro-batch of an update, forward and backward, the gradients of earlier micro-batches being there already.

def our_pass(model, tokens):
    prepare_gradients(model)
    logprobs, _ = token_logprobs(model, tokens, entropy=True, head_grad=model.head.weight.grad)
    logprobs.mean().backward()


def full_logits_pass(model, tokens):
    prepare_gradients(model)
    log_p = model(tokens[:, :-1]).float().log_softmax(-1)
    with torch.no_grad():
        (log_p.exp() * log_p).sum(-1)  # the entropy
    log_p.gather(-1, tokens[:, 1:, None]).mean().backward()


PASSES = {"ours": our_pass, "full logits": full_logits_pass}


def prepare_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def peak_of_update(name, shape, device, dtype) -> int:
    """Bytes that a pass needs at its peak beyond weights and gradients (an optimizer's state would stand beside them)."""
    model = LM(ModelConfig(**SHAPES[shape], max_seq_len=4096)).to(device, getattr(torch, dtype))
    rows, width = (4, 32) if shape == "quarter" else (4, 128)
    tokens = torch.randint(SHAPES[shape]["vocab_size"], (rows, width + 1), device=device)
    prepare_gradients(model)
    if device == "cuda":
        PASSES[name](model, tokens)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        PASSES[name](model, tokens)
        return torch.cuda.max_memory_allocated() - before
    PASSES[name](model, tokens[:1, :9])  # what a first pass allocates for good
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew from here
    before = status("VmRSS")
    PASSES[name](model, tokens)
    return status("VmHWM") - before


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(key)).split()[1])


def parser() -> argparse.ArgumentParser:
    def names(known):
        def parse(text):
            chosen = text.split(",")
            if unknown := set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
            return chosen
        return parse

    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", type=names(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)} (all)")
    p.add_argument("--shapes", type=names(SHAPES), default=["0.5b", "3b"] if cuda else ["tiny", "135m"],
                   help=f"some of {','.join(SHAPES)} (tiny,135m; with a GPU 0.5b,3b)")
    p.add_argument("--repeats", type=int, default=5, help="of each measurement, after one that does not count (5)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (as many as it takes by itself)")
    p.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=("float32", "bfloat16"))
    p.add_argument("--json", help="write the results there as well")
    p.add_argument("--peak", choices=PASSES, help=argparse.SUPPRESS)  # in a process of its own
    return p


if __name__ == "__main__":
    sys.exit(main())
