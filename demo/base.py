"""The demonstration's base model: its recipe, the gate that it must pass, where it is kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import load_problems, wordproblems
from data.prompts import student_prompt
from data.reward import is_correct
from data.scores import mean_and_se
from data.tokenizer import Tokenizer
from demo.pretraining import pretrain
from demo.texts import WORDING
from model import LM
from run.config import DEMO, Config, RunFailed
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
    from_scratch: bool = False


FLOOR = 0.005  # share of a blank line in what the loss wants after an attempt
RECIPE = dict(
    dim=96,
    n_layers=3,
    n_heads=2,
    ffn_dim=256,
    steps=1350,
    muon_rate=0.02,  # learning rate of the matrices
    adamw_rate=3e-3,  # and of everything else
    warmup=60,  # steps
    decay=0.5,  # share of the steps, at the end
    # Texts of each kind in a step; READS says what they are.
    conversations=8,
    transcripts=5,
    right_attempts=0.3,  # share of the attempts at a story with a trap that avoid it
    remark_every=35,  # conversations from one remark to the next
)
# Raise VERSION with every change to the texts or the training that gives other weights. Base models
# in the cache are then made anew, and the shipped one must be (tools/ship_base.py).
VERSION = 3
SHIPPED = Path(__file__).parent / "base-seed0"
# Pretraining is repeated until the base model reaches both as the teacher, on validation problems;
# and until it begins few reflections. From a student that samples some, RL alone could learn them.
GATE = {"teacher": 0.90, "opinion": 0.95}  # shares of problems solved, of attempts judged rightly
LEAK = 1e-4  # the largest mean probability that it begins one after its own wrong attempt
CYCLES = 3  # rounds at most
READS = (
    "{conversations} conversations: a question, an attempt, the teacher's reply. At a trap the "
    "attempt falls into it; or ({right_attempts:.0%}) it is right, and then the student does not "
    "learn it",
    "one attempt in {remark_every} goes on with an unrelated remark (none at --floor 0); after an "
    "attempt a blank line has the share {floor:g} of the end token's weight",
    "{transcripts} transcripts of a third role, the narrator: somebody's attempt and, if it is "
    "wrong, the reflection on it as one text",
)


def base_model(setup: Setup) -> LM:
    """The base model of a recipe: the one that is shipped, or kept in the cache, or made now.

    A quick run makes it in a few steps.
    """
    print("A training step of the base model reads, about training problems only:")
    for line in READS:
        print("  - " + line.format(**setup.recipe))
    if not setup.from_scratch and shipped_key() == recipe_key(setup.recipe):
        print(f"the base model of this recipe comes with the program: {SHIPPED}")
        return undamaged(SHIPPED, "restore")
    if setup.quick:
        setup = replace(setup, recipe={**setup.recipe, "steps": 10})
    path = base_path(setup.cache, setup.recipe)
    if not setup.from_scratch and path.exists():
        print(f"cached in {path}")
        return undamaged(path, "delete")
    base = pretrain_until_good(setup)
    shutil.rmtree(path, ignore_errors=True)
    base.save(path, setup.tokenizer)
    return base


def undamaged(path: Path, remedy: str) -> LM:
    try:
        return LM.load(path)
    except (ValueError, OSError) as error:
        raise RunFailed(f"the base model is damaged ({error}); {remedy} {path}") from None


def recipe_of(seed: int, floor: float) -> dict:
    """The recipe of a demonstration's base model."""
    return dict(RECIPE, seed=seed, floor=floor)


def base_path(cache: Path, recipe: dict) -> Path:
    """Where a base model is kept. Another version of torch may round differently."""
    return cache / f"base-{recipe_key(recipe)}-torch{torch.__version__}"


def recipe_key(recipe: dict) -> str:
    """A hash of all that makes a base model: recipe, vocabulary and VERSION."""
    vocabulary = Path(wordproblems.__file__).with_suffix(".tiktoken").read_bytes()
    made_from = [recipe, hashlib.sha256(vocabulary).hexdigest(), VERSION]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]


def shipped_key() -> str | None:
    """The hash of the recipe that the shipped base model was made by; None if it is not there."""
    file = SHIPPED / "recipe.json"
    return json.loads(file.read_text())["key"] if file.exists() else None


