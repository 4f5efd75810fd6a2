"""One HTML file to play with: the three models of a demonstration, run in the browser.

    python thinktuning.py page RUN [--out FILE]

The page asks no network for anything. It stores the weights of the base model as float32, and of
the two trained models what training has changed: each weight's change as a 16-bit number of steps,
of which 32,767 are the largest change of that model. So a weight differs by half a step at most,
and by float32's own rounding. show/page.js runs the models. Texts travel as JSON, and page.js shows
them as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data import load_problems
from data.files import regular
from data.vocabulary import read_vocabulary
from data.weights import read_config
from model import LM, ModelConfig
from run.config import DEMO
from run.loading import load_model
from show.plan import parameters
from show.report import METHODS, PLANTED, STYLE, check_file, write_page

HERE = Path(__file__).parent
SCRIPT = (HERE / "page.js").read_text(encoding="utf-8")
STYLES = STYLE + (HERE / "page.css").read_text(encoding="utf-8")
VOCABULARY = "wordproblems.tiktoken"
MOST_PARAMETERS = 440_000  # of a model: the three take some 10.7 bytes for each, and the page 5 MB
LARGEST = 32_767  # of 16-bit numbers
PROBLEMS = 200
ABOUT = {  # what is said of each model
    "base": "before training",
    "grpo": "trained without a teacher",
    "thinktuning": "trained with a teacher at first",
}


def prepare(
    out: Path, paths: dict[str, Path], planted: dict[str, list[dict]]
) -> Callable[[], None]:
    """Make the page of a finished demonstration; returns the function that writes it.

    `paths` are the directories of its models, by their names. `planted` has attempts of each kind,
    each with "question", "right" (the answer), "attempt" and "note". ValueError or OSError names
    the directory or file that does not do.
    """
    check_file(out)
    config = common_config(paths)
    problems = load_problems("wordproblems", "test")[:PROBLEMS]
    text = page(
        config,
        {
            "config": vars(config),
            "max_tokens": DEMO["max_tokens"],
            "problems": [{"question": p.question, "right": p.answer} for p in problems],
            "first": {**planted["misconception"][0], "attempt": "", "note": ""},  # it has a trap
            "planted": planted,
            **stored_tokenizer(paths["base"]),
            **stored_weights({name: flat(load(path)) for name, path in paths.items()}),
        },
    )

    def job() -> None:
        write_page(out, text)
        print(f"{out}, {len(text.encode()) / 1e6:.1f} MB: open it in a browser")

    return job


def common_config(paths: dict[str, Path]) -> ModelConfig:
    """The sizes of the three models. Raises ValueError unless page.js can run all of them."""
    configs = []
    for path in paths.values():
        if not path.is_dir():
            raise ValueError(f"{path}: no model is there; run the demonstration again")
        config = ModelConfig(**read_config(path)[0])
        if (count := parameters(config)) > MOST_PARAMETERS:
            raise ValueError(
                f"{path} has {count:,} parameters, and the page takes {MOST_PARAMETERS:,} at most: "
                "it is meant for the demonstration's tiny models"
            )
        configs.append(config)
        plain = config.qk_norm and not (config.qkv_bias or config.tie_embeddings)
        fours = all(n % 4 == 0 for n in (config.dim, config.head_dim, config.ffn_dim))
        if config != configs[0] or config.rope_scaling or not (plain and fours):
            raise ValueError(
                f"{path} is not laid out as the demonstration's models, and no other fits"
            )
    return configs[0]


# What the page stores.


def load(path: Path) -> LM:
    return load_model(str(path), "cpu", torch.float32, "off")[0]


def flat(model: LM) -> Tensor:
    """All weights one after another, in the order of a model file."""
    return torch.cat([tensor.detach().flatten() for _, tensor in model.disk_tensors()])


def stored_weights(weights: dict[str, Tensor]) -> dict:
    """The base's weights, and each trained model's change in steps: (N,) float32 and int16."""
    base, trained = weights["base"], {}
    for name, tensor in weights.items():
        if name != "base":
            change = tensor - base
            step = change.abs().max().item() / LARGEST or 1.0  # of an untrained model any step does
            steps = (change / step).round().to(torch.int16)
            trained[name] = {"step": step, "steps": in_base64(steps, "<i2")}
    return {"base": in_base64(base, "<f4"), "trained": trained}


def in_base64(numbers: Tensor, kind: str) -> str:
    return base64.b64encode(numbers.numpy().astype(kind).tobytes()).decode()


def stored_tokenizer(directory: Path) -> dict:
    """The pattern, each token's bytes as characters of these numbers, and the tags' ids."""
    vocabulary = read_vocabulary({VOCABULARY: regular(directory / VOCABULARY).read_bytes()})
    pieces = [vocabulary.pieces[i].decode("latin-1") for i in vocabulary.ranked]
    tags = ("question", "student", "end")
    return {
        "pattern": vocabulary.pattern,
        "ranked": len(pieces),
        "pieces": [*pieces, *vocabulary.added],
        "special": {tag: vocabulary.added[f"<|{tag}|>"].id for tag in tags},
    }


# The page.


def page(config: ModelConfig, stored: dict) -> str:
    """The HTML. Only this script may run in it; `<` in a text could end the data, so it is written
    as JSON's \\u003c."""
    data = json.dumps(stored).replace("<", "\\u003c")
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    columns = "".join(column(name, about) for name, about in ABOUT.items())
    kinds = "".join(f'<option value="{kind}">{title}</option>' for kind, title in PLANTED.items())
    millions = f"{parameters(config) / 1e6:.1f} million"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
 form-action 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>Does it find its own wrong line?</title>
