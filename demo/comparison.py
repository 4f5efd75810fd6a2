"""The demonstration: one tiny base model, then GRPO and ThinkTuning from its weights.

`demo.base.READS` lists what the base model reads. Everything else is the program that also trains
real models.
"""

from __future__ import annotations

import copy
import itertools
import random
import time
from dataclasses import replace
from typing import NamedTuple

from data import wordproblems
from data.scores import reflects, score
from data.wordproblems import problem_of, story_of, wrong_day
from demo.base import Setup, base_model, floors, teacher_prompt_scores
from demo.planted import COUNT, examine_planted, named_day, planted_attempts
from demo.printed import chart, planted_table, same_question, table
from run.beside import beside
from run.loop import Loop
from run.record import Run, write_json
from run.screen import note
from show.report import write_report
from teacher import Feedback, make_teacher

METHODS = ("grpo", "thinktuning")
SAMPLED = (  # scores that are also given for sampled responses
    "accuracy",
    "reflection_rate",
    "reflection_rate_first_wrong",
    "reflection_rate_first_right",
    "behaviours",
)
TOO_QUICK = "a quick run only checks that everything runs: it is too short to show anything"
CURVE = dict(eval_every=5, eval_count=100)  # evaluations during training, for the report's curves


class Examined(NamedTuple):
    """What is shown of a model: scores, the greedy responses, the metrics of its training."""

    scores: dict
    records: list
    history: list


def demonstrate(setup: Setup, page):
    """Make the base model, train it by both methods, examine all three, print and write it.

    `page()` writes the report of what there is so far.
    """
    out, clock = setup.out, Clock()
    set_old_results_aside(out)
    base = base_model(setup)
    base.save(out / "base" / "model", setup.tokenizer)
    clock.lap("pretrain")
    # Neither method needs the other: on two cores both train at once.
    with beside(grpo_and_base, setup, base) as wait_for_result:
        trained = by_method(setup, base, "thinktuning", clock, page)
        if trained is None:
            return
        student, of_thinktuning = trained
        planted = examine_planted(student, setup.tokenizer, setup.config.max_tokens, count(setup))
        clock.lap("examining")
        others = wait_for_result()
        clock.lap("waiting")
    if others is None:  # on Windows, where Ctrl-C reaches both processes
        return
    of_base, of_grpo, as_teacher, their_clock = others
    clock.add(their_clock)
    of_base.scores["seconds"] = clock.seconds["pretrain"]
    found = {"base": of_base, "grpo": of_grpo, "thinktuning": of_thinktuning}
    results = {name: one.scores for name, one in found.items()}
    more = dict(seconds=clock.seconds, cpu_seconds=clock.cpu_seconds)
    write_summary(setup, results, teacher_prompt=as_teacher, planted=planted, **more)
    print(f"\n{chart({method: found[method].history for method in METHODS})}")
    print(f"\n{table(results, as_teacher, len(of_base.records))}\n\n{planted_table(planted)}")
    print(f"\n{same_question({name: one.records for name, one in found.items()})}")
    print(f"\n{clock}; models, metrics and transcripts are in {out}/, {out}/report.html shows them")
    if setup.quick:
        print(TOO_QUICK)


def grpo_and_base(setup: Setup, base):
    """The second process's part: train by GRPO and examine that model, then the base.

    Returns what is found of the base and of GRPO's model, the base's scores as the teacher, and a
    clock with the seconds; None if it was stopped.
    """
    clock = Clock()
    trained = by_method(setup, base, "grpo", clock)
    if trained is None:
        return None
    _, of_grpo = trained
    of_base, as_teacher = examine_base(setup, base)
    clock.lap("examining")
    return of_base, of_grpo, as_teacher, clock


def by_method(setup: Setup, base, method, clock, page=lambda: None):
    """Train a copy of `base`; returns it and what is found. None if the training was stopped."""
    config = replace(setup.config, method=method, **CURVE)
    student, history = train_one(setup, base, config, setup.out / method, page)
    clock.lap(method)
    if not save_trained(setup, student, method, history):
        return None
    scores, records = examine(setup, student, held_out_problems(setup))
    clock.lap("examining")
    return student, Examined({**scores, "seconds": clock.seconds[method]}, records, history)


def examine_base(setup: Setup, base):
    """As `examine`, with the floor; and the same weights under the teacher prompt.

    There they read their own attempts, and right ones planted under questions with a trap.
    """
    tokenizer, config = setup.tokenizer, setup.config
    problems, samples = held_out_problems(setup), 2 if setup.quick else 6
    scores, records = examine(setup, base, problems, samples)
    scores |= floors(base, tokenizer, records)
    as_teacher = teacher_prompt_scores(base, tokenizer, records, config)
    for key in ("accuracy", "accuracy_se"):
        scores[f"teacher_prompt_{key}"] = as_teacher[key]
    right = planted_attempts("right", count(setup))
    planted = [(problem_of(one.asked), one.attempt, True) for one in right]
    of_right = teacher_prompt_scores(base, tokenizer, planted, config)
    as_teacher["opinion_accuracy_planted_right"] = of_right["opinion_accuracy"]
    return Examined(scores, records, []), as_teacher


def count(setup: Setup) -> int:
    """Planted attempts of each kind."""
    return 20 if setup.quick else COUNT


