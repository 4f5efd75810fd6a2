"""`python thinktuning.py` without a command: demonstration, ablation, or novelty test."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from demo import novelty
from demo.ablations import ablate
from demo.base import FLOOR, RECIPE, Setup
from demo.comparison import demonstrate
from run.config import DEMO, Config
from run.record import writable
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
    recipe = dict(RECIPE, seed=args.seed, floor=floor)
    if args.quick:
        config = replace(config, steps=2)
        recipe["steps"] = 40
    config.check()
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
        with live_report(out) as page:
            demonstrate(setup, page)

    return job