<style>{STYLES}</style></head>
<body><a class="skip" href="#answers">Skip to the answers</a>
<header><h1>Does it find its own wrong line?</h1>
<p>{INTRODUCTION.format(millions=millions)}</p></header>
<main>{FIELDS.format(kinds=kinds)}
<section id="answers" aria-labelledby="heading"><h2 id="heading">The three answers</h2>
<p class="note">{LEGEND}</p>
<div class="columns">{columns}</div></section></main>
<footer class="note">{STORED}</footer>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script></body></html>
"""


def column(name: str, about: str) -> str:
    title = METHODS[name]
    return f"""<article aria-label="{title}"><h3>{title} <small>{about}</small></h3>
<div id="{name}-tokens" class="tokens" role="listbox" aria-label="Tokens of {title}"></div>
<p id="{name}-verdict" class="verdict" role="status"></p>
<div id="{name}-likeliest" class="likeliest" aria-live="polite"></div>
<button id="{name}-edit" type="button">Edit this attempt</button></article>
"""


INTRODUCTION = """Three tiny language models work on a problem side by side, in your browser: the
base model, the same model after GRPO, and after ThinkTuning, where a teacher showed it how to look
back at its answer. With {millions} parameters each knows stories of this one kind and nothing else,
and all three have learned to count every number, also what belongs to a friend, and a pair as
one."""

FIELDS = """<div class="fields">
<section aria-labelledby="problem"><h2 id="problem">Problem</h2>
<textarea id="question" rows="4" maxlength="600" aria-labelledby="problem" spellcheck="false"
></textarea>
<p class="row"><label>Right answer <input id="right" size="3" inputmode="numeric"></label>
<button id="first" type="button">First problem</button>
<button id="draw" type="button">Draw another</button></p></section>
<section aria-labelledby="start"><h2 id="start">Attempt to go on from</h2>
<textarea id="attempt" rows="4" maxlength="900" aria-labelledby="start" spellcheck="false"
 placeholder="Empty: each model writes its own"></textarea>
<p class="row"><label>Ready-made <select id="kind">{kinds}</select></label>
<button id="plant" type="button">Plant one</button> <output id="note"></output></p></section>
</div>
<p class="row"><button id="run" type="button" class="first">Let the models answer</button>
<label>Temperature <input id="temperature" type="range" min="0" max="1.5" step="0.1" value="0">
</label> <output id="degrees" for="temperature">0</output> <span class="note">0: always the
likeliest token</span> <output id="status"></output></p>"""

LEGEND = """<span class="given">Grey</span>: the attempt that it was given. <span class="reflection"
>Coloured</span>: its reflection. Point at a token, tap it, or go there with Tab and the arrow keys:
you see the five likeliest in its place, at temperature 1, and marked the one that was taken. ↵ ends
a line."""

STORED = """This file asks no network for anything. It holds the base model’s weights as float32,
and the change that training made to each weight of the other two in 16-bit steps, of which 32,767
are the largest change."""
