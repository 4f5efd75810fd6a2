"""The demonstration's base model: what it reads, its pretraining, the gate it must pass, its cache on disk."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import load_problems, wordproblems
from data.reward import is_correct
from data.scores import mean_and_se
from data.tokenizer import Tokenizer
from model import LM, ModelConfig
from run.config import DEMO, Config, RunFailed
from run.screen import clock, progress
from teacher import make_teacher


@dataclass(frozen=True)
class Setup:
    """What every part of the demonstration is handed; `train` and `evaluate` are the program's own (thinktuning.py)."""

    train: Callable
    evaluate: Callable
    tokenizer: Tokenizer
    config: Config
    recipe: dict
    out: Path
    cache: Path  # where base models are kept
    quick: bool


RECIPE = dict(
    dim=96,
    n_layers=3,
    n_heads=2,
    ffn_dim=256,
    steps=1300,
    learning_rate=3e-3,
    warmup=100,
    decay=0.45,
    student_rows=14,
    teacher_rows=6,
    transcript_rows=3,
    ledger_rows=4,
    remark_rows=2,
    student_weight=2.0,
)
FLOOR = 0.01
# Raise it with every change to the base's texts or training that gives other weights: cached base models are then made anew.
VERSION = 1
GATE, CYCLES = (
    0.85,
    3,
)  # pretraining goes round again until the teacher prompt solves so many validation problems
READS = (  # with the rows a step of each
    "{student_rows} student texts: a question, a one-line answer, the end; a share of {floor:g} go on with an unrelated remark",
    "{remark_rows} student remarks: only such a remark, after an answer and a blank line (left out at --floor 0)",
    "{teacher_rows} teacher texts: a question, somebody's attempt (40% right), then opinion (20% mistaken), reason, phrase",
    "{transcript_rows} mentor transcripts: an attempt (40% right) and the reflection on it, as one text of a third role",
    "{ledger_rows} worked ledgers: that third role tells a problem of 1 to 6 operations itself and works it out",
)


def base_model(setup: Setup) -> tuple[LM, dict[str, float]]:
    """The base model for a recipe, from the cache if everything that made it is unchanged; and the seconds it took."""
    recipe, tokenizer, quick = setup.recipe, setup.tokenizer, setup.quick
    path = setup.cache / f"base-{recipe_key(recipe)}"
    print(
        "The base model reads, about training problems only:",
        *(f"  - {line.format(**recipe)}" for line in READS),
        sep="\n",
    )
    if path.exists():
        print(f"cached in {path}")
        try:
            return LM.load(path), {"pretrain": 0.0}
        except (ValueError, OSError) as error:
            raise RunFailed(f"the cached base model is damaged ({error}); delete {path}") from None
    began, base = time.perf_counter(), None
    for cycle in range(1 if quick else CYCLES):
        if cycle:
            print(f"below {GATE:.2f}: pretraining goes round again ({cycle + 1} of {CYCLES})")
        base = pretrain(recipe, tokenizer, cycle, base)
        scores = gate(setup, base)
        print(
            f"validation: {scores['student']:.2f} right as student, {scores['teacher']:.2f} under the teacher prompt"
        )
        if scores["teacher"] >= GATE or quick:
            break
    else:
        raise RunFailed(
            f"after {CYCLES} rounds of pretraining the base model solves {scores['teacher']:.0%} of validation "
            f"problems under the teacher prompt; {GATE:.0%} is needed for a teacher worth listening to. "
            "Try another --seed"
        )
    base.save(path, tokenizer)
    return base, {"pretrain": time.perf_counter() - began}


def recipe_key(recipe: dict) -> str:
    """Names a base model by what makes it: the recipe, the vocabulary, VERSION (texts and training) and torch's version."""
    vocabulary = Path(wordproblems.__file__).with_suffix(".tiktoken").read_bytes()
    made_from = [recipe, hashlib.sha256(vocabulary).hexdigest(), VERSION, torch.__version__]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]


def pretrain(recipe: dict, tokenizer, cycle=0, model: LM | None = None) -> LM:
    """One round of training on fresh texts, from `model` or from nothing."""
    torch.manual_seed(recipe["seed"])
    rng = random.Random(f"pretraining {recipe['seed']} {cycle}")
    heads = recipe["n_heads"]
    # Embeddings of standard deviation 1 (torch's default) and wide heads are what makes copying numbers emerge in time.
    model = model or LM(
        ModelConfig(
            tokenizer.vocab_size,
            recipe["dim"],
            recipe["n_layers"],
            heads,
            heads,
            recipe["dim"] // heads,
            recipe["ffn_dim"],
            max_seq_len=320,
        )
    )
    model.requires_grad_(True)  # the gate's teacher froze it
    steps = recipe["steps"]

    def rate(step):
        return recipe["learning_rate"] * min(
            1, (step + 1) / recipe["warmup"], (steps - step) / (recipe["decay"] * steps)
        )

    read(
        model,
        steps,
        rate,
        lambda step: rows_of_step(recipe, step, rng, tokenizer),
        "pretraining",
        lines=6,
    )
    return model


