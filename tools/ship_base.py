"""Put the base model of seed 0 where it comes with the program, demo/base-seed0.

    python thinktuning.py --from-scratch
    python -m tools.ship_base out

Needed after every change to the texts or to the pretraining, together with a new
demo.base.VERSION.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from demo.base import FLOOR, SHIPPED, base_path, recipe_key, recipe_of
from demo.pretraining import new_model, steps_of_rows, train_on_texts

FIRST = 20  # steps of pretraining that a test repeats


def first_losses(recipe: dict, tokenizer: Tokenizer, count: int = FIRST) -> list[float]:
    """The loss of each of the first steps of pretraining."""
    model = new_model(recipe, tokenizer.vocab_size)
    rows = steps_of_rows(recipe, f"pretraining {recipe['seed']} 0", tokenizer)
    return train_on_texts(
        model, tokenizer, recipe, itertools.islice(rows, count), "first steps", lines=1
    )


def ship(cache: Path) -> None:
    """Copy seed 0's base model from `cache`, with what a test needs to check it."""
    torch.set_num_threads(1)
    recipe = recipe_of(0, FLOOR)
    shutil.rmtree(SHIPPED, ignore_errors=True)
    shutil.copytree(base_path(cache, recipe), SHIPPED)
    made = {
        "key": recipe_key(recipe),
        "torch": torch.__version__,
        "first_losses": first_losses(recipe, Tokenizer.builtin()),
    }
    (SHIPPED / "recipe.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
