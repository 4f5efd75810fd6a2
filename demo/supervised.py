"""A control: supervised fine-tuning on rollouts that ThinkTuning would reward.

The student's own attempts, all or some of them continued by the teacher, are kept if their answer
is right, and the student learns them token by token. There is no group and no advantage.
"""

from __future__ import annotations

import copy
import math
import random

import torch

from data import load_problems
from data.prompts import spoken, student_prompt
from data.reward import is_correct
from data.tokenizer import Tokenizer
from grpo import LossSettings, MasterAdamW, Rollout, update
from model import LM
from run.config import Config, RunFailed
from sampler import generate
from teacher import augment, make_teacher


def train_supervised(
    base: LM, tokenizer: Tokenizer, config: Config, every: int = 1
) -> tuple[LM, list[dict]]:
    """A copy of `base` after as many updates as ThinkTuning's; no history.

    The teacher continues one rollout of `every`.
    """
    updates = config.steps * config.epochs * math.ceil(config.questions / config.mini_batch)
    size = config.mini_batch
    texts = rewarded_texts(base, tokenizer, config, updates * size, every)
    student = copy.deepcopy(base).requires_grad_(True)
    optimizer = MasterAdamW(
        student.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    # With Â = 1 the loss of a guided rollout, −Â·log π, is the cross-entropy. That of the others,
    # −Âρ, has the same gradient, because ρ is 1 in the only update that sees them.
    settings = LossSettings(
        shaping="likelihood",
        guided_tokens="trajectory",
        max_grad_norm=config.max_grad_norm,
        micro_batch=config.micro_batch,
    )
    for start in range(0, updates * size, size):
        update(student, optimizer, texts[start : start + size], settings=settings)
    return student, []


def rewarded_texts(
    base: LM,
    tokenizer: Tokenizer,
    config: Config,
    count: int,
    every: int = 1,
    most_rounds: int = 10,
) -> list[Rollout]:
    """`count` rollouts with the right answer, after the teacher has continued one in `every`.

    A round samples one rollout a question. Raises RunFailed if `most_rounds` rounds do not give
    enough.
    """
    teacher = make_teacher(base, tokenizer, config)
    rng = random.Random(f"supervised {config.seed}")
    generator = torch.Generator().manual_seed(config.seed)
    found: list[Rollout] = []
    for _ in range(most_rounds):
        problems = rng.sample(load_problems("wordproblems", "train"), count)
        prompts = [student_prompt(tokenizer, problem.question) for problem in problems]
        attempts = generate(
            base,
            prompts,
            max_tokens=config.max_tokens,
            stop=tokenizer.stop,
            temperature=config.temperature,
            generator=generator,
            rows=config.rows,
        )
        rollouts = []
        for problem, prompt, ids in zip(problems, prompts, attempts):
            text = spoken(tokenizer, ids)
            asked = dict(question=problem.question, answer=problem.answer)
            finished = ids[-1] in tokenizer.stop
            rollouts.append(Rollout(prompt, ids, finished, text=text, attempt=text, **asked))
        rollouts = [rollout for rollout in rollouts if rollout.finished]
        kept = [rollout for i, rollout in enumerate(rollouts) if i % every]
        helped = rollouts[::every]
        replies = teacher.feedback([r.question for r in helped], [r.attempt for r in helped])
        for rollout, feedback in zip(helped, replies):
            if feedback and augment(rollout, feedback, tokenizer, config.max_tokens):
                kept.append(rollout)
        found += [rollout for rollout in kept if is_correct(rollout.text, rollout.answer)]
        if len(found) >= count:
            rng.shuffle(found)
            for rollout in found[:count]:
                rollout.advantage = 1.0
            return found[:count]
    raise RunFailed(
        f"of the supervised control's rollouts {len(found)} were right, and {count} are needed: "
        "the base model's teacher is too weak"
    )
