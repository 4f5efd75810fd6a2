"""ThinkTuning from scratch: the run. Rollouts, the teacher's help, rewards, advantages, update; evaluation.

    python thinktuning.py                            the demonstration: base model, GRPO, ThinkTuning, side by side
    python thinktuning.py --preset mentor            the novelty test: a habit that the student hardly ever samples
    python thinktuning.py train --model DIR --data gsm8k
    python thinktuning.py eval  --model DIR --data FILE
    python thinktuning.py ask   --model DIR "question"
    python thinktuning.py report RUN [RUN ...]       the HTML page again, or across runs

`train` below is the method of arXiv 2508.07616, in its order; the numbers in its comments are the steps in its docstring.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from run.cli import parse_args

    ARGS = parse_args()

import argparse
import copy
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data import SPLITS, Problem, load_problems
from data.exemplars import behaviour
from data.files import read_json
from data.grading import Grader
from data.prompts import spoken, student_prompt
from data.reward import equal, is_correct
from data.scores import score
from data.tokenizer import Tokenizer
from demo import command as demonstration
from grpo import MasterAdamW, Rollout, group_advantages, snapshot, update
from model import LM
from run import sinks
from run.cli import parse_args
from run.config import KEPT, Config, RunFailed, check_used, chosen, told_longer
from run.errors import run_command
from run.loading import device_and_dtype, fitting, load_model
from run.record import Run, describe_help, describe_sampled, steps_without_checkpoint
from run.screen import interruptible
from run.world import World
from sampler import RECORDER, generate
from show import ask, plan, report
from show.transcripts import transcripts
from teacher import Asked, Teacher, guidance_fraction, make_teacher

FAULTS = 10  # steps in a row without a finite gradient

Metrics = dict[str, Any]  # numbers by name; `behaviours` counts by name
Record = tuple[Problem, str, bool]  # the problem, what was said, whether it finished


def train(student: LM, tokenizer: Tokenizer, problems: Sequence[Problem], config: Config, *, teacher: Teacher | None = None,
          run: Run | None = None, validation: Sequence[Problem] = (), world: World = World(),
          bonus: Callable[[Rollout], float] = lambda rollout: 0.0) -> list[Metrics]:
    """Train `student` in place; returns the metrics of every step. Without a teacher this is plain GRPO.

    1 sample G rollouts of each question; 2 choose who gets help; 3 ask the teacher; 4 parse its reply strictly;
    5 augment the rollouts; 6 reward; 7 group-relative advantages; 8 snapshot π_old, loss, optimiser step.

    `run` (a Run) gets metrics, transcripts and checkpoints, and knows where to go on. SIGINT or SIGTERM ends it after the
    step in progress. Raises RunFailed when FAULTS steps in a row had no finite gradient. `world`: the processes that take
    part; afterwards the student is in parts, one a process. `bonus`: what a rollout earns beside its answer (mentor.py).
    """
    config.check()
    published = config.published_items
    student.recompute = config.recompute
    reference = initial_policy(student, teacher) if config.kl_coef else None
    world.shard(student)
    optimizer = MasterAdamW(student.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2),
                            weight_decay=config.weight_decay, fused=True)
    steps = config.steps or max(1, len(problems) // config.questions)
    done, history = run.restore(student, optimizer) if run else (0, [])
    with interruptible() as interrupted:
        def stopped() -> bool:  # a signal to one process counts for all, who else would wait for one another
            return any(world.gather([interrupted.is_set]))

        for step in range(done, steps):
            began = time.perf_counter()
            batch = questions_of_step(problems, config.questions, config.seed, step)
            generator, rng = seeds_of_step(config.seed, step, published, world.rank)
            rollouts = world.gather(
                sample_rollouts(world.whole(student), tokenizer, world.share(batch), config, generator))  # 1
            metrics = {"step": step, **describe_sampled(rollouts)}
            sampled = sum(len(r.response) for r in rollouts)
            fraction = 0.0
            if teacher is not None:
                fraction = guidance_fraction(step, config.schedule_steps or steps, config.schedule,
                                             config.p_init, config.p_min, config.eps)
            asked: list[Asked] = []
            if teacher is not None and fraction > 0:
                asked = teacher.guide(rollouts, tokenizer, config.samples, fraction, rng, config.max_tokens, world)  # 2-5
            rewards = rate(rollouts, config, fraction, bonus)  # 6-7
            metrics |= {"reward": rewards.mean().item(), "fraction": fraction,
                        "groups_equal": (rewards.std(dim=1) == 0).float().mean().item(), **describe_help(asked, rollouts)}
            metrics |= learn(student, optimizer, rollouts, config, published, reference, world)  # 8
            metrics["tokens_per_second"] = sampled / (time.perf_counter() - began)
            due = step + 1 == steps or config.eval_every and (step + 1) % config.eval_every == 0
            if due and teacher is not None and world.is_first:
                tell_if_mute(teacher, [*history, metrics])
            if validation and due and not stopped():
                scores, _ = evaluate(student, tokenizer, validation, max_tokens=config.max_tokens, rows=config.rows, world=world)
                metrics |= {f"eval_{k}": v for k, v in scores.items() if isinstance(v, float)}
            history.append(metrics)
            if run:
                run.log(metrics, steps, transcripts(rollouts, asked, tokenizer, step, config))
            stop = stopped()
            if run and config.save_every and ((step + 1) % config.save_every == 0 or stop or step + 1 == steps):
                run.save(step + 1, student, optimizer)
            if all(m["skipped"] == 1 for m in history[-FAULTS:]) and len(history) >= FAULTS:
                raise RunFailed(f"{FAULTS} steps in a row had a gradient that is not finite (loss {metrics['loss']:.3g}, "
                                f"gradient norm {metrics['grad_norm']:.3g}), and nothing was learned in them: "
                                "start anew with a lower learning rate (of train: --learning-rate, another --out)")
            if stop:
                break
    return history


def initial_policy(student: LM, teacher: Teacher | None) -> LM:
    """A frozen copy of the student as it is: the teacher's model itself where that is the same function of ids."""
    if teacher is not None and student.config == teacher.model.config:
        ours, theirs = student.state_dict(), teacher.model.state_dict()
        alike = (x.dtype == theirs[k].dtype and torch.equal(x, theirs[k]) for k, x in ours.items())
        if ours.keys() == theirs.keys() and all(alike):
            return teacher.model
    return copy.deepcopy(student).requires_grad_(False)


