"""Ablations and controls: the same base model, budget and problems, with one thing changed."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from data.reward import final_answer
from data.scores import mean_and_se
from data.wordproblems import MOST, answer_sentence
from demo.base import RECIPE, Setup, base_model
from demo.comparison import TOO_QUICK, examine, held_out_problems, train_one
from demo.supervised import train_supervised
from demo.texts import WORDING
from run.config import DEMO
from run.record import write_json
from run.screen import progress
from teacher import parse_feedback

TAKE_OFF = 0.25  # of the sampled rollouts reflect
FEEDBACK = "<opinion>{}</opinion><reason>{}</reason><phrase>{}</phrase>"


@dataclass(frozen=True)
class Variant:
    settings: dict = field(default_factory=dict)  # what changes in the configuration
    wrap: Callable | None = None  # wrap(ask, rng) replaces how the teacher is asked
    texts: dict = field(default_factory=dict)  # what changes in the base model's recipe
    supervised: int = 0  # not RL but supervised, with one text of so many guided
    as_many_tokens_as: str = ""  # the number of steps follows from this variant's tokens


# Other teachers. Each wraps `ask(questions, attempts) -> replies`.


def shuffled(ask, rng):
    """Give every reply to the next question's rollout: the words stay, the sense is lost."""

    def ask_and_shift(questions, attempts):
        replies = ask(questions, attempts)
        return replies[1:] + replies[:1]

    return ask_and_shift


def without_reason(ask, rng):
    """Only the continuation: the phrase's first sentence stands where the reason would stand."""

    def ask_and_cut(questions, attempts):
        return [with_reason(reply, None) for reply in ask(questions, attempts)]

    return ask_and_cut


def reasons_shuffled(ask, rng):
    """Every phrase keeps its place, and gets the reason of the next question's rollout."""

    def ask_and_mix(questions, attempts):
        replies = ask(questions, attempts)
        others = [parse_feedback(reply) for reply in replies[1:] + replies[:1]]
        pairs = zip(replies, others)
        return [with_reason(reply, other.reason) if other else reply for reply, other in pairs]

    return ask_and_mix


def with_reason(reply: str, reason: str | None) -> str:
    """The reply with another reason; None: with none."""
    feedback = parse_feedback(reply)
    if feedback is None:
        return reply
    opinion, _, phrase = feedback
    if reason is None:
        first, dot, phrase = phrase.partition(". ")
        reason = first + dot.strip()
    return FEEDBACK.format(opinion, reason, phrase)


def always_content(ask, rng):
    """A teacher that confirms every attempt, whatever it says."""

    def confirm(questions, attempts):
        replies = []
        for attempt in attempts:
            answer = final_answer(attempt) or "0"
            phrase = f"Each line fits. {answer_sentence(answer)}"
            replies.append(FEEDBACK.format("correct", WORDING["self-agreement"][1], phrase))
        return replies

    return confirm


def corrupted(share):
    """Make the final answer wrong in `share` of the replies; the steps before it stay."""

    def wrap(ask, rng):
        def ask_and_spoil(questions, attempts):
            return [spoiled(reply, share, rng) for reply in ask(questions, attempts)]

        return ask_and_spoil

    return wrap


def spoiled(reply: str, share: float, rng: random.Random) -> str:
    feedback = parse_feedback(reply)
    boxes = list(re.finditer(r"\\boxed\{(\d+)\}", feedback.phrase)) if feedback else []
    if not boxes or rng.random() >= share:
        return reply
    others = [n for n in range(1, MOST + 1) if str(n) != boxes[-1][1]]
    start, _, end = reply.rpartition(boxes[-1][0])
    return f"{start}\\boxed{{{rng.choice(others)}}}{end}"


GRPO = {
    "GRPO": Variant(dict(method="grpo")),
    "GRPO, as many tokens": Variant(dict(method="grpo"), as_many_tokens_as="ThinkTuning"),
    "GRPO, four times the steps": Variant(dict(method="grpo", steps=4 * DEMO["steps"])),
}
THINKTUNING = {"ThinkTuning": Variant()}
CONTROLS = {
    "no AAS: ordinary ratio": Variant(dict(shaping="ratio")),
    "γ constant, as published": Variant(dict(published="gamma")),
    "whole trajectory guided": Variant(dict(guided_tokens="trajectory")),
    "teacher for the whole run": Variant(dict(schedule="constant")),
    "feedback shuffled": Variant(wrap=shuffled),
    "guidance without its reason": Variant(wrap=without_reason),
    "reasons shuffled": Variant(wrap=reasons_shuffled),
    "teacher says correct": Variant(wrap=always_content),
    "guidance begins anew": Variant(texts=dict(anew=True)),
    "supervised on guided rollouts": Variant(supervised=1),
    "supervised, guided as in RL": Variant(supervised=DEMO["samples"]),
}
LITERATURE = {  # docs/grpo.md has the formulas
    "centred: no std (Dr. GRPO)": dict(advantages="centred"),
    "leave-one-out (RLOO)": dict(advantages="leave-one-out"),
    "mean of each response": dict(loss_mean="response"),
    "constant denominator": dict(loss_mean="constant"),
    "centred, constant (Dr. GRPO)": dict(advantages="centred", loss_mean="constant"),
    "clip-higher (DAPO)": dict(clip_high=0.28),
    "ratio and mean of a response (GSPO)": dict(
        ratio="response", clip=3e-4, clip_high=4e-4, loss_mean="response"
    ),
    "KL term, 0.04": dict(kl_coef=0.04),
}
LOSSES = {
    "AAS": {},
    "ordinary ratio, clipped": dict(shaping="ratio"),
    "-A log p, guard (c) on": dict(shaping="likelihood"),
    "-A log p": dict(shaping="likelihood", unlikely=0.0),
    "γ constant, guarded": dict(published="gamma"),
    "γ constant, no guards": dict(published="gamma", guards=False, unlikely=0.0),
}
# Only the teacher reflects in what such a base model reads; conversations replace the transcripts.
NO_NARRATOR = dict(transcripts=0, conversations=RECIPE["conversations"] + RECIPE["transcripts"])
NARRATOR = {
    "no narrator": Variant(texts=NO_NARRATOR),
    "no narrator, fewer texts": Variant(texts=dict(transcripts=0)),
    "no narrator, teacher for the whole run": Variant(dict(schedule="constant"), texts=NO_NARRATOR),
    "no narrator, GRPO": Variant(dict(method="grpo"), texts=NO_NARRATOR),
}


