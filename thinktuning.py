"""ThinkTuning from scratch: the training loop, evaluation, and the commands.

ThinkTuning (arXiv 2508.07616) is GRPO with a teacher. The teacher reads some of the student's
rollouts and continues them with feedback in the student's own voice. The reward decides whether the
student learns these words.

    python thinktuning.py                    the demonstration: GRPO and ThinkTuning side by side
    python thinktuning.py --preset mentor    the novelty test: a habit that is hardly ever sampled
    python thinktuning.py train --model DIR --data gsm8k
    python thinktuning.py eval  --model DIR --data FILE
    python thinktuning.py ask   --model DIR "question"
    python thinktuning.py report RUN [RUN ...]          the HTML page again, or across runs
    python thinktuning.py page RUN           the demonstration's models, to try in a browser
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from run.cli import parse_args

    ARGS = parse_args()

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data import SPLITS, Problem, load_problems
from data.exemplars import behaviour
from data.grading import Grader
from data.prompts import spoken, student_prompt
from data.reward import equal, is_correct
from data.scores import score
from data.tokenizer import Tokenizer
from demo import command as demonstration
from grpo import LossSettings, Rollout, group_advantages, snapshot, update
from model import LM
from run import sinks
from run.cli import parse_args
from run.config import Config, check_used, chosen, named_settings, note_on_more_steps
from run.errors import run_command
from run.loading import device_and_dtype, fitting, load_model
from run.loop import Loop, Metrics
from run.optimizer import MasterAdamW
from run.record import Run, earlier_settings
from run.world import World
from sampler import generate
from show import ask, plan, report
from show.live import live_report
from show.outcome import print_outcome, print_scores
from show.transcripts import transcripts
from teacher import (
    Teacher,
    augment,
    choose_rollouts,
    guidance_fraction,
    make_teacher,
    parse_feedback,
)

Record = tuple[Problem, str, bool]  # the problem, what was said, whether it finished


def reward(rollout: Rollout) -> float:
    """r_i: 1 if it finished and its last final answer is right. A wrong teacher earns nothing."""
    return float(rollout.finished and is_correct(rollout.text, rollout.answer))


def train(
    student: LM,
    tokenizer: Tokenizer,
    loop: Loop,
    teacher: Teacher | None = None,
    reward: Callable[[Rollout], float] = reward,
) -> list[Metrics]:
    """Train the policy π_θ, `student`, in place; returns the metrics of every step.

    The comments count the paper's eight steps. Without a teacher they are GRPO. Another `reward`
    changes step 6 alone: it reads the whole text of a rollout, whoever wrote it. `loop` has the
    settings, deals out the questions, and does what is not the method: records, checkpoints,
    signals, several processes (run/loop.py). Raises RunFailed where the gradient is not finite for
    too long.
    """
    config = loop.config  # B, G, L, p_init, …
    settings = loss_settings(config)  # ε, c, γ_min, γ_max, …
    # π_ref is copied here, because loop.steps may load a checkpoint into the student.
    reference = initial_policy(student, teacher) if config.kl_coef else None
    optimizer = prepare_to_train(student, config, loop.world)
    # What the loop calls when it is due: greedy scores, and a few rollouts to read.
    validate = partial(validation_scores, tokenizer=tokenizer)
    transcribe = partial(transcripts, tokenizer=tokenizer, settings=settings)
    for step, questions in loop.steps(student, optimizer, teacher, validate, transcribe):
        # π_old until the first optimizer step: the student itself (of several processes, a copy).
        policy = loop.policy
        # 1. Rollouts: sample o_1 … o_G ~ π_old(· | q) for each question q.
        rollouts = sample_rollouts(policy, tokenizer, questions, config, loop.generator(step))
        # 2. Who gets help: k = max(1, ⌊n·p_s⌋) of each question's n finished rollouts; none once
        #    p_s = 0.
        p_s = share_of_help(step, config) if teacher else 0.0
        chosen = choose_rollouts(rollouts, config.samples, p_s, config.seed, step)
        # 3. Ask the teacher: it reads the question q and the attempt o_i, never the answer y.
        replies = teacher.ask_about(chosen) if teacher else []
        for rollout, reply in zip(chosen, replies):
            # 4. Parse strictly: opinion, reason and phrase on o_i, or no feedback at all.
            rollout.feedback = feedback = parse_feedback(reply)
            # 5. Augment: ô_i = o_i without its end token ⊕ reason ⊕ phrase ⊕ end token takes the
            #    place of o_i in its group. Where ô_i would be longer than L tokens, o_i stays.
            if feedback:
                augment(rollout, feedback, tokenizer, config.max_tokens)
        # 6. Reward: r_i = 1 if the response finished and its last answer equals y, else 0.
        for rollout in rollouts:
            rollout.reward = reward(rollout)
        # 7. Advantages: Â_i = (r_i − mean r) / (std r + 1e-6) in each question's group.
        set_advantages(rollouts, config.samples, config.advantages)
        # 8. Update: first log π_old, before the first mini-batch moves the student. Only augmented
        #    rollouts still lack it.
        snapshot(policy, rollouts, settings.micro_batch, settings.temperature)
        #    Then AdamW steps, one for each mini-batch of each epoch (none where every Â is 0), on
        #    the token mean of ℓ; the gradient's norm is clipped. ℓ = −Â·w on guided tokens, unless
        #    guard (c) makes them ordinary; on ordinary ones it is PPO's: ρ = π_θ/π_old clipped,
        #    dual clip where Â < 0.
        updates = []
        for batch in loop.mini_batches(rollouts):
            metrics = update(
                student, optimizer, batch, settings=settings, reference=reference, world=loop.world
            )
            updates.append(metrics)
        loop.record(step, rollouts, {"fraction": p_s, **mean_of(updates)})
    return loop.history


def sample_rollouts(
    policy: LM,
    tokenizer: Tokenizer,
    questions: Sequence[Problem],
    config: Config,
    generator: torch.Generator,
) -> list[Rollout]:
    """G responses to each question, question-major, with log π_old of what was sampled."""
    prompts = [student_prompt(tokenizer, problem.question) for problem in questions]
    responses, logprobs = generate(
        policy,
        prompts,
        max_tokens=config.max_tokens,  # L
        stop=tokenizer.stop,
        samples=config.samples,  # G
        temperature=config.temperature,
        generator=generator,
        rows=config.rows,
        logprobs=True,  # known here, so a response that nobody augments needs no second pass
    )
    rollouts = []
    for i, (ids, known) in enumerate(zip(responses, logprobs)):
        q = i // config.samples  # each question's G responses stand side by side
        question, answer = questions[q]
        text = spoken(tokenizer, ids)
        rollouts.append(
            Rollout(
                prompts[q],
                ids,  # o_i
                finished=ids[-1] in tokenizer.stop,
                question=question,
                answer=answer,  # y, which no prompt contains
                text=text,  # what is rewarded; the teacher's words may join it
                attempt=text,  # stays what the student wrote
                old_logprobs=known,
            )
        )
    return rollouts


def share_of_help(step: int, config: Config) -> float:
    """p_s with a run's settings; 0.0 once the teacher is off."""
    steps, p_init, p_min = config.schedule_steps, config.p_init, config.p_min
    return guidance_fraction(step, steps, config.schedule, p_init, p_min, config.eps)


