"""What the student is asked, in training and in evaluation, and what it said as text."""

from __future__ import annotations

from data.tokenizer import Tokenizer

INSTRUCTION = "Think step by step and put the final answer within \\boxed{}."


def student_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """What the student sees: the question, and for a real model the answer's format."""
    content = question if tokenizer.family == "wordproblems" else f"{question} {INSTRUCTION}"
    return tokenizer.render([{"role": "user", "content": content}])


def spoken(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a response, without the stop token that ends a finished one."""
    return tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop else ids)