def under_stress() -> dict[str, Variant]:
    """Every loss under a high learning rate, four epochs, and a teacher that is often wrong."""
    stress = dict(
        epochs=4, schedule="constant", p_init=0.5, p_min=0.5, learning_rate=5e-4, steps=20
    )
    return {name: Variant(dict(stress, **loss), corrupted(0.5)) for name, loss in LOSSES.items()}


def learning_rates() -> dict[str, Variant]:
    variants = {}
    for method in ("grpo", "thinktuning"):
        for learning_rate in (3e-5, 1e-4, 2e-4, 3e-4, 4e-4, 1e-3):
            changes = dict(method=method, learning_rate=learning_rate)
            variants[f"{method}, {learning_rate:g}"] = Variant(changes)
    return variants


VARIANTS = {
    "all": {**THINKTUNING, **CONTROLS, **GRPO},
    "grpo": {**THINKTUNING, **{name: Variant(changes) for name, changes in LITERATURE.items()}},
    "long": {**THINKTUNING, **GRPO},
    "narrator": {**THINKTUNING, **NARRATOR},
    "stress": under_stress(),
    "rates": learning_rates(),
}


def ablate(setup: Setup, which, repeats):
    """Train every variant `repeats` times, and print how each did."""
    # A learning rate is chosen by its result, so its problems must not be the test problems.
    split = "validation" if which == "rates" else "test"
    problems = held_out_problems(setup, split)
    path = setup.out / f"ablate-{which}.json"
    bases: dict[str, Any] = {}
    rows: dict[str, list[dict]] = {}
    for name, variant in VARIANTS[which].items():
        recipe = {**setup.recipe, **variant.texts}
        made_from = repr(recipe)
        if made_from not in bases:
            bases[made_from] = base_model(replace(setup, recipe=recipe))
        rows[name] = []
        for repeat in range(repeats):
            changed = settings_of(setup, variant, rows, repeat)
            outcome = run_variant(setup, bases[made_from], problems, variant, changed)
            if outcome is None:
                print(f"stopped; finished variants are in {path}")
                return
            rows[name].append(outcome)
            progress(
                f"{name}, run {repeat + 1} of {repeats}: accuracy {outcome['accuracy']:.3f}, "
                f"reflects {outcome['reflection_rate']:.3f}",
                last=True,
            )
        write_json(path, rows)
    print(f"\n{which}: {len(problems)} {split} problems; ", end="")
    print(f"mean ± standard error over {repeats} training seeds" if repeats > 1 else "one run each")
    for name, outcomes in rows.items():
        print(summary_line(name, outcomes))
    print(f"{path} has all of it")
    if setup.quick:
        print(TOO_QUICK)


def settings_of(setup: Setup, variant: Variant, rows, repeat: int):
    """The configuration of one run of a variant."""
    seed = setup.config.seed + 1000 * repeat
    changed = replace(setup.config, **{**variant.settings, "seed": seed})
    if setup.quick:
        return replace(changed, steps=setup.config.steps)
    if variant.as_many_tokens_as:
        wanted = rows[variant.as_many_tokens_as][repeat]["generated_tokens"]
        made = rows["GRPO"][repeat]["generated_tokens"]
        changed = replace(changed, steps=math.ceil(changed.steps * wanted / made))
    return changed


def run_variant(setup: Setup, base, problems, variant: Variant, config) -> dict | None:
    """Train and examine one variant with one seed; None if the training was stopped."""
    began = time.perf_counter()
    if variant.supervised:
        student, history = train_supervised(base, setup.tokenizer, config, variant.supervised)
    else:
        student, history = train_one(setup, base, config, wrap=variant.wrap)
        if len(history) < config.steps:
            return None
    seconds = time.perf_counter() - began
    scores, _ = examine(setup, student, problems)
    rollouts = config.questions * config.samples
    reflecting = [metrics["step"] for metrics in history if metrics["reflection_rate"] >= TAKE_OFF]
    return {
        **scores,
        "seed": config.seed,
        "seconds": seconds,
        "steps": config.steps,
        "generated_tokens": sum(metrics["mean_length"] * rollouts for metrics in history) or None,
        "take_off": reflecting[0] if reflecting else None,  # a step
    }


def summary_line(name, outcomes) -> str:
    def mean(key):
        value, se = mean_and_se([outcome[key] for outcome in outcomes])
        return f"{value:.3f} ± {se:.3f}" if len(outcomes) > 1 else f"{value:.3f}"

    steps = [outcome["take_off"] for outcome in outcomes]
    steps = ", ".join("-" if step is None else str(step) for step in steps)
    wrong, right = mean("reflection_rate_first_wrong"), mean("reflection_rate_first_right")
    return (
        f"{name:<35} accuracy {mean('accuracy')}   reflects when wrong {wrong}, when right {right}"
        f"   takes off at {steps}"
    )