class Clock:
    """Seconds, and seconds of CPU, that each part of a run took."""

    def __init__(self):
        self.seconds, self.cpu_seconds = {"total": 0.0}, {"total": 0.0}
        self.last = time.perf_counter(), time.process_time()

    def lap(self, name: str):
        """All since the last lap belonged to this part."""
        now = time.perf_counter(), time.process_time()
        for spent, before, after in zip((self.seconds, self.cpu_seconds), self.last, now):
            spent[name] = spent.get(name, 0.0) + after - before
            spent["total"] += after - before
        self.last = now

    def add(self, other: Clock):
        """The parts of a process that ran at the same time: only its CPU adds to the total."""
        theirs = {**other.seconds, "total": 0.0}
        for spent, more in ((self.seconds, theirs), (self.cpu_seconds, other.cpu_seconds)):
            for name, seconds in more.items():
                spent[name] = spent.get(name, 0.0) + seconds

    def __str__(self):
        parts = ", ".join(f"{n} {s:.0f}" for n, s in self.seconds.items() if n != "total")
        cpu = self.cpu_seconds["total"]
        return f"{self.seconds['total']:.0f} s in all, {cpu:.0f} s of CPU ({parts})"


# Shared with the novelty test and the ablations.


def set_old_results_aside(out):
    """Move what an earlier run has left in `out` into a directory there: it has other models."""
    names = ("summary.json", "report.html", "page.html", "base", *METHODS)
    old = [out / name for name in names if (out / name).exists()]
    if not old:
        return
    places = (out / f"earlier-{number}" for number in itertools.count(1))
    aside = next(place for place in places if not place.exists())
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    print(f"the earlier results in {out} are now in {aside}")


def held_out_problems(setup: Setup, split: str = "test"):
    return wordproblems.problems(split, 20 if setup.quick else None)


def save_trained(setup: Setup, student, method, history) -> bool:
    """Save a trained student; says so and returns False if its training was stopped."""
    directory = setup.out / method / "model"
    student.save(directory, setup.tokenizer)
    if len(history) < setup.config.steps:
        note(f"stopped at step {len(history)}; that model is in {directory}")
        return False
    return True


def write_summary(setup: Setup, results: dict, **more):
    summary = {
        **results,
        **more,
        "seed": setup.config.seed,
        "floor": setup.recipe["floor"],
        "steps": setup.config.steps,
        "quick": setup.quick,
    }
    write_json(setup.out / "summary.json", summary)
    write_report(setup.out)


def train_one(
    setup: Setup,
    base,
    config,
    path=None,
    page=lambda: None,
    *,
    wrap=None,
    name="the demonstration's base",
    **changes,
):
    """Train a copy of `base` by `config.method`; returns it and the metrics of every step.

    The teacher is `base` itself. `wrap(ask, rng)` may replace how it is asked. With `path` the run
    is recorded there, and `name` is what its config.json calls the model; `page()` is called after
    each evaluation. `changes` go to `train`: another `reward`.
    """
    student = copy.deepcopy(base).requires_grad_(True)
    teacher = None
    if config.method == "thinktuning":
        teacher = make_teacher(base, setup.tokenizer, config)
        if wrap:
            teacher.ask = wrap(teacher.ask, random.Random(config.seed))
    run, validation = None, ()
    if path:
        run = Run(path, {"model": name, **vars(config)}, config.method)
        validation = wordproblems.problems("validation", config.eval_count)
    problems = wordproblems.problems("train")
    loop = Loop(problems, config, run=run, validation=validation, page=page)
    history = setup.train(student, setup.tokenizer, loop, teacher, **changes)
    if run:
        run.close()
        write_report(path)
    return student, history


def examine(setup: Setup, student, problems, samples=1):
    """Scores on `problems`, greedy and sampled, and the records of the greedy responses.

    The greedy scores are also split by the number of operations in a problem. `teacher_format` is
    the share of greedy responses that hold one of the teacher's tags: nobody wants the student to
    write these, and no reward forbids it.
    """
    tokenizer, max_tokens = setup.tokenizer, setup.config.max_tokens
    scores, records = setup.evaluate(student, tokenizer, problems, max_tokens=max_tokens)
    for n in sorted({operations(problem) for problem in problems}):
        part = score([record for record in records if operations(record[0]) == n])
        scores[f"accuracy_{n}_operations"] = part["accuracy"]
        scores[f"reflection_{n}_operations"] = part["reflection_rate"]
    sampled, texts = setup.evaluate(
        student, tokenizer, problems, max_tokens=max_tokens, samples=samples, temperature=1.0
    )
    for key in SAMPLED:
        scores[f"sampled_{key}"] = sampled[key]
    scores["sampled_rollouts"] = len(texts)
    scores["names_line"] = names_line(records)
    tagged = [any(f"{name}>" in text for name in Feedback._fields) for _, text, _ in records]
    scores["teacher_format"] = sum(tagged) / len(records)
    return scores, records


def names_line(records) -> float | None:
    """Of the responses that reflect, the share whose reflection names the line that is wrong.

    None if none reflects. A reflection on a right attempt names no wrong line.
    """
    named = []
    for problem, text, _ in records:
        if reflects(text):
            attempt, reflection = at_first_answer(text)
            wrong = wrong_day(story_of(problem), attempt)
            named.append(wrong is not None and named_day(reflection) == wrong)
    return sum(named) / len(named) if named else None


def at_first_answer(text) -> tuple[str, str]:
    """What stands up to the first boxed answer, and what comes after it."""
    end = text.index("}", text.index("\\boxed{")) + 1
    return text[:end], text[end:]


def operations(problem) -> int:
    return problem.question.count(" On ")