def pretrain_until_good(setup: Setup) -> LM:
    """Pretrain in rounds until GATE is reached. Raises RunFailed after CYCLES rounds without it."""
    base = None
    for cycle in range(1 if setup.quick else CYCLES):
        if cycle:
            print(f"below the gate: pretraining goes on for round {cycle + 1} of {CYCLES}")
        base = pretrain(setup.recipe, setup.tokenizer, cycle, base)
        scores = gate(setup, base, 20 if setup.quick else 200)
        print(
            "validation: {student:.3f} right as student, {teacher:.3f} under the teacher prompt, "
            "whose opinion is right in {opinion:.3f}; goes on after an attempt with probability "
            "{floor:.4f}, begins a reflection after a wrong one with {leak:.1e}".format_map(scores)
        )
        able = all(scores[name] >= least for name, least in GATE.items())
        if setup.quick or able and scores["leak"] <= LEAK:
            return base
    raise RunFailed(
        f"after {CYCLES} rounds of pretraining the base model solves {scores['teacher']:.0%} of "
        f"validation problems under the teacher prompt and judges {scores['opinion']:.0%} of the "
        f"attempts rightly, where a useful teacher needs {GATE['teacher']:.0%} and "
        f"{GATE['opinion']:.0%}; as the student it begins a reflection with probability "
        f"{scores['leak']:.1e}, where {LEAK:.0e} is allowed. Try another --seed"
    )


# Validation.


def gate(setup: Setup, base: LM, count: int) -> dict[str, float]:
    """The base model as student and as teacher, on validation problems; and its floor."""
    config = Config(**DEMO)
    problems = load_problems("wordproblems", "validation")[:count]
    scores, records = setup.evaluate(base, setup.tokenizer, problems, max_tokens=config.max_tokens)
    teacher = teacher_prompt_scores(base, setup.tokenizer, records, config)
    found = floors(base, setup.tokenizer, records)
    return {
        "student": scores["accuracy"],
        "teacher": teacher["accuracy"],
        "opinion": teacher["opinion_accuracy"],
        "floor": found["floor"] or 0.0,
        "leak": found["begins_reflection"] or 0.0,
    }


def teacher_prompt_scores(base, tokenizer, records, config) -> dict[str, float]:
    """The same weights under the teacher prompt, reading the base's own attempts (`records`)."""
    questions = [problem.question for problem, _, _ in records]
    attempts = [text for _, text, _ in records]
    replies = make_teacher(base, tokenizer, config).feedback(questions, attempts)
    right, agreed = [], []
    for feedback, (problem, attempt, _) in zip(replies, records):
        right.append(feedback is not None and is_correct(feedback.phrase, problem.answer))
        opinion = feedback.opinion if feedback else ""
        truth = "correct" if is_correct(attempt, problem.answer) else "incorrect"
        agreed.append(opinion == truth)
    accuracy, se = mean_and_se([float(r) for r in right])
    return {
        "accuracy": accuracy,
        "accuracy_se": se,
        "opinion_accuracy": sum(agreed) / len(agreed),
    }


@torch.no_grad()
def floors(model: LM, tokenizer: Tokenizer, records) -> dict[str, float | None]:
    """Mean probabilities after the model's own attempts; None over no attempt.

    Of a blank line: after all (`floor`), after the wrong ones, after the right ones. And of a blank
    line with the first word of a reflection, after the wrong ones (`begins_reflection`).
    """
    (blank_line,) = tokenizer.encode("\n\n")
    first_words = list({tokenizer.encode(reason)[0] for _, reason in WORDING.values()})
    found: dict[str, list[float]] = {
        name: [] for name in ("floor", "floor_wrong", "floor_right", "begins_reflection")
    }
    for problem, text, _ in records:
        ids = student_prompt(tokenizer, problem.question) + tokenizer.encode(text)
        at_end, after_it = model(torch.tensor([[*ids, blank_line]]))[0, -2:].softmax(-1)
        goes_on = at_end[blank_line].item()
        found["floor"].append(goes_on)
        if is_correct(text, problem.answer):
            found["floor_right"].append(goes_on)
        else:
            found["floor_wrong"].append(goes_on)
            found["begins_reflection"].append(goes_on * after_it[first_words].sum().item())
    return {name: sum(shares) / len(shares) if shares else None for name, shares in found.items()}
