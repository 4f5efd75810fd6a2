"""ThinkTuning from scratch: the run. Rollouts, the teacher's help, rewards, advantages, update; evaluation; command line.

    python thinktuning.py                            the demonstration: base model, GRPO, ThinkTuning, side by side
    python thinktuning.py train --model DIR --data gsm8k
    python thinktuning.py eval  --model DIR --data FILE
    python thinktuning.py ask   --model DIR "question"

`train` below is the method, in the order of the paper; METHOD is arXiv 2508.07616 as restated in the README.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from data import Problem, load_problems
from data.reward import is_correct
from data.scores import score
from data.tokenizer import Tokenizer
from grpo import Rollout, group_advantages, snapshot, update
from model import LM, generate
from record import Run, describe_help, describe_sampled, interruptible, transcripts
from teacher import Teacher, behaviour, guidance_fraction

INSTRUCTION = "Think step by step and put the final answer within \\boxed{}."
PUBLISHED = ("gamma", "instruction", "reencode", "cut", "seed", "dual-clip")  # README, "Notes on the published code"


def option(default, group, help, **more):
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass
class Config:
    """Every setting of a run; the defaults are the published ones (`--preset paper`)."""

    method: str = option("thinktuning", "run", "grpo leaves the teacher out", choices=("thinktuning", "grpo"))
    seed: int = option(0, "run", "of sampling, choosing and data order")
    steps: int = option(0, "run", "training steps; 0 is one epoch", least=0)
    eval_every: int = option(0, "run", "steps between evaluations while training; 0 is only at the end", least=0)
    eval_count: int = option(0, "run", "evaluate on the first so many problems; 0 is all", least=0)
    questions: int = option(128, "rollouts", "B, questions a step", least=1)
    samples: int = option(5, "rollouts", "G, rollouts a question", least=2)
    max_tokens: int = option(1024, "rollouts", "L, new tokens of a response", least=1)
    max_prompt: int = option(512, "rollouts", "tokens of a question's prompt; longer ones are dropped and counted", least=1)
    temperature: float = option(1.0, "rollouts", "of sampling while training", above=0)
    rows: int = option(128, "rollouts", "responses that are sampled side by side (memory)", least=1)
    length_cost: float = option(0.0, "rollouts", "once the teacher is gone, a right answer of n tokens earns 1 - this * n / L",
                                least=0, most=1)
    mini_batch: int = option(32, "update", "questions an optimiser step", least=1)
    epochs: int = option(1, "update", "passes over the same rollouts", least=1)
    micro_batch: int = option(16384, "update", "tokens of one forward pass (memory; changes no result)", least=1)
    learning_rate: float = option(1e-6, "update", "constant", above=0)
    weight_decay: float = option(0.01, "update", "of AdamW", least=0)
    beta1: float = option(0.9, "update", "of AdamW", least=0)
    beta2: float = option(0.999, "update", "of AdamW", least=0)
    max_grad_norm: float = option(1.0, "update", "gradient clipping", above=0)
    clip: float = option(0.2, "loss", "epsilon of PPO's clip", above=0)
    dual_clip: float = option(3.0, "loss", "c, the bound for negative advantages", above=1)
    kl_coef: float = option(0.0, "loss", "weight of the k3 KL term to the initial policy", least=0)
    shaping: str = option("aas", "loss", "weight of guided tokens", choices=("aas", "ratio", "likelihood"))
    guided_tokens: str = option("guidance", "loss", "which tokens count as guided", choices=("guidance", "trajectory"))
    unlikely: float = option(0.01, "loss", "guard (c): guided tokens of bad rollouts less likely than this are ordinary", least=0)
    gamma_min: float = option(0.001, "loss", "gamma of the best advantage")
    gamma_max: float = option(-0.001, "loss", "gamma of the worst advantage")
    guards: bool = option(True, "loss", "guards (a) and (b) of the shaped weight")
    schedule: str = option("linear", "teacher", "decay of p over the first third", choices=("constant", "linear", "cosine", "exp"))
    p_init: float = option(0.1, "teacher", "share of a group that is guided at first", least=0, most=1)
    p_min: float = option(0.01, "teacher", "and at the end of the decay", above=0, most=1)
    eps: float = option(0.05, "teacher", "the teacher goes for good when p <= eps + 0.01", least=-0.01, most=1)
    teacher_prompt: int = option(3072, "teacher", "tokens of its prompt", least=1)
    teacher_reply: int = option(1024, "teacher", "tokens of its reply", least=1)
    published: str = option("", "teacher", f"repeat the published code: all, or some of {','.join(PUBLISHED)}")

    @property
    def published_items(self) -> frozenset[str]:
        return frozenset(PUBLISHED if self.published == "all" else filter(None, self.published.split(",")))

    def check(self):
        """Raises ValueError, naming the flag, if a value is out of range."""
        for f in fields(self):
            value, limits, flag = getattr(self, f.name), f.metadata, "--" + f.name.replace("_", "-")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag} must be a finite number, not {value}")
            if limits.get("choices") and value not in limits["choices"]:
                raise ValueError(f"{flag} must be one of {', '.join(limits['choices'])}, not {value!r}")
            for bound, bad, words in (("least", lambda v, b: v < b, "at least"), ("above", lambda v, b: v <= b, "above"),
                                      ("most", lambda v, b: v > b, "at most")):
                if bound in limits and bad(value, limits[bound]):
                    raise ValueError(f"{flag} must be {words} {limits[bound]}, not {value}")
        if unknown := self.published_items - set(PUBLISHED):
            raise ValueError(f"--published does not know {', '.join(sorted(unknown))}: all, or some of {','.join(PUBLISHED)}")
        if self.p_min > self.p_init:
            raise ValueError(f"--p-min {self.p_min} is above --p-init {self.p_init}: the share of help can only fall")


DEMO = dict(steps=80, questions=16, samples=8, max_tokens=100, mini_batch=8, learning_rate=1e-4, beta2=0.95,
            teacher_prompt=180, teacher_reply=120)  # everything else is as published


def train(student: LM, tokenizer, problems, config: Config, *, teacher: Teacher | None = None, run=None,
          validation=()) -> list[dict]:
    """Train `student` in place; returns the metrics of every step. METHOD section 2, in its order.

    Without a teacher this is plain GRPO. `run` (a Run) gets metrics and transcripts. SIGINT or SIGTERM ends it after
    the step in progress.
    """
    config.check()
    published = config.published_items
    rng = random.Random(time.time_ns() if "seed" in published else config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay)
    reference = copy.deepcopy(student).requires_grad_(False) if config.kl_coef else None
    steps = config.steps or max(1, len(problems) // config.questions)
    batches = question_batches(problems, config.questions, config.seed)
    history = []
    with interruptible() as interrupted:
        for step in range(steps):
            began = time.perf_counter()
            rollouts = sample_rollouts(student, tokenizer, next(batches), config, generator)  # 1
            metrics = {"step": step, **describe_sampled(rollouts)}
            fraction = 0.0
            if teacher is not None:
                fraction = guidance_fraction(step, steps, config.schedule, config.p_init, config.p_min, config.eps)
            asked = []
            if fraction > 0:
                asked = teacher.guide(rollouts, config.samples, fraction, rng, config.max_tokens)  # 2-5
            for r in rollouts:
                r.reward = reward(r, tokenizer)  # 6
                if fraction == 0:
                    r.reward *= 1 - config.length_cost * len(r.response) / config.max_tokens
            rewards = torch.tensor([r.reward for r in rollouts]).view(-1, config.samples)
            for r, advantage in zip(rollouts, group_advantages(rewards).flatten().tolist()):
                r.advantage = advantage  # 7
            metrics |= {"reward": rewards.mean().item(), "fraction": fraction,
                        "groups_equal": (rewards.std(dim=1) == 0).float().mean().item(), **describe_help(asked, rollouts)}
            metrics |= learn(student, optimizer, rollouts, config, published, reference)  # 8
            metrics["tokens_per_second"] = sum(len(r.response) for r in rollouts) / (time.perf_counter() - began)
            last = step + 1 == steps or interrupted.is_set
            if validation and (last or config.eval_every and (step + 1) % config.eval_every == 0):
                scores, _ = evaluate(student, tokenizer, validation, max_tokens=config.max_tokens, rows=config.rows)
                metrics |= {f"eval_{k}": v for k, v in scores.items() if isinstance(v, float)}
            history.append(metrics)
            if run:
                run.log(metrics, steps, transcripts(rollouts, asked, tokenizer, step))
            if interrupted.is_set:
                break
    return history


def question_batches(problems, size, seed):
    """Batches of `size` questions for ever, every problem once before any comes again; epochs are shuffled apart."""
    rng, waiting = random.Random(f"data {seed}"), []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(problems, len(problems))
        yield waiting[:size]
        waiting = waiting[size:]


def student_prompt(tokenizer, question: str) -> list[int]:
    """What the student sees, in training and in evaluation: the question, and for a real model the answer's format."""
    content = question if tokenizer.family == "wordproblems" else f"{question} {INSTRUCTION}"
    return tokenizer.render([{"role": "user", "content": content}])


