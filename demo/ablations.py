"""Ablations: the same base model, budget and problems, one thing changed."""

from __future__ import annotations

import random
import time
from dataclasses import replace

from data import load_problems, wordproblems
from data.reward import answers
from data.scores import mean_and_se
from demo.base import Setup, base_model
from demo.comparison import examine, train_one
from run.config import DEMO
from run.record import write_json
from run.screen import progress
from teacher import parse_feedback


def shuffled(ask, rng):
    """Every reply goes to the next question's rollout: the words stay, the sense goes."""

    def ask_and_shift(questions, attempts):
        replies = ask(questions, attempts)
        return replies[1:] + replies[:1]

    return ask_and_shift


def corrupted(share):
    """The final answer of `share` of the replies becomes another number; the steps before it stay."""

    def wrap(ask, rng):
        def ask_and_spoil(questions, attempts):
            return [spoiled(reply, share, rng) for reply in ask(questions, attempts)]

        return ask_and_spoil

    return wrap


def spoiled(reply: str, share: float, rng: random.Random) -> str:
    feedback = parse_feedback(reply)
    found = answers(feedback.phrase) if feedback else []
    if not found or rng.random() >= share:
        return reply
    others = [n for n in range(1, wordproblems.MOST + 1) if str(n) != found[-1]]
    start, _, end = reply.rpartition(f"\\boxed{{{found[-1]}}}")
    return f"{start}\\boxed{{{rng.choice(others)}}}{end}"


STRESS = dict(epochs=4, schedule="constant", p_init=0.5, p_min=0.5, learning_rate=3e-4, steps=20)
GRPO = {
    "GRPO": ({"method": "grpo"}, None),
    "GRPO, four times the steps": ({"method": "grpo", "steps": 4 * DEMO["steps"]}, None),
}
VARIANTS = {  # name: (what changes in the configuration, what happens to the teacher)
    "all": {
        "ThinkTuning": ({}, None),
        "no AAS: ordinary ratio": ({"shaping": "ratio"}, None),
        "γ constant, as published": ({"published": "gamma"}, None),
        "whole trajectory guided": ({"guided_tokens": "trajectory"}, None),
        "teacher for the whole run": ({"schedule": "constant"}, None),
        "feedback shuffled": ({}, shuffled),
        **GRPO,
    },
    "long": GRPO,
    "stress": {
        "AAS": (STRESS, corrupted(0.5)),
        "ordinary ratio, clipped": (STRESS | {"shaping": "ratio"}, corrupted(0.5)),
        "-A log p, guard (c) on": (STRESS | {"shaping": "likelihood"}, corrupted(0.5)),
        "-A log p": (STRESS | {"shaping": "likelihood", "unlikely": 0.0}, corrupted(0.5)),
        "γ constant, guarded": (STRESS | {"published": "gamma"}, corrupted(0.5)),
        "γ constant, no guards": (
            STRESS | {"published": "gamma", "guards": False, "unlikely": 0.0},
            corrupted(0.5),
        ),
    },
    "rates": {
        f"{method}, {rate:g}": ({"method": method, "learning_rate": rate}, None)
        for method in ("grpo", "thinktuning")
        for rate in (3e-5, 1e-4, 3e-4, 1e-3)
    },
}


def ablate(setup: Setup, which, repeats):
    """Train every variant `repeats` times from one base; prints each run's accuracy and reflection, and means over the runs."""
    split = (
        "validation" if which == "rates" else "test"
    )  # rates are tuned, so never on the test problems
    problems = load_problems("wordproblems", split)
    base, config, out = base_model(setup)[0], setup.config, setup.out
    rows = {}
    for name, (changes, wrap) in VARIANTS[which].items():
        outcomes = []
        for repeat in range(repeats):
            changed = replace(config, **changes, seed=config.seed + 1000 * repeat)
            changed = replace(changed, steps=config.steps) if setup.quick else changed
            began = time.perf_counter()
            student, history = train_one(setup, base, changed, wrap=wrap)
            if len(history) < changed.steps:
                return print(f"stopped; finished variants are in {out / f'ablate-{which}.json'}")
            spent = {"seed": changed.seed, "seconds": time.perf_counter() - began}
            outcomes.append(examine(setup, student, problems)[0] | spent)
            progress(
                f"{name}, run {repeat + 1} of {repeats}: accuracy {outcomes[-1]['accuracy']:.3f}, "
                f"reflects {outcomes[-1]['reflection_rate']:.3f}",
                last=True,
            )
        rows[name] = outcomes
        write_json(out / f"ablate-{which}.json", rows)
    print(
        f"\n{which}: {len(problems)} {split} problems, one base model; mean ± standard error over {repeats} training seeds"
    )
    for name, outcomes in rows.items():
        accuracy, se = mean_and_se([o["accuracy"] for o in outcomes])
        reflects, reflects_se = mean_and_se([o["reflection_rate"] for o in outcomes])
        print(
            f"{name:<28} accuracy {accuracy:.3f} ± {se:.3f}   reflects {reflects:.3f} ± {reflects_se:.3f}   "
            f"took off in {sum(o['reflection_rate'] > 0.5 for o in outcomes)} of {repeats}"
        )
