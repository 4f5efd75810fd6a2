"""The demonstration's base model: its texts, its pretraining, its validation, its cache on disk."""

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
    """What every part of the demonstration needs. `train` and `evaluate` are thinktuning.py's."""

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
    warmup=100,  # steps
    decay=0.45,  # share of the steps, at the end
    # Texts of each kind in a step; READS says what they are.
    student_rows=14,
    teacher_rows=6,
    transcript_rows=3,
    ledger_rows=4,
    remark_rows=2,
    student_weight=2.0,  # in the loss; a token of any other text has weight 1
)
FLOOR = 0.01  # share of the student's texts that go on after the answer
# Raise VERSION with every change to the texts or the training that gives other weights. Base models
# in the cache are then made anew.
VERSION = 1
# Pretraining is repeated, up to CYCLES times, until the base model solves this share of the
# validation problems under the teacher prompt.
GATE = 0.85
CYCLES = 3
READS = (
    "{student_rows} student texts: a question, a one-line answer, the end; "
    "a share of {floor:g} go on with an unrelated remark",
    "{remark_rows} student remarks: only such a remark, after an answer and a blank line "
    "(left out at --floor 0)",
    "{teacher_rows} teacher texts: a question, somebody's attempt (40% right), "
    "then opinion (20% mistaken), reason, phrase",
    "{transcript_rows} narrator transcripts: an attempt (40% right) and the reflection on it, "
    "as one text of a third role",
    "{ledger_rows} worked ledgers: that third role tells a problem of 1 to 6 operations itself "
    "and works it out",
)


def base_model(setup: Setup) -> tuple[LM, dict[str, float]]:
    """The base model of a recipe, and the seconds that making it took (0 from the cache)."""
    path = setup.cache / f"base-{recipe_key(setup.recipe)}"
    print("A training step of the base model reads, about training problems only:")
    for line in READS:
        print("  - " + line.format(**setup.recipe))
    if path.exists():
        print(f"cached in {path}")
        try:
            return LM.load(path), {"pretrain": 0.0}
        except (ValueError, OSError) as error:
            raise RunFailed(f"the cached base model is damaged ({error}); delete {path}") from None
    began = time.perf_counter()
    base = pretrain_until_good(setup)
    base.save(path, setup.tokenizer)
    return base, {"pretrain": time.perf_counter() - began}


def pretrain_until_good(setup: Setup) -> LM:
    """Pretrain in rounds until GATE is reached. Raises RunFailed after CYCLES rounds without it."""
    base = None
    for cycle in range(1 if setup.quick else CYCLES):
        if cycle:
            print(f"below {GATE:.2f}: pretraining goes on for round {cycle + 1} of {CYCLES}")
        base = pretrain(setup.recipe, setup.tokenizer, cycle, base)
        scores = gate(setup, base)
        print(
            f"validation: {scores['student']:.2f} right as student, "
            f"{scores['teacher']:.2f} under the teacher prompt"
        )
        if scores["teacher"] >= GATE or setup.quick:
            return base
    raise RunFailed(
        f"after {CYCLES} rounds of pretraining the base model solves {scores['teacher']:.0%} of "
        f"validation problems under the teacher prompt; a useful teacher needs {GATE:.0%}. "
        "Try another --seed"
    )


def recipe_key(recipe: dict) -> str:
    """A hash of all that makes a base model: recipe, vocabulary, VERSION and torch's version."""
    vocabulary = Path(wordproblems.__file__).with_suffix(".tiktoken").read_bytes()
    made_from = [recipe, hashlib.sha256(vocabulary).hexdigest(), VERSION, torch.__version__]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]


# Pretraining.


def pretrain(recipe: dict, tokenizer, cycle=0, model: LM | None = None) -> LM:
    """One round of training on fresh texts, from `model` or from random weights."""
    torch.manual_seed(recipe["seed"])
    rng = random.Random(f"pretraining {recipe['seed']} {cycle}")
    if model is None:
        model = new_model(recipe, tokenizer.vocab_size)
    model.requires_grad_(True)  # validation froze it, because there it was a teacher
    steps = recipe["steps"]

    def learning_rate(step):
        rising = (step + 1) / recipe["warmup"]
        falling = (steps - step) / (recipe["decay"] * steps)
        return recipe["learning_rate"] * min(1, rising, falling)

    def rows(step):
        return rows_of_step(recipe, step, rng, tokenizer)

    train_on_texts(model, steps, learning_rate, rows, "pretraining", lines=6)
    return model


