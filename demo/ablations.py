"""Ablations: the same base model, budget and problems, with one thing changed."""

from __future__ import annotations

import random
import time
from dataclasses import replace

from data import wordproblems
from data.reward import answers
from data.scores import mean_and_se
from demo.base import Setup, base_model
from demo.comparison import examine, held_out_problems, train_one
from run.config import DEMO
from run.record import write_json
from run.screen import progress
from teacher import parse_feedback


def shuffled(ask, rng):
    """Give every reply to the next question's rollout: the words stay, the sense is lost."""

    def ask_and_shift(questions, attempts):
        replies = ask(questions, attempts)
        return replies[1:] + replies[:1]

    return ask_and_shift


def corrupted(share):
    """Make the final answer wrong in `share` of the replies; the steps before it stay."""

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


# A variant is a name, what changes in the configuration, and a function that wraps the teacher's
# `ask` (or None).

GRPO = {
    "GRPO": (dict(method="grpo"), None),
    "GRPO, four times the steps": (dict(method="grpo", steps=4 * DEMO["steps"]), None),
}
PARTS_LEFT_OUT = {
    "ThinkTuning": ({}, None),
    "no AAS: ordinary ratio": (dict(shaping="ratio"), None),
    "γ constant, as published": (dict(published="gamma"), None),
    "whole trajectory guided": (dict(guided_tokens="trajectory"), None),
    "teacher for the whole run": (dict(schedule="constant"), None),
    "feedback shuffled": ({}, shuffled),
}
LOSSES = {
    "AAS": {},
    "ordinary ratio, clipped": dict(shaping="ratio"),
    "-A log p, guard (c) on": dict(shaping="likelihood"),
    "-A log p": dict(shaping="likelihood", unlikely=0.0),
    "γ constant, guarded": dict(published="gamma"),
    "γ constant, no guards": dict(published="gamma", guards=False, unlikely=0.0),
}


def under_stress() -> dict:
    """Every loss under a high learning rate, four epochs, and a teacher that is often wrong."""
    stress = dict(
        epochs=4, schedule="constant", p_init=0.5, p_min=0.5, learning_rate=3e-4, steps=20
    )
    variants = {}
    for name, loss in LOSSES.items():
        variants[name] = (dict(stress, **loss), corrupted(0.5))
    return variants


def learning_rates() -> dict:
    variants = {}
    for method in ("grpo", "thinktuning"):
        for learning_rate in (3e-5, 1e-4, 3e-4, 1e-3):
            changes = dict(method=method, learning_rate=learning_rate)
            variants[f"{method}, {learning_rate:g}"] = (changes, None)
    return variants


VARIANTS = {
    "all": {**PARTS_LEFT_OUT, **GRPO},
    "long": GRPO,
    "stress": under_stress(),
    "rates": learning_rates(),
}


def ablate(setup: Setup, which, repeats):
    """Train every variant `repeats` times from one base model, and print how each did."""
    # A learning rate is chosen by its result, so its problems must not be the test problems.
    split = "validation" if which == "rates" else "test"
    problems = held_out_problems(setup, split)
    base, _ = base_model(setup)
    path = setup.out / f"ablate-{which}.json"
    rows = {}
    for name, (changes, wrap) in VARIANTS[which].items():
        outcomes = []
        for repeat in range(repeats):
            outcome = run_variant(setup, base, problems, changes, wrap, repeat)
            if outcome is None:
                print(f"stopped; finished variants are in {path}")
                return
            outcomes.append(outcome)
            progress(
                f"{name}, run {repeat + 1} of {repeats}: accuracy {outcome['accuracy']:.3f}, "
                f"reflects {outcome['reflection_rate']:.3f}",
                last=True,
            )
        rows[name] = outcomes
        write_json(path, rows)
    print(f"\n{which}: {len(problems)} {split} problems, one base model; ", end="")
    print(f"mean ± standard error over {repeats} training seeds")
    for name, outcomes in rows.items():
        print(summary_line(name, outcomes))


def run_variant(setup: Setup, base, problems, changes, wrap, repeat) -> dict | None:
    """Train and examine one variant with one seed; None if the training was stopped."""
    seed = setup.config.seed + 1000 * repeat
    changed = replace(setup.config, **changes, seed=seed)
    if setup.quick:
        changed = replace(changed, steps=setup.config.steps)
    began = time.perf_counter()
    student, history = train_one(setup, base, changed, wrap=wrap)
    if len(history) < changed.steps:
        return None
    seconds = time.perf_counter() - began
    scores, _ = examine(setup, student, problems)
    return {**scores, "seed": seed, "seconds": seconds}


def summary_line(name, outcomes) -> str:
    accuracy, accuracy_se = mean_and_se([o["accuracy"] for o in outcomes])
    reflects, reflects_se = mean_and_se([o["reflection_rate"] for o in outcomes])
    took_off = sum(o["reflection_rate"] > 0.5 for o in outcomes)
    return (
        f"{name:<28} accuracy {accuracy:.3f} ± {accuracy_se:.3f}   "
        f"reflects {reflects:.3f} ± {reflects_se:.3f}   took off in {took_off} of {len(outcomes)}"
    )