def tell_if_mute(teacher: Teacher, history: list[Metrics]) -> None:
    """A teacher of whom hardly anything is understood teaches nothing: say so, with its parse rate."""
    asked, parsed = (sum(m[key] for m in history) for key in ("teacher_asked", "teacher_parsed"))
    if asked and parsed < asked / 10:
        print(f"the teacher's replies: {parsed} of {asked} had the asked form; {teacher.cut} ran into --teacher-reply, "
              f"{teacher.dropped} requests were longer than --teacher-prompt")


def questions_of_step(problems: Sequence[Problem], size: int, seed: int, step: int) -> list[Problem]:
    """A step's questions: every problem once before any comes again, and each epoch in an order of its own."""
    n, places = len(problems), range(step * size, (step + 1) * size)
    orders = {epoch: random.Random(f"data {seed} {epoch}").sample(problems, n) for epoch in {i // n for i in places}}
    return [orders[i // n][i % n] for i in places]


def seeds_of_step(seed: int, step: int, published: frozenset[str] = frozenset(),
                  rank: int = 0) -> tuple[torch.Generator, random.Random]:
    """The random streams of a step: a process's own for sampling, everybody's for choosing.

    They depend on nothing before the step, so that a resumed run has them too.
    """
    choosing = time.time_ns() if "seed" in published else f"choosing {seed} {step}"
    sampling = f"sampling {seed} {step}" + f" {rank}" * (rank > 0)
    return torch.Generator().manual_seed(random.Random(sampling).getrandbits(63)), random.Random(choosing)


def sample_rollouts(student: LM, tokenizer: Tokenizer, batch: Sequence[Problem], config: Config,
                    generator: torch.Generator) -> list[Rollout]:
    """Step 1: G responses to each question, with log π_old of what was sampled."""
    prompts = [student_prompt(tokenizer, p.question) for p in batch]
    responses, logprobs = generate(student, prompts, max_tokens=config.max_tokens, stop=tokenizer.stop, samples=config.samples,
                                   temperature=config.temperature, generator=generator, rows=config.rows, logprobs=True)
    return [Rollout(prompts[i // config.samples], ids, finished=ids[-1] in tokenizer.stop, old_logprobs=logs,
                    question=batch[i // config.samples].question, answer=batch[i // config.samples].answer,
                    text=spoken(tokenizer, ids))
            for i, (ids, logs) in enumerate(zip(responses, logprobs))]


def reward(rollout: Rollout) -> float:
    """Step 6: 1 if the response finished and its last boxed answer is right. A wrong teacher earns its student nothing."""
    return float(rollout.finished and is_correct(rollout.text, rollout.answer))


def rate(rollouts: list[Rollout], config: Config, fraction: float, bonus: Callable[[Rollout], float]) -> torch.Tensor:
    """Steps 6 and 7: every rollout's reward and advantage; returns the rewards, (Q, G)."""
    for r in rollouts:
        r.reward = reward(r) + bonus(r)
        if fraction == 0:
            r.reward *= 1 - config.length_cost * len(r.response) / config.max_tokens
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, config.samples)
    for r, advantage in zip(rollouts, group_advantages(rewards).flatten().tolist()):
        r.advantage = advantage
    return rewards


def learn(student: LM, optimizer: MasterAdamW, rollouts: list[Rollout], config: Config, published: frozenset[str],
          reference: LM | None, world: World = World()) -> dict[str, float]:
    """Step 8: snapshot log π_old of every token, then the mini-batches; returns their mean metrics."""
    snapshot(student, rollouts, config.micro_batch, world, config.temperature)
    size = config.mini_batch * config.samples
    results = []
    for _ in range(config.epochs):
        for start in range(0, len(rollouts), size):
            results.append(update(
                student, optimizer, rollouts[start : start + size], micro_batch=config.micro_batch, reference=reference,
                world=world, temperature=config.temperature,
                guided_tokens="trajectory" if "trajectory" in published else config.guided_tokens,
                max_grad_norm=config.max_grad_norm, clip=config.clip, dual_clip=config.dual_clip, unlikely=config.unlikely,
                shaping=config.shaping, guards=config.guards, kl_coef=config.kl_coef, gamma_min=config.gamma_min,
                gamma_max=config.gamma_max, published="gamma" in published,
                published_dual_clip="dual-clip" in published))
    seen = {key: [r[key] for r in results if key in r] for r in results for key in r}  # a mean over no tokens is absent
    return {key: sum(values) / len(values) for key, values in seen.items()}


def evaluate(model: LM, tokenizer: Tokenizer, problems: Sequence[Problem], *, max_tokens: int, samples: int = 1,
             temperature: float = 0.0, rows: int = 256, seed: int = 0, equal: Callable[[str, str], bool] = equal,
             world: World = World()) -> tuple[Metrics, list[Record]]:
    """Scores (data.scores) on `problems`, no teacher anywhere, and the (problem, text, finished) records behind them."""
    prompts = [student_prompt(tokenizer, p.question) for p in world.share(problems)]
    responses = generate(world.whole(model), prompts, max_tokens=max_tokens, stop=tokenizer.stop, samples=samples, rows=rows,
                         temperature=temperature, generator=torch.Generator().manual_seed(seed))
    responses = world.gather(responses)
    records = [(problems[i // samples], spoken(tokenizer, ids), ids[-1] in tokenizer.stop) for i, ids in enumerate(responses)]
    scores = score(records, samples, equal)
    scores["mean_length"] = sum(map(len, responses)) / len(responses)
    scores["behaviours"] = dict(Counter(filter(None, (behaviour(text) for _, text, _ in records))))
    return scores, records


def prepare_train(args: argparse.Namespace) -> Callable[[], None]:
    out = Path(args.out or "out/{method}-{seed}".format_map({**asdict(Config()), **vars(args)}))
    if (out / "metrics.jsonl").exists() and not args.resume:
        go_on = "" if steps_without_checkpoint(out) else "continue it with --resume, or "
        raise ValueError(f"{out} already holds a run: {go_on}give another directory with --out")
    stored = out / "config.json"
    before = read_json(stored) if args.resume and stored.exists() else {}
    config = chosen(args, before)
    config.check()
    sinks.check(args.sinks)
    if not before:
        check_used(args, config)
    teacher_path = (args.teacher or args.model) if config.method == "thinktuning" else None
    device, dtype = device_and_dtype(args)
    world = World.start(device, dtype)
    sizes = plan.Sizes.read(args.model, teacher_path, dtype, world.size, device)
    free = plan.free_memory(device)
    config = plan.fit(config, sizes, device, free, resumed=bool(before))
    # Of several processes the parts are the masters themselves.
    student, tokenizer = load_model(args.model, device, dtype if world.size == 1 else torch.float32)
    room = config.max_tokens, config.max_prompt
    problems = fitting(load_problems(args.data, "train"), student, tokenizer, args.data, *room)
    config = replace(config, steps=config.steps or max(1, len(problems) // config.questions))
    config = replace(config, schedule_steps=config.schedule_steps or config.steps)
    if world.is_first:
        print(plan.describe(config, sizes, device, free) + told_longer(config, before))
    validation = []
    if args.eval_data:
        validation = load_problems(args.eval_data, "test")
        validation = fitting(validation, student, tokenizer, args.eval_data, *room)
        validation = validation[: config.eval_count or None]
    teacher = make_teacher(*load_model(teacher_path, device, dtype), config) if teacher_path else None
    names = [name for name in ("model", "data", *KEPT) if getattr(args, name) is not None]
    named = {name: getattr(args, name) for name in names}
    run = Run(out, {**named, **asdict(config)}, config.method, args.resume, world, args.sinks)
    args.again = ("--resume goes on" if config.save_every else
                  "it cannot be resumed, because --save-every 0 kept no checkpoint")
    args.memory = f"lower --rows (sampling) or --micro-batch (update); {args.again}"

    def job() -> None:
        history = train(student, tokenizer, problems, config, teacher=teacher, run=run, validation=validation, world=world)
        trained = world.whole(student)
        if world.is_first:
            trained.save(out / "model", tokenizer)
        run.close()
        if not world.is_first:
            return
        report.write_report(out)
        summary = {k: round(v, 4) for k, v in history[-1].items() if k in ("reward", "reflection_rate") or k.startswith("eval_")}
        short = f" of {config.steps}, stopped; {args.again}" if len(history) < config.steps else ""
        print(f"{len(history)} steps{short} -> {out}/model  {summary}")
        if args.verbose:
            print(f"decoding steps: {RECORDER.traces} traced by torch.compile, {RECORDER.count} recorded as CUDA graphs")

    return job


def prepare_eval(args: argparse.Namespace) -> Callable[[], None]:
    if args.split and args.data not in SPLITS:
        raise ValueError(f"--split is of {' and '.join(SPLITS)}, and a file is all one split: leave it out")
    grader = Grader(args.grader)
    model, tokenizer = load_model(args.model, *device_and_dtype(args))
    max_tokens = args.max_tokens or min(1024, model.config.max_seq_len // 2)
    problems = load_problems(args.data, args.split or "test")
    problems = fitting(problems, model, tokenizer, args.data, max_tokens)
    problems = problems[: args.count or None]
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    args.memory = "lower --rows or --max-tokens"

    def job() -> None:
        scores, _ = evaluate(model, tokenizer, problems, max_tokens=max_tokens, samples=args.samples,
                             temperature=temperature, rows=args.rows, seed=args.seed, equal=grader.equal)
        grader.close()
        print(f"{len(problems)} problems, {args.samples} samples each, temperature {temperature:g}; graded by {grader}")
        for key, value in scores.items():
            if not key.endswith("_se"):
                error = f" ± {scores[key + '_se']:.4f}" if key + "_se" in scores else ""
                print(f"{key:<30} {value:.4f}{error}" if isinstance(value, float) else f"{key:<30} {value}")

    return job


def prepare_demo(args: argparse.Namespace) -> Callable[[], None]:
    return demonstration.prepare(args, train, evaluate)


COMMANDS = {"demo": prepare_demo, "train": prepare_train, "eval": prepare_eval, "ask": ask.prepare, "report": report.prepare}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(COMMANDS[args.command], args)


if __name__ == "__main__":
    sys.exit(run_command(COMMANDS[ARGS.command], ARGS))