def set_advantages(rollouts: list[Rollout], samples: int, kind: str = "z-score") -> None:
    """Fill in Â of each rollout; `samples` of each question stand side by side."""
    rewards = torch.tensor([float(r.reward) for r in rollouts]).view(-1, samples)  # (Q, G)
    # Question-major, as the rollouts.
    advantages = group_advantages(rewards, kind).flatten().tolist()
    for rollout, advantage in zip(rollouts, advantages):
        rollout.advantage = advantage


def loss_settings(config: Config) -> LossSettings:
    """The run's settings that the loss depends on, and what it repeats of the published code."""
    # Fields of one name mean the same in both classes.
    shared = {f.name for f in fields(LossSettings)} & {f.name for f in fields(Config)}
    settings = LossSettings(**{name: getattr(config, name) for name in shared})
    repeated = config.published_items
    return replace(
        settings,
        micro_batch=config.micro_batch or LossSettings.micro_batch,  # 0: nobody has chosen one
        published_gamma="gamma" in repeated,  # γ is the same whatever Â is
        published_dual_clip="dual-clip" in repeated,  # no c where no rollout is guided
        guided_tokens="trajectory" if "trajectory" in repeated else config.guided_tokens,
    )


def initial_policy(student: LM, teacher: Teacher | None) -> LM:
    """π_ref: a frozen copy of the student as it is, or the teacher's model where that is equal."""
    if teacher is not None and student.config == teacher.model.config:
        # The usual case: a third copy of the weights would only cost memory.
        ours, theirs = student.state_dict(), teacher.model.state_dict()
        if ours.keys() == theirs.keys() and all(same(x, theirs[k]) for k, x in ours.items()):
            return teacher.model
    return copy.deepcopy(student).requires_grad_(False)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def prepare_to_train(student: LM, config: Config, world: World) -> MasterAdamW:
    """The optimizer, after several processes have divided the student among them."""
    config.check()
    student.recompute = config.recompute
    world.shard(student)  # before the optimizer, whose moments are divided like the weights
    return MasterAdamW(
        student.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,  # one kernel for all parameters
    )


