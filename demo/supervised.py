"""A control: supervised fine-tuning on guided rollouts that ThinkTuning would reward.

The student's own attempts, continued by the teacher, are kept if their answer is right, and the
student learns them token by token. There is no group and no advantage.
"""

from __future__ import annotations

import copy
import random

import torch

from data import load_problems
from data.prompts import spoken, student_prompt
from data.reward import is_correct
from data.tokenizer import Tokenizer
from grpo import LossSettings, MasterAdamW, Rollout, update
from model import LM
from run.config import Config
from sampler import generate
from teacher import augment, make_teacher


def train_supervised(base: LM, tokenizer: Tokenizer, config: Config) -> tuple[LM, list[dict]]:
    """A copy of `base` after as many updates as ThinkTuning's; no history."""
    updates = config.steps * (config.questions // config.mini_batch)
    size = config.mini_batch
    texts = rewarded_texts(base, tokenizer, config, updates * size)
    student = copy.deepcopy(base).requires_grad_(True)
    optimizer = MasterAdamW(
        student.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    # With Â = 1 on every token, -Â log p is the cross-entropy.
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
    base: LM, tokenizer: Tokenizer, config: Config, count: int, most_rounds: int = 10
) -> list[Rollout]:
    """`count` guided rollouts with the right answer, each of another question if there are so many.

    Raises RuntimeError if `most_rounds` rounds do not give enough.
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
            finished = ids[-1] in tokenizer.stop
            rollouts.append(
                Rollout(
                    prompt,
                    ids,
                    finished,
                    question=problem.question,
                    answer=problem.answer,
                    text=text,
                    attempt=text,
                )
            )
        rollouts = [rollout for rollout in rollouts if rollout.finished]
        replies = teacher.feedback([r.question for r in rollouts], [r.attempt for r in rollouts])
        for rollout, feedback in zip(rollouts, replies):
            guided = feedback and augment(rollout, feedback, tokenizer, config.max_tokens)
            if guided and is_correct(rollout.text, rollout.answer):
                rollout.advantage = 1.0
                found.append(rollout)
        if len(found) >= count:
            return found[:count]
    raise RuntimeError(f"the teacher's feedback was right {len(found)} times, not {count}")
