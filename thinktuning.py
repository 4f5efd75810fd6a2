"""ThinkTuning from scratch: the run. Rollouts, the teacher's help, rewards, advantages, update; evaluation; command line.

    python thinktuning.py                            the demonstration: base model, GRPO, ThinkTuning, side by side
    python thinktuning.py train --model DIR --data gsm8k
    python thinktuning.py eval  --model DIR --data FILE
    python thinktuning.py ask   --model DIR "question"
    python thinktuning.py report RUN [RUN ...]       the HTML page again, or across runs

`train` below is the method of arXiv 2508.07616, in its order; the numbers in its comments are the steps in its docstring.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import torch

import report
from config import DEMO, Config, add_config_flags
from data import Problem, load_problems
from data.reward import is_correct
from data.scores import score
from data.tokenizer import Tokenizer
from grpo import Rollout, group_advantages, snapshot, update
from model import LM, generate
from record import Run, describe_help, describe_sampled, interruptible, transcripts
from teacher import Teacher, behaviour, guidance_fraction

INSTRUCTION = "Think step by step and put the final answer within \\boxed{}."
def train(student: LM, tokenizer, problems, config: Config, *, teacher: Teacher | None = None, run=None,
          validation=()) -> list[dict]:
    """Train `student` in place; returns the metrics of every step. Without a teacher this is plain GRPO.

    1 sample G rollouts of each question; 2 choose who gets help; 3 ask the teacher; 4 parse its reply strictly;
    5 augment the rollouts; 6 reward; 7 group-relative advantages; 8 snapshot π_old, loss, optimiser step.

    `run` (a Run) gets metrics and transcripts. SIGINT or SIGTERM ends it after the step in progress.
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
            sampled = sum(len(r.response) for r in rollouts)
            fraction = 0.0
            if teacher is not None:
                fraction = guidance_fraction(step, steps, config.schedule, config.p_init, config.p_min, config.eps)
            asked = []
            if fraction > 0:
                asked = teacher.guide(rollouts, config.samples, fraction, rng, config.max_tokens)  # 2-5
            for r in rollouts:
                r.reward = reward(r)  # 6
                if fraction == 0:
                    r.reward *= 1 - config.length_cost * len(r.response) / config.max_tokens
            rewards = torch.tensor([r.reward for r in rollouts]).view(-1, config.samples)
            for r, advantage in zip(rollouts, group_advantages(rewards).flatten().tolist()):
                r.advantage = advantage  # 7
            metrics |= {"reward": rewards.mean().item(), "fraction": fraction,
                        "groups_equal": (rewards.std(dim=1) == 0).float().mean().item(), **describe_help(asked, rollouts)}
            metrics |= learn(student, optimizer, rollouts, config, published, reference)  # 8
            metrics["tokens_per_second"] = sampled / (time.perf_counter() - began)
            due = step + 1 == steps or config.eval_every and (step + 1) % config.eval_every == 0
            if validation and due and not interrupted.is_set:
                scores, _ = evaluate(student, tokenizer, validation, max_tokens=config.max_tokens, rows=config.rows)
                metrics |= {f"eval_{k}": v for k, v in scores.items() if isinstance(v, float)}
            history.append(metrics)
            if run:
                run.log(metrics, steps, transcripts(rollouts, asked, tokenizer, step, config))
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


def sample_responses(model, prompts, rows, **options):
    """`generate` in slices of at most `rows` responses: lists of responses and log-probs, question-major."""
    per_slice = max(1, rows // options.get("samples", 1))
    responses, logprobs = [], []
    for start in range(0, len(prompts), per_slice):
        ids, logs = generate(model, prompts[start : start + per_slice], logprobs=True, **options)
        responses += ids
        logprobs += logs
    return responses, logprobs


def spoken(tokenizer, ids: list[int]) -> str:
    """The text of a response, without the stop token that ends a finished one."""
    return tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop else ids)


def sample_rollouts(student, tokenizer, batch, config, generator) -> list[Rollout]:
    """Step 1: G responses to each question, temperature 1, with log π_old of what was sampled."""
    prompts = [student_prompt(tokenizer, p.question) for p in batch]
    responses, logprobs = sample_responses(student, prompts, config.rows, max_tokens=config.max_tokens, stop=tokenizer.stop,
                                           samples=config.samples, temperature=config.temperature, generator=generator)
    return [Rollout(prompts[i // config.samples], ids, finished=ids[-1] in tokenizer.stop, old_logprobs=logs,
                    question=batch[i // config.samples].question, answer=batch[i // config.samples].answer,
                    text=spoken(tokenizer, ids))
            for i, (ids, logs) in enumerate(zip(responses, logprobs))]


def reward(rollout: Rollout) -> float:
    """Step 6: 1 if the response finished and its last boxed answer is right. A wrong teacher earns its student nothing."""
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
                guided_tokens="trajectory" if "trajectory" in published else config.guided_tokens,
                max_grad_norm=config.max_grad_norm, clip=config.clip, dual_clip=config.dual_clip, unlikely=config.unlikely,
                shaping=config.shaping, guards=config.guards, kl_coef=config.kl_coef, gamma_min=config.gamma_min,
                gamma_max=config.gamma_max, published="gamma" in published,
                published_dual_clip="dual-clip" in published))
    seen = {key: [r[key] for r in results if key in r] for r in results for key in r}  # a mean over no tokens is absent
    return {key: sum(values) / len(values) for key, values in seen.items()}


