"""Problems from the built-in generator, from GSM8K, or from a file.

load_problems("wordproblems", "validation")
load_problems("gsm8k", "test")                   fetched on first use
load_problems("problems.jsonl")                  any file that ends in .jsonl or .json
"""

import importlib
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from data.reward import final_answer

SPLITS = {"wordproblems": ("train", "validation", "test"), "gsm8k": ("train", "test")}


class Problem(NamedTuple):
    question: str
    answer: str  # the final answer alone, as data.reward.is_correct takes it


def load_problems(source: str, split: str = "train") -> list[Problem]:
    """`source` is a name in SPLITS, or a path. A file has no splits: `split` is ignored there."""
    if str(source).lower().endswith((".jsonl", ".json")):
        return read_problems(source)
    if source not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(
            f"unknown problems {str(source)!r}: give {known}, or a .jsonl or .json path"
        )
    if split not in SPLITS[source]:
        known = ", ".join(SPLITS[source])
        raise ValueError(f"{source} has no split {split!r}: give one of {known}")
    # Imported here because both modules import this one.
    if source == "gsm8k":
        return importlib.import_module("data.gsm8k").load(split)
    return importlib.import_module("data.wordproblems").problems(split)


def read_problems(path) -> list[Problem]:
    """Objects with `question` (or `problem`) and `answer` (or `solution`): lines or one list."""
    problems = [_problem(entry, where) for where, entry in _entries(Path(path))]
    if not problems:
        raise ValueError(
            f'{path} holds no problems: put one object with "question" and "answer" on each line'
        )
    return problems


def _entries(path: Path) -> Iterator[tuple[str, object]]:
    """Each JSON value of the file, with the words that say where it stands."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_parse(text, str(path)), start=1):
            yield f"{path}, item {number}", entry
        return
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parse(line, where)


def _read_text(path: Path) -> str:
    if not path.is_file():  # also keeps out devices and pipes, which might never end
        raise FileNotFoundError(f"{path} is not a file: check the path to the problems")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(
            f"{where}: not JSON ({error.msg} at {place}column {error.colno}); "
            "write one object on each line, or all of them in one list"
        ) from None
    except (ValueError, RecursionError):  # thousands of digits, or of nested brackets
        raise ValueError(f"{where}: a number too long or brackets too deep to read") from None


def _problem(entry, where: str) -> Problem:
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: not an object; write {{"question": "...", "answer": "..."}}')
    question = _text(entry.get("question", entry.get("problem")), "question", where)
    if entry.get("answer") is None and "solution" in entry:
        return Problem(question, _boxed(_text(entry["solution"], "solution", where), where))
    solution = _text(_written(entry.get("answer")), "answer", where)
    # GSM8K ends a worked solution with a line "#### 42". Without this mark all is the answer.
    _, mark, answer = solution.rpartition("####")
    answer = answer.strip().partition("\n")[0].strip() if mark else answer
    if not answer:
        raise ValueError(f'{where}: nothing after "####"; the answer belongs there')
    return Problem(question, answer)


def _boxed(solution: str, where: str) -> str:
    """The answer of a worked solution without an `answer` beside it, as in MATH: its last box."""
    answer = (final_answer(solution) or "").strip()
    if not answer:
        raise ValueError(
            f'{where}: no "answer", and no \\boxed{{...}} in its "solution"; write one of the two'
        )
    return answer


def _text(value, key: str, where: str) -> str:
    if value is None:
        raise ValueError(
            f'{where}: no "{key}"; give every problem a "question" (or "problem") '
            'and an "answer" (or a "solution" that boxes it)'
        )
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{where}: "{key}" is empty or not text; write it as a string')
    # A JSON escape may leave half of a surrogate pair, which no tokenizer can encode.
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f'{where}: "{key}" holds half a surrogate pair')
    return value.strip()


def _written(value):
    """A JSON number as plain digits, because the reward reads no exponents; all else unchanged."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return ""  # Infinity, NaN and 1e400 are no answers
    return format(Decimal(repr(value)), "f")