def new_model(recipe: dict, vocab_size: int) -> LM:
    # Embeddings of standard deviation 1 (torch's default) and wide heads let the model learn to
    # copy numbers within these few steps.
    heads = recipe["n_heads"]
    config = ModelConfig(
        vocab_size,
        recipe["dim"],
        recipe["n_layers"],
        heads,
        heads,
        recipe["dim"] // heads,
        recipe["ffn_dim"],
        max_seq_len=320,
    )
    return LM(config)


def train_on_texts(model, steps, learning_rate, rows, label, lines):
    """Train on the texts rows(step) at learning_rate(step).

    Without a terminal, about `lines` lines report the progress.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = response_loss(model, rows(step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        left = (time.perf_counter() - began) / done * (steps - done)
        progress(
            f"{label} {done}/{steps}  loss {loss:.3f}  {clock(left)} left",
            last=done == steps,
            plain=done % max(1, steps // lines) == 0,
        )


def rows_of_step(recipe, step, rng, tokenizer):
    """One step's texts as (prompt ids, response ids, weight of a response token in the loss)."""

    def story(operations=None):
        operations = operations or wordproblems.draw_operations(rng)
        return wordproblems.make_story(rng, operations, "train")

    # The order below is the order of the random draws: another order makes another base model.
    texts = []
    for _ in range(recipe["student_rows"]):
        text = wordproblems.student_row(rng, story(), recipe["floor"])
        texts.append((text, recipe["student_weight"]))
    for _ in range(recipe["teacher_rows"]):
        texts.append((wordproblems.teacher_row(rng, story()), 1.0))
    for _ in range(recipe["transcript_rows"]):
        texts.append((wordproblems.transcript_row(rng, story()), 1.0))
    # The length of ledgers varies, because the model would solve a fixed length by position alone.
    longest = min(6, 2 + 10 * step // recipe["steps"])
    for _ in range(recipe["ledger_rows"]):
        texts.append((wordproblems.ledger_row(rng, story(rng.randint(1, longest))), 1.0))
    if recipe["floor"]:
        for _ in range(recipe["remark_rows"]):
            texts.append((wordproblems.remark_row(rng, story()), 1.0))
    return [(*ids_of(text, tokenizer), weight) for text, weight in texts]


def ids_of(text: wordproblems.Text, tokenizer) -> tuple[list[int], list[int]]:
    """A text's prompt ids and response ids. The response ends with the end token."""
    prompt = tokenizer.render(text.messages, text.role) + tokenizer.encode(text.begun)
    response = tokenizer.encode(text.text) + [tokenizer.special["<|end|>"]]
    return prompt, response


def response_loss(model, rows) -> float:
    """The weighted mean cross-entropy of the response tokens; leaves its gradient in the model.

    Shorter and longer texts go through the model as two batches, which saves padding.
    """
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    total = sum(len(response) * weight for _, response, weight in rows)
    middle = len(rows) // 2
    result = 0.0
    for half in (rows[:middle], rows[middle:]):
        tokens, weights = padded(half)
        counts = weights[:, 1:] > 0  # (B, T-1): the tokens that are predicted and count
        logits = model.head(model.hidden(tokens[:, :-1])[counts])
        losses = F.cross_entropy(logits, tokens[:, 1:][counts], reduction="none")
        loss = (losses * weights[:, 1:][counts]).sum() / total
        loss.backward()
        result += loss.item()
    return result


def padded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their weights in the loss, both (B, T); prompts and padding weigh 0."""
    width = max(len(prompt) + len(response) for prompt, response, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    weights = torch.zeros(len(rows), width)
    for i, (prompt, response, weight) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(prompt + response)
        weights[i, len(prompt) : end] = weight
    return tokens, weights


# Validation.


def gate(setup: Setup, base, count=200) -> dict[str, float]:
    """The base model's accuracy on validation problems, as the student and as the teacher.

    As the teacher it reads the attempts that it made as the student.
    """
    config = Config(**DEMO)
    problems = load_problems("wordproblems", "validation")[:count]
    scores, records = setup.evaluate(base, setup.tokenizer, problems, max_tokens=config.max_tokens)
    reference = teacher_prompt_scores(base, setup.tokenizer, problems, records, config)
    return {"student": scores["accuracy"], "teacher": reference["teacher_prompt_accuracy"]}


def teacher_prompt_scores(base, tokenizer, problems, records, config) -> dict[str, float]:
    """The accuracy of the same weights under the teacher prompt, given the base's own attempts."""
    questions = [problem.question for problem in problems]
    attempts = [text for _, text, _ in records]
    replies = make_teacher(base, tokenizer, config).feedback(questions, attempts)
    right = []
    for feedback, problem in zip(replies, problems):
        right.append(feedback is not None and is_correct(feedback.phrase, problem.answer))
    accuracy, se = mean_and_se([float(r) for r in right])
    return {"teacher_prompt_accuracy": accuracy, "teacher_prompt_accuracy_se": se}