def evaluate(model, tokenizer, problems, *, max_tokens, samples=1, temperature=0.0, rows=256, seed=0):
    """Scores (data.scores) on `problems`, no teacher anywhere, and the (problem, text, finished) records behind them."""
    prompts = [student_prompt(tokenizer, p.question) for p in problems]
    responses, _ = sample_responses(model, prompts, rows, max_tokens=max_tokens, stop=tokenizer.stop, samples=samples,
                                    temperature=temperature, generator=torch.Generator().manual_seed(seed))
    records = [(problems[i // samples], spoken(tokenizer, ids), ids[-1] in tokenizer.stop) for i, ids in enumerate(responses)]
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
        return complain("stopped", 130)
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
        report.write_report(out)
        summary = {k: round(v, 4) for k, v in history[-1].items() if k in ("reward", "reflection_rate") or k.startswith("eval_")}
        print(f"{len(history)} steps -> {out}/model  {summary}")

    return job


def load_model(path, args):
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or no driver for it
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
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
        raise ValueError(f"{source}: no question fits into {room} tokens; "
                         f"{'raise --max-prompt' if room == config.max_prompt else 'lower --max-tokens'}")
    return kept


def prepare_eval(args):
    model, tokenizer = load_model(args.model, args)
    context = model.config.max_seq_len
    max_tokens = args.max_tokens or min(1024, context // 2)
    config = Config(max_tokens=max_tokens, max_prompt=max(1, context - max_tokens))
    problems = fitting(load_problems(args.data, args.split), model, tokenizer, config, args.data)[: args.count or None]
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)

    def job():
        scores, _ = evaluate(model, tokenizer, problems, max_tokens=max_tokens, samples=args.samples,
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
    room = model.config.max_seq_len - len(prompt)
    if room < (args.max_tokens or 1):
        raise ValueError(f"the question leaves {room} tokens of the model's context of {model.config.max_seq_len}; "
                         "shorten it or lower --max-tokens")

    def job():
        ids, shown = [], 0

        def show(rows, tokens):
            nonlocal shown
            ids.extend(t for t in tokens.tolist() if t not in tokenizer.stop)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest
                print(text[shown:], end="", flush=True)
                shown = len(text)

        generate(model, [prompt], max_tokens=args.max_tokens or min(1024, room), stop=tokenizer.stop, temperature=args.temperature,
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
    demo.add_argument("--seed", type=natural, default=0, help="of everything: pretraining, sampling, choosing, data order")
    demo.add_argument("--out", help="directory for the runs and summary.json (out/demo-SEED)")
    demo.add_argument("--floor", type=float, default=0.03, help="share of the student's pretraining texts that go on after "
                      "the answer with an unrelated remark (0.03)")
    demo.add_argument("--length-cost", type=float, default=0.0, help="what a response of the longest length costs a right answer "
                      "once the teacher is gone (0)")
    demo.add_argument("--ablate", nargs="?", const="all", choices=("all", "long", "rates", "stress"),
                      help="on this seed's base model: every variant, only the long GRPO run, learning rates, the stress regime")
    demo.add_argument("--repeats", type=int, default=3, help="training seeds of every variant of --ablate (3)")
    demo.add_argument("--quick", action="store_true", help="a smoke test of a few steps: too short to show anything")
    commands = top.add_subparsers(title="commands", metavar="train | eval | ask | report")

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
    e.add_argument("--split", default="test", help="of wordproblems or gsm8k (test)")
    e.add_argument("--count", type=natural, default=0, help="only the first so many problems; 0 is all")
    e.add_argument("--samples", type=positive, default=1, help="k, responses to each problem")
    e.add_argument("--temperature", type=from_zero, help="0 with one sample, else 1")
    e.add_argument("--rows", type=positive, default=256, help="responses sampled side by side (memory)")
    e.set_defaults(prepare=prepare_eval)

    a = commands.add_parser("ask", parents=[common], help="watch it think")
    a.add_argument("question")
    a.add_argument("--temperature", type=from_zero, default=0.0, help="0 is greedy (0)")
    a.set_defaults(prepare=prepare_ask)

    r = commands.add_parser("report", help="one HTML page of a run, or across runs")
    r.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or of a demonstration with its runs")
    r.add_argument("--out", help="file to write (report.html in RUN; of several runs, in the current directory)")
    r.set_defaults(prepare=report.prepare)
    for p in (e, a):
        p.add_argument("--max-tokens", type=positive, help="new tokens of a response (1024, or what the context leaves)")
        p.add_argument("--seed", type=natural, default=0)
    return top


def natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up (and below 10^18)")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def from_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


if __name__ == "__main__":
    from thinktuning import main as run_main  # under its own name, so that demo.py shares these classes

    sys.exit(run_main())
