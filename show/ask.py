"""Ask a model one question: watch it think, read a teacher's feedback, or count several answers."""

from __future__ import annotations

import re
import sys

import torch

from data.prompts import spoken, student_prompt
from data.reward import answers, final_answer
from data.scores import vote
from run.config import Config
from run.loading import device_and_dtype, load_model
from run.screen import coloured
from sampler import generate
from teacher import make_teacher


def prepare(args):
    """Check the flags and load the models; returns the job: one answer, or a vote of several."""
    asks_teacher = args.teacher or args.teacher_model
    if asks_teacher and args.samples > 1:
        raise ValueError("the teacher reads one attempt: leave out --samples or the teacher")
    if not args.question.strip():
        raise ValueError("the question is empty")
    device, dtype = device_and_dtype(args)
    model, tokenizer = load_model(args.model, device, dtype, args.compile)
    context = model.config.max_seq_len
    room = context - len(student_prompt(tokenizer, args.question))
    if room < (args.max_tokens or 1):
        shorter = "shorten it"
        if room >= 1:
            shorter += f", or lower --max-tokens to {room} or less"
        raise ValueError(
            f"the question leaves {max(0, room)} tokens of the model's context of {context}: "
            f"{shorter}"
        )
    options = {
        "max_tokens": args.max_tokens or min(1024, room),
        "seed": args.seed,
        "temperature": args.temperature,
    }
    args.memory = "lower --max-tokens"
    if args.temperature is None:
        options["temperature"] = float(args.samples > 1)
    if args.samples > 1:
        args.memory += " or --samples"
        return lambda: print_vote(model, tokenizer, args.question, samples=args.samples, **options)
    teacher = None
    if args.teacher_model:
        teacher = teacher_of(*load_model(args.teacher_model, device, dtype, args.compile))
    elif args.teacher:
        teacher = teacher_of(model, tokenizer)
    return lambda: think_aloud(model, tokenizer, args.question, teacher=teacher, **options)


def teacher_of(model, tokenizer):
    """A teacher that uses the model's whole context, up to three eighths of it for the reply."""
    context = model.config.max_seq_len
    reply = min(Config.teacher_reply, context * 3 // 8)
    return make_teacher(model, tokenizer, Config(teacher_reply=reply, teacher_prompt=context))


def think_aloud(model, tokenizer, question, *, max_tokens, temperature, seed, teacher=None):
    """Print one response as it is sampled, then the teacher's feedback if there is a teacher.

    The teacher reads the response up to any reflection.
    """
    stream = Stream(tokenizer)
    ids = generate(
        model,
        [student_prompt(tokenizer, question)],
        max_tokens=max_tokens,
        stop=tokenizer.stop,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        on_step=stream.add,
    )[0]
    stream.show(tokenizer.decode(stream.ids))  # bytes that never became a character
    print()
    if ids[-1] not in tokenizer.stop:
        print(f"cut off after {max_tokens} tokens", file=sys.stderr)
    if teacher:
        text = spoken(tokenizer, ids)
        print("\n" + shown_feedback(teacher, question, text[: reflection_start(text)]))


def shown_feedback(teacher, question: str, attempt: str) -> str:
    """The teacher's feedback as three lines, or why there is none."""
    feedback = teacher.feedback([question], [attempt])[0]
    if feedback:
        parts = feedback._asdict()
        return "\n".join(f"teacher's {name + ':':<8} {text}" for name, text in parts.items())
    if teacher.dropped:
        why = f"the attempt makes its prompt longer than {teacher.max_prompt} tokens"
    elif teacher.cut:
        why = f"its reply is longer than {teacher.max_tokens} tokens"
    else:
        why = "its reply did not follow the format"
    return f"no feedback from the teacher: {why}"


def print_vote(model, tokenizer, question, *, max_tokens, temperature, seed, samples):
    """Print every sample under its final answer, how often each was given, and the majority's."""
    responses = generate(
        model,
        [student_prompt(tokenizer, question)],
        samples=samples,
        max_tokens=max_tokens,
        stop=tokenizer.stop,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    finished = []
    for i, ids in enumerate(responses, start=1):
        text = spoken(tokenizer, ids)
        heading = f"cut off after {max_tokens} tokens"
        if ids[-1] in tokenizer.stop:
            heading = one_line(final_answer(text) or "no final answer")
            finished.append(text)
        start = reflection_start(text)
        print(f"== sample {i} of {samples}: {heading}\n{text[:start]}{coloured(text[start:])}\n")
    votes = vote(finished)
    counts = [f"{one_line(answer)} ({count})" for answer, count in votes]
    print("votes: " + (", ".join(counts) or "none"))
    if votes:
        print(f"majority: {one_line(votes[0][0])} ({votes[0][1]} of {samples})")


def one_line(text: str) -> str:
    return " ".join(text.split())


class Stream:
    """Prints a response as its tokens come, and what follows the first answer in colour.

    It waits for the rest of a character that is not complete.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def add(self, rows, tokens):
        self.ids += [t for t in tokens.tolist() if t not in self.tokenizer.stop]
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            self.show(text)

    def show(self, text: str):
        start = max(self.shown, reflection_start(text))
        print(text[self.shown : start], coloured(text[start:]), sep="", end="", flush=True)
        self.shown = len(text)


def reflection_start(text: str) -> int:
    """The place of the first blank line after an answer, where a reflection begins; or the end."""
    for gap in re.finditer("\n\n", text):
        if answers(text[: gap.start()]):
            return gap.start()
    return len(text)