def mean_of(results: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the updates that have it."""
    values: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.items():  # a mean over no tokens is absent, not 0
            values.setdefault(name, []).append(value)
    return {name: sum(some) / len(some) for name, some in values.items()}


# Evaluation. It never involves a teacher.


def evaluate(
    model: LM,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    max_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,  # greedy
    rows: int = 256,
    seed: int = 0,
    equal: Callable[[str, str], bool] = equal,
    world: World = World(),
) -> tuple[Metrics, list[Record]]:
    """Scores (data.scores) on `problems`, and the (problem, text, finished) records behind them.

    Of several processes each answers its share of the problems.
    """
    prompts = [student_prompt(tokenizer, p.question) for p in world.share(problems)]
    own = generate(
        model,
        prompts,
        max_tokens=max_tokens,
        stop=tokenizer.stop,
        samples=samples,
        temperature=temperature,
        rows=rows,
        generator=torch.Generator().manual_seed(seed),  # its own, so evaluating changes no training
    )
    responses: list[list[int]] = world.gather(own)  # question-major: shares are consecutive
    records = []
    for i, ids in enumerate(responses):
        text, finished = spoken(tokenizer, ids), ids[-1] in tokenizer.stop
        records.append((problems[i // samples], text, finished))
    scores: Metrics = score(records, samples, equal)
    scores["mean_length"] = sum(len(ids) for ids in responses) / len(responses)
    shown = [behaviour(text) for _, text, _ in records]
    scores["behaviours"] = dict(Counter(name for name in shown if name))
    return scores, records


def validation_scores(loop: Loop, tokenizer: Tokenizer) -> Metrics:
    """Greedy scores of the student as it is while it trains, by the names eval_…"""
    scores, _ = evaluate(
        loop.policy,
        tokenizer,
        loop.validation,
        max_tokens=loop.config.max_tokens,
        rows=loop.config.rows,
        world=loop.world,
    )
    return {f"eval_{name}": value for name, value in scores.items() if isinstance(value, float)}


# The commands. Each is prepared first, which is when bad input is found, and then run.


def prepare_train(args: argparse.Namespace) -> Callable[[], None]:
    settings = {**asdict(Config()), **vars(args)}  # the defaults, but for what was given
    out = Path(args.out or f"out/{settings['method']}-{settings['seed']}")
    before = earlier_settings(out, args.resume)  # {} for a new run
    config = chosen(args, before)
    config.check()
    sinks.check(args.sinks)
    if not before:
        check_used(args, config)
    # The paper's teacher is the student's initial weights.
    teacher_path = (args.teacher or args.model) if config.method == "thinktuning" else None
    device, dtype = device_and_dtype(args)
    world = World.start(device, dtype)
    # From here on the cheap comes first: sizes and problems are read before any weight is.
    sizes = plan.Sizes.read(args.model, teacher_path, dtype, world.size, device)
    free = plan.free_memory(device)
    config = plan.fit(config, sizes, device, free, resumed=bool(before))
    problems = load_problems(args.data, "train")
    validation = load_problems(args.eval_data, "test") if args.eval_data else []
    # With several processes the sharded float32 weights are the master weights.
    student_dtype = dtype if world.size == 1 else torch.float32
    student, tokenizer = load_model(args.model, device, student_dtype, args.compile)
    room = config.max_tokens, config.max_prompt
    problems = fitting(problems, student, tokenizer, args.data, *room)
    if validation:
        validation = fitting(validation, student, tokenizer, args.eval_data, *room)
    config = config.with_steps(len(problems))
    if world.is_first:
        print(plan.describe(config, sizes, device, free) + note_on_more_steps(config, before))
    teacher = None
    if teacher_path:  # its own copy: the student's weights change
        loaded = load_model(teacher_path, device, dtype, args.compile)
        teacher = make_teacher(*loaded, config)
    run = Run(out, named_settings(args, config), config.method, args.resume, world, args.sinks)
    loop = Loop(
        problems,
        config,
        run=run,
        validation=validation[: config.eval_count or None],
        world=world,
        has_flags=True,
    )

    def job() -> None:
        with live_report(out, world.is_first and config.eval_every > 0) as loop.page:
            history = train(student, tokenizer, loop, teacher)
        trained = world.whole(student)  # of several processes all must take part
        run.close()
        if world.is_first:
            trained.save(out / "model", tokenizer)
            report.write_report(out)
            print_outcome(out, history, config, args)

    return job


def prepare_eval(args: argparse.Namespace) -> Callable[[], None]:
    if args.split and args.data not in SPLITS:
        named = " and ".join(SPLITS)
        raise ValueError(f"--split is of {named}, and a file is all one split: leave it out")
    grader = Grader(args.grader)  # first: it may need a package that is not installed
    problems = load_problems(args.data, args.split or "test")
    model, tokenizer = load_model(args.model, *device_and_dtype(args), args.compile)
    max_tokens = args.max_tokens or min(1024, model.config.max_seq_len // 2)
    problems = fitting(problems, model, tokenizer, args.data, max_tokens)
    problems = problems[: args.count or None]
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    args.memory = "lower --rows or --max-tokens"

    def job() -> None:
        scores, _ = evaluate(
            model,
            tokenizer,
            problems,
            max_tokens=max_tokens,
            samples=args.samples,
            temperature=temperature,
            rows=args.rows,
            seed=args.seed,
            equal=grader.equal,
        )
        grader.close()
        print(f"{len(problems)} problems, {args.samples} samples each, ", end="")
        print(f"temperature {temperature:g}; graded by {grader}")
        print_scores(scores)

    return job


def prepare_demo(args: argparse.Namespace) -> Callable[[], None]:
    return demonstration.prepare(args, train, evaluate)


COMMANDS: dict[str, Any] = {
    "demo": prepare_demo,
    "train": prepare_train,
    "eval": prepare_eval,
    "ask": ask.prepare,
    "report": report.prepare,
    "page": demonstration.prepare_page,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(COMMANDS[args.command], args)


if __name__ == "__main__":
    sys.exit(run_command(COMMANDS[ARGS.command], ARGS))
