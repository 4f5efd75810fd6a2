"""`python thinktuning.py` without a command: the demonstration, an ablation, or the novelty test."""

from __future__ import annotations

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
    if args.ablate and args.length_cost:
        raise ValueError("--ablate compares variants without a length cost: give one of the two")
    if args.preset == "mentor" and (args.ablate or args.length_cost):
        raise ValueError("--preset mentor goes with neither --ablate nor --length-cost: leave them out")
    unusual = ((f"-floor{args.floor:g}", args.floor != FLOOR), (f"-cost{args.length_cost:g}", args.length_cost),
               ("-quick", args.quick))
    settings = "".join(name for name, is_so in unusual if is_so)
    config = Config(**dict(DEMO, seed=args.seed, length_cost=args.length_cost, **({"steps": 4} if args.quick else {})))
    config.check()
    out = Path(args.out) if args.out else Path("out") / f"{args.preset}-{args.seed}{settings}"
    writable(out)
    # Matrices this small gain little from more threads, lose a lot on a busy machine, and
    # a run on one repeats exactly however many cores there are.
    torch.set_num_threads(1)
    cache = out if args.out else out.parent
    recipe = dict(RECIPE, seed=args.seed, floor=args.floor, steps=40 if args.quick else RECIPE["steps"])
    setup = Setup(train, evaluate, Tokenizer.builtin(), config, recipe, out, cache, args.quick)
    if args.preset == "mentor":
        return lambda: novelty.compare(setup)
    if args.ablate:
        return lambda: ablate(setup, args.ablate, args.repeats or 3)
    return lambda: demonstrate(setup)
