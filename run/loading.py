"""What every command loads first: the device, the dtype, a model with its tokenizer."""

from __future__ import annotations

import argparse

import torch

from data import Problem
from data.prompts import student_prompt
from data.tokenizer import Tokenizer
from model import LM
from run.compiled import RECORDING_DEVICES, compile_step


def device_and_dtype(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """The device and dtype that the flags name. Raises ValueError if the device cannot be used."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or no driver for it
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--device {device}: {reason}; give another one, such as cpu") from None
    if args.dtype == "auto":
        args.dtype = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, args.dtype)


def load_model(path: str, device: str, dtype: torch.dtype, compiling: str) -> tuple[LM, Tokenizer]:
    """(model, tokenizer) of a model directory. Raises ValueError if they do not belong together.

    With `compiling` "auto" the model's decoding steps are compiled where the device can record.
    """
    tokenizer = Tokenizer.load(path)
    model = LM.load(path, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model only "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    if compiling == "auto" and model.device.type in RECORDING_DEVICES:
        model.compile_step = compile_step
    return model, tokenizer


def fitting(
    problems: list[Problem],
    model: LM,
    tokenizer: Tokenizer,
    source: str,
    max_tokens: int,
    limit: int | None = None,
) -> list[Problem]:
    """The problems whose prompt leaves room for an answer; prints how many were dropped.

    A prompt may also have no more than `limit` tokens, where that is given.
    """
    context = model.config.max_seq_len
    room = min(limit or context, context - max_tokens)
    lengths = [len(student_prompt(tokenizer, p.question)) for p in problems]
    kept = [p for p, length in zip(problems, lengths) if length <= room]
    if not kept:
        how = make_room(min(lengths), context, max_tokens, limit)
        raise ValueError(f"{source}: no question fits; {how}")
    if len(kept) < len(problems):
        dropped = len(problems) - len(kept)
        print(f"{source}: dropped {dropped} of {len(problems)} questions longer than {room} tokens")
    return kept


def make_room(shortest: int, context: int, max_tokens: int, limit: int | None) -> str:
    """What to do so that a prompt of `shortest` tokens fits the model and the limit."""
    facts = f"the shortest prompt has {shortest} tokens and the model's context {context}"
    if shortest >= context:
        return f"{facts}: give shorter questions, or a model with a longer context"
    flags = []
    if max_tokens > context - shortest:
        flags.append(f"lower --max-tokens to {context - shortest} or less")
    if limit and shortest > limit:
        flags.append(f"raise --max-prompt to {shortest} or more")
    return f"{facts}: {' and '.join(flags)}"
