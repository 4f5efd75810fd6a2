"""Pretraining the demonstration's base model on the texts of demo/texts.py."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from data.wordproblems import draw_days, make_story
from demo.texts import REMARKS, Row, conversation, row_of, transcript
from model import LM, ModelConfig
from run.screen import clock, progress


def pretrain(recipe: dict, tokenizer: Tokenizer, cycle: int = 0, model: LM | None = None) -> LM:
    """One round of training on fresh texts, from `model` or from random weights."""
    model = model or new_model(recipe, tokenizer.vocab_size)
    model.requires_grad_(True)  # validation froze it, because there it was a teacher
    rows = steps_of_rows(recipe, f"pretraining {recipe['seed']} {cycle}", tokenizer)
    train_on_texts(model, tokenizer, recipe, rows, "pretraining", lines=6)
    return model


def new_model(recipe: dict, vocab_size: int) -> LM:
    # Embeddings of standard deviation 1 (torch's default) and wide heads let the model learn to
    # copy numbers within these few steps.
    torch.manual_seed(recipe["seed"])
    heads, dim = recipe["n_heads"], recipe["dim"]
    sizes = vocab_size, dim, recipe["n_layers"], heads, heads, dim // heads, recipe["ffn_dim"]
    return LM(ModelConfig(*sizes, max_seq_len=320, qk_norm=True))


def steps_of_rows(recipe: dict, seed: str, tokenizer: Tokenizer) -> Iterator[list[Row]]:
    """The texts of each step. The order of the random draws is part of the recipe."""
    rng = random.Random(seed)
    told = itertools.count(1)
    while True:
        texts = []
        for _ in range(recipe["conversations"]):
            has_remark = recipe["floor"] > 0 and next(told) % recipe["remark_every"] == 0
            remark = rng.choice(REMARKS) if has_remark else ""
            story = make_story(rng, draw_days(rng), "train")
            texts.append(conversation(rng, story, recipe, remark))
        for _ in range(recipe["transcripts"]):
            texts.append(transcript(rng, make_story(rng, draw_days(rng), "train"), recipe))
        yield [row_of(text, tokenizer, recipe["floor"]) for text in texts]


def train_on_texts(
    model: LM, tokenizer: Tokenizer, recipe: dict, rows: Iterator[list[Row]], label: str, lines: int
) -> list[float]:
    """Train on `rows`, recipe["steps"] of them at most; returns the loss of each step.

    Without a terminal, about `lines` lines report the progress.
    """
    (blank_line,) = tokenizer.encode("\n\n")
    losses = []
    steps, began = recipe["steps"], time.perf_counter()
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and not name.startswith(("embed", "head"))
        (matrices if inside else others).append(parameter)
    optimizers = [
        Muon(matrices, lr=recipe["muon_rate"]),
        torch.optim.AdamW(others, lr=recipe["adamw_rate"], betas=(0.9, 0.98), weight_decay=0.01),
    ]
    rates = [optimizer.defaults["lr"] for optimizer in optimizers]
    for step, texts in zip(range(steps), rows):
        rising, falling = (step + 1) / recipe["warmup"], (steps - step) / (recipe["decay"] * steps)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, rising, falling)
        losses.append(weighted_loss(model, texts, blank_line))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        left = clock((time.perf_counter() - began) / done * (steps - done))
        plain = done % max(1, steps // lines) == 0
        line = f"{label} {done}/{steps}  loss {losses[-1]:.3f}  {left} left"
        progress(line, last=done == steps, plain=plain)
    return losses


def weighted_loss(model: LM, rows: list[Row], blank_line: int) -> float:
    """The weighted mean cross-entropy of the tokens; leaves its gradient in the model.

    Shorter and longer texts go through the model as two batches, which saves padding.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    total = sum(sum(weights) + sum(instead) for _, weights, instead in rows)
    middle = len(rows) // 2
    result = 0.0
    for half in (rows[:middle], rows[middle:]):
        tokens, weights, instead = padded(half)
        counts = weights[:, 1:] > 0  # (B, T-1): the tokens that are predicted and count
        logits = model.head(model.hidden(tokens[:, :-1])[counts])  # (N, V)
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(-1, tokens[:, 1:][counts][:, None]).squeeze(-1)  # (N,)
        weighted = own * weights[:, 1:][counts] + logprobs[:, blank_line] * instead[:, 1:][counts]
        loss = -weighted.sum() / total
        loss.backward()
        result += loss.item()
    return result


def padded(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, their weights, and those of a blank line instead, (B, T); padding weighs 0."""
    width = max(len(ids) for ids, _, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    weights, instead = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        for matrix, values in zip((tokens, weights, instead), row):
            matrix[i, : len(values)] = torch.tensor(values)
    return tokens, weights, instead


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose matrix is made nearly orthogonal before each step.

    torch.optim.Muon does the same in bfloat16, which a CPU emulates slowly.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.05)
                direction = orthogonal(weight.grad.lerp(momentum, 0.95))  # Nesterov
                rows, columns = weight.shape
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                weight.mul_(1 - 0.01 * group["lr"]).sub_(size * direction)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix (m, n) with singular values near 1: five Newton-Schulz steps with Muon's weights."""
    x = matrix / (matrix.norm() + 1e-7)
    if x.shape[0] > x.shape[1]:
        return orthogonal(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x
