"""Makes what the experiment needs: python -m examples.smollm2.prepare MODEL_DIR --out OUT

OUT gets train.jsonl, validation.jsonl and test.jsonl (stories; in some of them a friend acts), and
two model directories, student/ and teacher/. Both are MODEL_DIR after supervised training, each on
texts of its own. What OUT has already is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from data.chat import FAMILIES
from data.prompts import spoken, student_prompt
from data.reward import is_correct
from data.scores import reflects
from data.tokenizer import Tokenizer
from data.wordproblems import problem_of, question
from examples.smollm2.stories import SIZES, attempt, reply, some_attempt, stories, story
from grpo import LossSettings, MasterAdamW, Rollout, update
from model import LM
from run.cli import positive
from run.config import Config, RunFailed
from run.errors import run_command
from run.loading import load_model
from run.record import writable
from sampler import generate, prefill
from teacher import Teacher, make_teacher
from thinktuning import evaluate

MAX_TOKENS = 200  # of a response
TEACHER = Config(exemplars=False, teacher_reply=MAX_TOKENS)
ROWS = 8  # texts of an optimizer step
STUDENT_STEPS = 40
TEACHER_STEPS = 120  # of a round
ROUNDS, GATE = 3, 0.85  # the teacher is trained until it reaches the gate, for three rounds at most
LEARNING_RATE = 1e-4
GOES_ON = 10  # one of so many of the student's texts goes on after its answer,
OWN_WORDS = 24  # for so many tokens
OPINION = 10.0  # weight of a reply's opinion in the loss


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    parser.add_argument("--out", metavar="OUT", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=positive, help="of each training, for a quick try")
    return run_command(prepare, parser.parse_args(argv))


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    dtype = getattr(torch, args.dtype)
    pretrained, tokenizer = load_model(args.model, "cpu", dtype, "off")
    writable(args.out)

    def job() -> None:
        write_problems(args.out)
        if not (args.out / "student").exists():
            student = train_student(pretrained, tokenizer, args.steps or STUDENT_STEPS)
            student.save(args.out / "student", tokenizer)
        if not (args.out / "teacher").exists():
            student = LM.load(args.out / "student", "cpu", dtype)
            made = train_teacher(pretrained, student, tokenizer, args.out, args.steps)
            made.rename(args.out / "teacher")

    return job


def write_problems(out: Path) -> None:
    for split in SIZES:
        problems = [problem_of(told)._asdict() for told in stories(split).values()]
        lines = [json.dumps(problem) + "\n" for problem in problems]
        (out / f"{split}.jsonl").write_text("".join(lines))


def supervised(model: LM, batches: Iterable[list[Rollout]], steps: int, falls: bool) -> None:
    """Train on texts, token by token: with Â = 1 the loss −Â·log π is the cross-entropy.

    `falls`: in the second half of the steps the learning rate falls to 0.
    """
    model.requires_grad_(True)
    optimizer = MasterAdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    settings = LossSettings(shaping="likelihood", guided_tokens="trajectory", micro_batch=4096)
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE
        if falls:
            optimizer.param_groups[0]["lr"] *= min(1.0, 2 * (steps - step) / steps)
        for text in batch:
            # All of it counts as guided, so π_old has no part in its loss, and need not be known.
            text.old_logprobs = [0.0] * len(text.response)
        loss = update(model, optimizer, batch, settings=settings)["loss"]
        seconds = time.perf_counter() - began
        print(f"  step {step + 1}  loss {loss:.3f}  {seconds:.0f} s", flush=True)


def learned(tokenizer: Tokenizer, prompt: list[int], said: str) -> Rollout:
    """A text as `supervised` reads it: what is to be said after the prompt, and the end token."""
    response = tokenizer.encode(said) + [end_token(tokenizer)]
    return Rollout(prompt, response, finished=True, guided_from=0, advantage=1.0)


def end_token(tokenizer: Tokenizer) -> int:
    return tokenizer.special[FAMILIES[tokenizer.family].end]


# The student.


def train_student(pretrained: LM, tokenizer: Tokenizer, steps: int) -> LM:
    """It learns to work stories out line by line, rightly, and none of them has a friend in it."""
    student = copy.deepcopy(pretrained)
    print(f"the student: {steps} steps of {ROWS} stories")
    supervised(student, student_texts(pretrained, tokenizer, steps), steps, falls=False)
    return student


def student_texts(pretrained: LM, tokenizer: Tokenizer, steps: int) -> Iterator[list[Rollout]]:
    rng = random.Random("student")
    texts = []
    for _ in range(steps * ROWS):
        told = story(rng, "train", traps=())
        prompt = student_prompt(tokenizer, question(told))
        texts.append(learned(tokenizer, prompt, attempt(told).text))
    go_on(pretrained, tokenizer, texts[::GOES_ON])
    for start in range(0, len(texts), ROWS):
        yield texts[start : start + ROWS]


def go_on(pretrained: LM, tokenizer: Tokenizer, texts: list[Rollout]) -> None:
    """In place of the end token: what the pretrained model says if it does not end there.

    Without such texts the student would forget that a text can go on after an answer.
    """
    generator = torch.Generator().manual_seed(0)
    begun = [row.prompt + row.response[:-1] for row in texts]
    _, logits = prefill(pretrained, begun)  # (Q, vocab)
    logits[:, list(tokenizer.stop)] = -torch.inf
    first = logits.float().softmax(-1).multinomial(1, generator=generator)  # (Q, 1)
    begun = [ids + token for ids, token in zip(begun, first.tolist())]
    words = generate(
        pretrained, begun, max_tokens=OWN_WORDS, stop=tokenizer.stop, generator=generator
    )
    for row, ids, more in zip(texts, begun, words):
        goes_on = ids[len(row.prompt) :] + more
        if not reflects(spoken(tokenizer, goes_on)):  # no text that it reads has a second answer
            row.response = goes_on


# The teacher.


def train_teacher(
    pretrained: LM, student: LM, tokenizer: Tokenizer, out: Path, steps: int | None
) -> Path:
    """It learns the format of a reply, and to find the wrong line of an attempt.

    Rounds follow until it is good enough on the student's own attempts at validation problems. Each
    leaves a model directory in `out`: that of the last one is returned, and what was stopped goes
    on behind the last one. Raises RunFailed if ROUNDS rounds are not enough.
    """
    model = copy.deepcopy(pretrained)
    records = student_attempts(student, tokenizer)
    for i in range(1 if steps else ROUNDS):
        made = out / f"teacher-round-{i + 1}"
        if made.exists():
            model = LM.load(made, "cpu", pretrained.embed.weight.dtype)
            continue
        count = steps or TEACHER_STEPS
        print(f"the teacher, round {i + 1}: {count} steps of {ROWS} replies")
        teacher = make_teacher(model, tokenizer, TEACHER)
        supervised(model, teacher_texts(teacher, f"teacher {i}", count), count, falls=True)
        model.save(made, tokenizer)
        solves, judges = teacher_scores(make_teacher(model, tokenizer, TEACHER), records)
        print(f"  it solves {solves:.3f} of the problems; its opinion is right in {judges:.3f}")
        if steps or min(solves, judges) >= GATE:
            return made
    raise RunFailed(
        f"after {ROUNDS} rounds the teacher is below {GATE:.0%}: "
        f"to use it all the same, rename {made} to {out / 'teacher'}"
    )


def teacher_texts(teacher: Teacher, seed: str, steps: int) -> Iterator[list[Rollout]]:
    rng = random.Random(seed)
    for _ in range(steps):
        batch = []
        for _ in range(ROWS):
            told = story(rng, "train")
            tried = some_attempt(rng, told)
            prompt = teacher.prompt(question(told), tried.text)
            whole = learned(teacher.tokenizer, prompt, reply(rng, told, tried.wrong))
            opinion = "correct" if tried.wrong is None else "incorrect"
            first = len(teacher.tokenizer.encode(f"<opinion>{opinion}"))
            # The opinion is one token of a hundred, and all that follows depends on it.
            batch += [whole, replace(whole, response=whole.response[:first], advantage=OPINION)]
        yield batch


def student_attempts(student: LM, tokenizer: Tokenizer, count: int = 100):
    problems = [problem_of(told) for told in stories("validation").values()][:count]
    return evaluate(student, tokenizer, problems, max_tokens=MAX_TOKENS, rows=50)[1]


def teacher_scores(teacher: Teacher, records) -> tuple[float, float]:
    """The shares of the student's attempts about which its answer, and its opinion, is right."""
    replies = teacher.feedback(
        [p.question for p, _, _ in records], [said for _, said, _ in records]
    )
    solved, judged = 0, 0
    for feedback, (problem, said, _) in zip(replies, records):
        if feedback:
            solved += is_correct(feedback.phrase, problem.answer)
            judged += (feedback.opinion == "correct") == is_correct(said, problem.answer)
    return solved / len(records), judged / len(records)


if __name__ == "__main__":
    sys.exit(main())
