"""`python thinktuning.py` alone (demonstration, ablation, novelty test), and its command `page`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data.files import read_json
from data.tokenizer import Tokenizer
from data.wordproblems import problem_of
from demo import novelty
from demo.ablations import ablate
from demo.base import FLOOR, Setup, recipe_of
from demo.comparison import METHODS, demonstrate
from demo.planted import KINDS, Planted, planted_attempts
from run.config import DEMO, Config
from run.record import writable
from show import page
from show.live import live_report


def prepare(args: argparse.Namespace, train: Callable, evaluate: Callable) -> Callable[[], None]:
    """Check the flags and directories; returns the job to run: one of the three above."""
    floor = FLOOR if args.floor is None else args.floor
    if not 0 <= floor <= 1:
        raise ValueError(f"--floor must be between 0 and 1, not {floor}")
    if args.repeats and not args.ablate:
        raise ValueError("--repeats counts the training seeds of --ablate: give both or neither")
    if args.preset == "mentor" and args.ablate:
        raise ValueError("--preset mentor does not go with --ablate: leave one of them out")
    config = replace(Config(**DEMO), seed=args.seed)
    if args.quick:
        config = replace(config, steps=2)
    config.check()
    recipe = recipe_of(args.seed, floor)
    name = f"{args.preset}-{args.seed}"
    if floor != FLOOR:
        name += f"-floor{floor:g}"
    if args.quick:
        name += "-quick"
    out = Path(args.out or f"out/{name}")
    writable(out)
    # One thread: matrices this small gain little from more, lose a lot on a busy machine, and so a
    # run repeats exactly on any number of cores.
    torch.set_num_threads(1)
    cache = out if args.out else out.parent
    tokenizer, options = Tokenizer.builtin(), (args.quick, args.from_scratch)
    setup = Setup(train, evaluate, tokenizer, config, recipe, out, cache, *options)
    if args.preset == "mentor":
        return lambda: novelty.compare(setup)
    if args.ablate:
        return lambda: ablate(setup, args.ablate, args.repeats or 3)

    def job():
        with live_report(out) as write:
            demonstrate(setup, write)

    return job


def prepare_page(args: argparse.Namespace) -> Callable[[], None]:
    """`page`: read a demonstration's directory; returns the function that writes the page."""
    run = Path(args.run)
    models = models_of(run)
    planted = {
        kind: [of_page(one) for one in planted_attempts(kind, ON_THE_PAGE)] for kind in KINDS
    }
    return page.prepare(Path(args.out or run / "page.html"), models, planted)


def models_of(run: Path) -> dict[str, Path]:
    """The directories of a finished demonstration's models; ValueError if it has not finished."""
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    if not ("planted" in summary and (run / "base").is_dir()):
        raise ValueError(
            f"{run} holds no finished demonstration with its summary.json and models: give the "
            "directory that python thinktuning.py has written, such as out/demo-0"
        )
    return {name: run / name / "model" for name in ("base", *METHODS)}


ON_THE_PAGE = 40  # planted attempts of each kind


def of_page(one: Planted) -> dict[str, str]:
    """A planted attempt as the page stores it."""
    problem = problem_of(one.asked)
    note = f"The misconception is in {one.line}’s line." if one.line else "No line is wrong."
    return {
        "question": problem.question,
        "right": problem.answer,
        "attempt": one.attempt,
        "note": note,
    }