def sample_responses(model, prompts, config_rows, **options):
    """`generate` in slices of at most `config_rows` responses: lists of responses and log-probs, question-major."""
    per_slice = max(1, config_rows // options.get("samples", 1))
    responses, logprobs = [], []
    for start in range(0, len(prompts), per_slice):
        ids, logs = generate(model, prompts[start : start + per_slice], logprobs=True, **options)
        responses += ids
        logprobs += logs
    return responses, logprobs


def sample_rollouts(student, tokenizer, batch, config, generator) -> list[Rollout]:
    """Step 1: G responses to each question, temperature 1, with log π_old of what was sampled."""
    prompts = [student_prompt(tokenizer, p.question) for p in batch]
    responses, logprobs = sample_responses(student, prompts, config.rows, max_tokens=config.max_tokens, stop=tokenizer.stop,
                                           samples=config.samples, temperature=config.temperature, generator=generator)
    return [Rollout(prompts[i // config.samples], ids, finished=ids[-1] in tokenizer.stop, old_logprobs=logs,
                    question=batch[i // config.samples].question, answer=batch[i // config.samples].answer,
                    text=tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop else ids))
            for i, (ids, logs) in enumerate(zip(responses, logprobs))]


def reward(rollout: Rollout, tokenizer) -> float:
    """Step 6: 1 if the response finished and its last boxed answer is right. A wrong teacher earns its student nothing."""
    if rollout.guided_from is not None:
        rollout.text = tokenizer.decode([t for t in rollout.response if t not in tokenizer.stop])
    return float(rollout.finished and is_correct(rollout.text, rollout.answer))


def learn(student, optimizer, rollouts, config, published, reference) -> dict[str, float]:
    """Step 8: snapshot log π_old of every token, then the mini-batches; returns their mean metrics."""
    snapshot(student, rollouts, config.micro_batch)
    size = config.mini_batch * config.samples
    results = []
    for _ in range(config.epochs):
        for start in range(0, len(rollouts), size):
            results.append(update(
                student, optimizer, rollouts[start : start + size], micro_batch=config.micro_batch, reference=reference,
                guided_tokens=config.guided_tokens, max_grad_norm=config.max_grad_norm, clip=config.clip,
                dual_clip=config.dual_clip, unlikely=config.unlikely, shaping=config.shaping, guards=config.guards, kl_coef=config.kl_coef,
                gamma_min=config.gamma_min, gamma_max=config.gamma_max, published="gamma" in published,
                published_dual_clip="dual-clip" in published))
    seen = {key: [r[key] for r in results if key in r] for r in results for key in r}  # a mean over no tokens is absent
    return {key: sum(values) / len(values) for key, values in seen.items()}


def evaluate(model, tokenizer, problems, *, max_tokens, samples=1, temperature=0.0, rows=256, seed=0):
    """Scores (data.scores) on `problems`, no teacher anywhere, and the (problem, text, finished) records behind them."""
    prompts = [student_prompt(tokenizer, p.question) for p in problems]
    responses, _ = sample_responses(model, prompts, rows, max_tokens=max_tokens, stop=tokenizer.stop, samples=samples,
                                    temperature=temperature, generator=torch.Generator().manual_seed(seed))
    records = [(problems[i // samples], tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop else ids),
                ids[-1] in tokenizer.stop) for i, ids in enumerate(responses)]
    scores = score(records, samples)
    scores["mean_length"] = sum(map(len, responses)) / len(responses)
    scores["behaviours"] = dict(Counter(filter(None, (behaviour(text) for _, text, _ in records))))
    return scores, records


# The command line. Each command is prepared first (everything that bad input can break) and then run.

def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        job = args.prepare(args)
    except (ValueError, OSError) as error:
        return complain(error, 2)
    try:
        job()
    except (OSError, RunFailed, torch.OutOfMemoryError) as error:
        return complain(error, 1)
    except KeyboardInterrupt:
        return complain("stopped before there was anything to save", 130)
    return 0


class RunFailed(Exception):
    """The run cannot go on; the message says what was seen."""


def complain(error, status: int) -> int:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'writing'}: {error.strerror}"
    if isinstance(error, torch.OutOfMemoryError):
        error = "out of memory: lower --rows (sampling) or --micro-batch (update)"
    print(f"error: {error}", file=sys.stderr)
    return status


def prepare_train(args):
    config = Config(**{**(DEMO if args.preset == "demo" else {}), **{f.name: getattr(args, f.name) for f in fields(Config)
                                                                     if hasattr(args, f.name)}})
    config.check()
    out = Path(args.out or f"out/{config.method}-{config.seed}")
    if (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} already holds a run: give another directory with --out")
    student, tokenizer = load_model(args.model, args)
    problems = fitting(load_problems(args.data, "train"), student, tokenizer, config, args.data)
    validation = []
    if args.eval_data:
        validation = fitting(load_problems(args.eval_data, "test"), student, tokenizer, config, args.eval_data)
        validation = validation[: config.eval_count or None]
    teacher = None
    if config.method == "thinktuning":
        model, teacher_tokenizer = load_model(args.teacher or args.model, args)
        teacher = make_teacher(model, teacher_tokenizer, config)
    run = Run(out, {"model": args.model, "data": args.data, **asdict(config)}, config.method)

    def job():
        history = train(student, tokenizer, problems, config, teacher=teacher, run=run, validation=validation)
        student.save(out / "model", tokenizer)
        run.close()
        summary = {k: round(v, 4) for k, v in history[-1].items() if k in ("reward", "reflection_rate") or k.startswith("eval_")}
        print(f"{len(history)} steps -> {out}/model  {summary}")

    return job


def load_model(path, args):
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.load(path)
    model = LM.load(path, device, getattr(torch, args.dtype))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {model.config.vocab_size}")
    return model, tokenizer


def make_teacher(model, tokenizer, config: Config) -> Teacher:
    return Teacher(model, tokenizer, max_tokens=config.teacher_reply, max_prompt=config.teacher_prompt, rows=config.rows,
                   instruction=INSTRUCTION, published=config.published_items)


def fitting(problems: list[Problem], model, tokenizer, config, source) -> list[Problem]:
    """The problems whose prompt leaves room for an answer; says how many were dropped."""
    room = min(config.max_prompt, model.config.max_seq_len - config.max_tokens)
    kept = [p for p in problems if len(student_prompt(tokenizer, p.question)) <= room]
    if len(kept) < len(problems):
        print(f"{source}: dropped {len(problems) - len(kept)} of {len(problems)} questions longer than {room} tokens")
    if not kept:
        raise ValueError(f"{source}: no question fits into {room} tokens; raise --max-prompt or lower --max-tokens")
    return kept


def prepare_eval(args):
    model, tokenizer = load_model(args.model, args)
    config = Config(max_tokens=args.max_tokens)
    problems = fitting(load_problems(args.data, args.split), model, tokenizer, config, args.data)[: args.count or None]
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)

    def job():
        scores, _ = evaluate(model, tokenizer, problems, max_tokens=args.max_tokens, samples=args.samples,
                             temperature=temperature, rows=args.rows, seed=args.seed)
        print(f"{len(problems)} problems, {args.samples} samples each, temperature {temperature:g}")
        for key, value in scores.items():
            if not key.endswith("_se"):
                error = f" ± {scores[key + '_se']:.4f}" if key + "_se" in scores else ""
                print(f"{key:<30} {value:.4f}{error}" if isinstance(value, float) else f"{key:<30} {value}")

    return job


def prepare_ask(args):
    model, tokenizer = load_model(args.model, args)
    prompt = student_prompt(tokenizer, args.question)
    if len(prompt) + args.max_tokens > model.config.max_seq_len:
        raise ValueError(f"the question and --max-tokens {args.max_tokens} exceed the model's context of {model.config.max_seq_len}")

    def job():
        ids, shown = [], 0

        def show(rows, tokens):
            nonlocal shown
            ids.extend(t for t in tokens.tolist() if t not in tokenizer.stop)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest
                print(text[shown:], end="", flush=True)
                shown = len(text)

        generate(model, [prompt], max_tokens=args.max_tokens, stop=tokenizer.stop, temperature=args.temperature,
                 generator=torch.Generator().manual_seed(args.seed), on_step=show)
        print()

    return job


def prepare_demo(args):
    from demo import prepare  # the demonstration builds on this module

    return prepare(args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="thinktuning.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.set_defaults(prepare=prepare_demo)
    demo = top.add_argument_group("the demonstration")
    demo.add_argument("--seed", type=int, default=0, help="of everything: pretraining, sampling, choosing, data order")
    demo.add_argument("--out", help="directory for the runs and summary.json (out/demo-SEED)")
    demo.add_argument("--floor", type=float, default=0.03, help="share of the student's pretraining texts that go on after "
                      "the answer with an unrelated remark (0.03)")
    demo.add_argument("--length-cost", type=float, default=0.0, help="what a response of the longest length costs a right answer "
                      "once the teacher is gone; at 0.4 reflection becomes selective (0)")
    demo.add_argument("--ablate", nargs="?", const="all", choices=("all", "stress", "rates"),
                      help="compare variants, the stress regime, or learning rates, on this seed's base model")
    demo.add_argument("--repeats", type=int, default=3, help="training seeds of every variant of --ablate (3)")
    demo.add_argument("--quick", action="store_true", help="a smoke test of a few steps: too short to show anything")
    commands = top.add_subparsers(title="commands", metavar="train | eval | ask")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", required=True, help="directory with config.json, model.safetensors and a tokenizer")
    common.add_argument("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    common.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))

    t = commands.add_parser("train", parents=[common], help="train a model directory on problems")
    t.add_argument("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file of questions and answers")
    t.add_argument("--eval-data", help="problems to evaluate on, likewise")
    t.add_argument("--teacher", help="another model directory for the teacher (the student's initial weights)")
    t.add_argument("--out", help="run directory (out/METHOD-SEED)")
    t.add_argument("--preset", default="paper", choices=("paper", "demo"), help="where the settings below start from")
    t.set_defaults(prepare=prepare_train)
    add_config_flags(t)

    e = commands.add_parser("eval", parents=[common], help="accuracy, mean@k, pass@k, maj@k, reflection, standard errors")
    e.add_argument("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file")
    e.add_argument("--split", default="test")
    e.add_argument("--count", type=natural, default=0, help="only the first so many problems; 0 is all")
    e.add_argument("--samples", type=positive, default=1, help="k, responses to each problem")
    e.add_argument("--temperature", type=float, help="0 with one sample, else 1")
    e.add_argument("--rows", type=positive, default=256, help="responses sampled side by side (memory)")
    e.set_defaults(prepare=prepare_eval)

    a = commands.add_parser("ask", parents=[common], help="watch it think")
    a.add_argument("question")
    a.add_argument("--temperature", type=float, default=0.0)
    a.set_defaults(prepare=prepare_ask)
    for p in (e, a):
        p.add_argument("--max-tokens", type=positive, default=1024, help="new tokens of a response")
        p.add_argument("--seed", type=int, default=0)
    return top


def add_config_flags(p):
    """One flag a field of Config; absent ones stay absent, so that the preset decides."""
    groups = {}
    for f in fields(Config):
        m = f.metadata
        group = groups.setdefault(m["group"], p.add_argument_group(m["group"]))
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default), "choices": m.get("choices")}
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=f"{m['help']} ({f.default})", **kind)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


if __name__ == "__main__":
    from thinktuning import main as run_main  # under its own name, so that demo.py shares these classes

    sys.exit(run_main())
