r"""The reward: does the last \boxed{...} of a response equal the reference answer?

A policy is trained against this file, so it reads conservatively. Numbers are exact and made of the digits
0-9; `1e400`, `nan`, superscripts and words are compared as text. Nothing is evaluated, and the time taken
grows linearly with the text.
"""

import re
from fractions import Fraction

BOX = r"\boxed{"
LONGEST = 1000  # characters; what is longer is no answer that anybody meant, and is compared as it stands


def equal(given: str, answer: str) -> bool:
    r"""Two answers have the same value and, where both have a name or a unit, the same one: `x=5` and `5 \text{ cm}` equal 5."""
    ours, theirs = parts(given), parts(answer)
    return ours[0] == theirs[0] != "" and all(a == b or not a or not b for a, b in zip(ours[1:], theirs[1:]))


def is_correct(text: str, answer: str, equal=equal) -> bool:
    """The final answer of `text` equals `answer`. Only evaluation passes another `equal` (data.grading)."""
    given = final_answer(text)
    return given is not None and equal(given, answer)


def final_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, as written.

    None if the last box never closes: a response cut off in its final answer has none, and an earlier box
    does not step in for it.
    """
    _, opened, tail = text.rpartition(BOX)
    return _closed(tail) if opened else None


def answers(text: str) -> list[str]:
    """Every boxed answer in order. Of boxes inside boxes only the innermost counts, so one answer stays one."""
    contents = map(_closed, text.split(BOX)[1:])
    return [content for content in contents if content is not None]


def _closed(tail: str) -> str | None:
    r"""`tail` up to the brace that closes the box opened just before it; `\{` and `\}` are no braces."""
    # Of equal length, so that places in `plain` are places in `tail`. `\\` goes first: in `\\}` the brace is real.
    plain = tail.replace(r"\\", "..").replace(r"\{", "..").replace(r"\}", "..")
    depth, end = 1, -1
    for piece in plain.split("}")[:-1]:
        end += len(piece) + 1
        depth += piece.count("{") - 1
        if not depth:
            return tail[:end]
    return None


def canonical(answer: str) -> Fraction | str:
    """What answers that mean the same have in common: a Fraction for a number, else normalised text."""
    return parts(answer)[0]


def parts(answer: str) -> tuple[Fraction | str, str, str]:
    r"""The canonical value, the name of an unknown (`x =`, `x \in`), and a number's unit; "" where there is none.

    A percentage is no number but text, and no unit: `50%` equals `50 %` and `50.0\%`, but neither 50 nor 0.5.
    """
    if len(answer) > LONGEST:
        return answer, "", ""
    text = _normalise(answer)
    name = match[0] if (match := _NAME.search(text)) else ""
    text = text.removeprefix(name)
    unit = match[0] if (match := _UNIT.search(text)) else ""
    number = _number(text.removesuffix(unit))
    if number is None:
        return text.replace(" ,", ",").replace(", ", ","), name, ""  # not before: `1, 234` is two numbers
    if unit == "%":
        return f"{number}%", name, ""
    return number, name, unit or " dollars" * (r"\$" in answer)


_NAME = re.compile(r"^[a-zA-Z](?:=|\\in(?![a-zA-Z]) ?)")
_UNIT = re.compile(r"%$| (?:(?:square|cubic) )?(?:[mck]m|(?:centi|kilo)?meters?|inch(?:es)?|ft|foot|feet|yards?|miles?|mph|kg|"
                   r"(?:kilo)?grams?|pounds?|liters?|gallons?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
                   r"degrees?|dollars?|cents?|units?)(?:\^[23])?$")

# Applied in this order. No pattern has two ways to match the same characters: none can blow up.
_REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\u2212", "-"),                                           # the typographic minus
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf) ?\{([^{}]*)\}", r" \1"),
    (r"\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|°", " degrees"),
    (r"\{bmatrix\}", "{pmatrix}"),
    (r"(?<!\\)\\! *", ""),                                      # 10,\! 080 is one number
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"(?<!\\)\\([$%])", r"\1"),
    (r"\{,\}", ","),                                            # 1{,}234
    (r"\s+", " "),
    (r"\\cdot ?(?=\\(?:sqrt|pi)(?![a-zA-Z]))", ""),             # but 2 \cdot \frac{1}{2} is not 2\frac{1}{2}
    (r" ?([^\w ,]) ?", r"\1"),                                  # 2 \sqrt{5}, p - q, 50 %; but not `New York`
    (r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1"),                     # \pm 2, \sqrt 2; but not \cot x
    (r"\{(\w)\}", r"\1"),                                       # 2^{3}, \sqrt{2}, \frac{1}{2}
)]


def _normalise(text: str) -> str:
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = text.lstrip(" $").rstrip(" .$")
    return text[1] if re.fullmatch(r"\([a-zA-Z]\)", text) else text  # (B), of a choice


_DECIMAL = r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_ARGUMENT = rf"(\{{{_DECIMAL}\}}|[0-9])"  # of \frac, which takes bare digits too: \frac12
_PLAIN_NUMBER = re.compile(rf"({_DECIMAL})(?:/({_DECIMAL}))?")
_LATEX_FRACTION = re.compile(rf"([+-]?)\\frac ?{_ARGUMENT} ?{_ARGUMENT}")


def _number(text: str) -> Fraction | None:
    r"""The value of `-1,234.50`, `-$5`, `1/2`, `\frac{1}{2}`; None for anything else."""
    text = re.sub(r"^([+-])\$", r"\1", text)  # -$5; a leading $ is gone already
    if plain := _PLAIN_NUMBER.fullmatch(text):
        sign, (top, bottom) = "", plain.groups(default="1")
    elif latex := _LATEX_FRACTION.fullmatch(text):
        sign, top, bottom = latex.groups()
    else:
        return None
    top, bottom = (Fraction(part.strip("{}").replace(",", "")) for part in (top, bottom))
    if not bottom:
        return None
    return -top / bottom if sign == "-" else top / bottom