def read(model, steps, rate, rows, label, lines):
    """Train on the texts rows(step) at the learning rate rate(step); where no terminal is, some `lines` tell how far it is."""
    optimizer, began = (
        torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01),
        time.perf_counter(),
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = response_loss(model, rows(step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        left = (time.perf_counter() - began) / (step + 1) * (steps - step - 1)
        progress(
            f"{label} {step + 1}/{steps}  loss {loss:.3f}  {clock(left)} left",
            last=step + 1 == steps,
            plain=(step + 1) % max(1, steps // lines) == 0,
        )


def rows_of_step(recipe, step, rng, tokenizer):
    """One step's texts as (prompt ids, response ids, weight of a token)."""

    def story(operations=None):
        return wordproblems.make_story(
            rng, operations or wordproblems.draw_operations(rng), "train"
        )

    longest = min(
        6, 2 + 10 * step // recipe["steps"]
    )  # ledgers of one fixed length would be solved by position
    rows = [
        (wordproblems.student_row(rng, story(), recipe["floor"]), recipe["student_weight"])
        for _ in range(recipe["student_rows"])
    ]
    rows += [(wordproblems.teacher_row(rng, story()), 1.0) for _ in range(recipe["teacher_rows"])]
    rows += [
        (wordproblems.transcript_row(rng, story()), 1.0) for _ in range(recipe["transcript_rows"])
    ]
    rows += [
        (wordproblems.ledger_row(rng, story(rng.randint(1, longest))), 1.0)
        for _ in range(recipe["ledger_rows"])
    ]
    rows += [
        (wordproblems.remark_row(rng, story()), 1.0)
        for _ in range(recipe["remark_rows"] if recipe["floor"] else 0)
    ]
    end = [tokenizer.special["<|end|>"]]
    return [
        (
            tokenizer.render(r.messages, r.role) + tokenizer.encode(r.begun),
            tokenizer.encode(r.text) + end,
            weight,
        )
        for r, weight in rows
    ]


def response_loss(model, rows) -> float:
    """Weighted mean cross-entropy of the response tokens; leaves the gradient in the model. Two halves by length save padding."""
    rows = sorted(rows, key=lambda r: len(r[0]) + len(r[1]))
    total = sum(len(response) * weight for _, response, weight in rows)
    result = 0.0
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        width = max(len(p) + len(r) for p, r, _ in half)
        tokens, weights = (
            torch.zeros(len(half), width, dtype=torch.int64),
            torch.zeros(len(half), width),
        )
        for i, (prompt, response, weight) in enumerate(half):
            tokens[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            weights[i, len(prompt) : len(prompt) + len(response)] = weight
        where = weights[:, 1:] > 0
        logits = model.head(model.hidden(tokens[:, :-1])[where])
        loss = (
            F.cross_entropy(logits, tokens[:, 1:][where], reduction="none") * weights[:, 1:][where]
        ).sum() / total
        loss.backward()
        result += loss.item()
    return result


def gate(setup: Setup, base, count=200) -> dict[str, float]:
    """How often the base model is right on validation problems as the student and, reading that attempt, as the teacher."""
    config = Config(**DEMO)
    problems = load_problems("wordproblems", "validation")[:count]
    scores, records = setup.evaluate(base, setup.tokenizer, problems, max_tokens=config.max_tokens)
    reference = teacher_prompt_scores(base, setup.tokenizer, problems, records, config)
    return {"student": scores["accuracy"], "teacher": reference["teacher_prompt_accuracy"]}


def teacher_prompt_scores(base, tokenizer, problems, records, config) -> dict[str, float]:
    """The reference: the same weights under the teacher prompt, reading the base's own attempts."""
    replies = make_teacher(base, tokenizer, config).feedback(
        [p.question for p in problems], [text for _, text, _ in records]
    )
    accuracy, se = mean_and_se(
        [float(f is not None and is_correct(f.phrase, p.answer)) for f, p in zip(replies, problems)]
    )
    return {"teacher_prompt_accuracy": accuracy, "teacher_prompt_accuracy_se": se}
