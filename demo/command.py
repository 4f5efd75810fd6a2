"""`python thinktuning.py` without a command: the demonstration, an ablation, or the novelty test."""

from __future__ import annotations

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


def prepare(args, train, evaluate):
    """Check the flags and directories; returns the demonstration (or an ablation) as a function to call."""
    if not 0 <= args.floor <= 1:
        raise ValueError(f"--floor must be between 0 and 1, not {args.floor}")
    if args.repeats and not args.ablate:
        raise ValueError("--repeats counts the training seeds of --ablate: give both or neither")
    if args.preset == "mentor" and args.ablate:
        raise ValueError("--preset mentor does not go with --ablate: leave one of them out")
    config = Config(**DEMO)
    config = replace(config, seed=args.seed, steps=4 if args.quick else config.steps)
    config.check()
    name = f"{args.preset}-{args.seed}"
    if args.floor != FLOOR:
        name += f"-floor{args.floor:g}"
    if args.quick:
        name += "-quick"
    out = Path(args.out or f"out/{name}")
    writable(out)
    # Matrices this small gain little from more threads, lose a lot on a busy machine, and
    # a run on one repeats exactly however many cores there are.
    torch.set_num_threads(1)
    cache = out if args.out else out.parent
    recipe = dict(
        RECIPE, seed=args.seed, floor=args.floor, steps=40 if args.quick else RECIPE["steps"]
    )
    setup = Setup(train, evaluate, Tokenizer.builtin(), config, recipe, out, cache, args.quick)
    if args.preset == "mentor":
        return lambda: novelty.compare(setup)
    if args.ablate:
        return lambda: ablate(setup, args.ablate, args.repeats or 3)
    return lambda: demonstrate(setup)
