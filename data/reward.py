r"""The reward: does the last \boxed{...} of a response equal the reference answer?

A policy is trained against this file, so it reads conservatively. Numbers are exact and made of the
digits 0-9; `1e400`, `nan`, superscripts and words are compared as text. LaTeX is read token by
token, so that two spellings of what looks the same on paper are equal. Nothing is evaluated, and
the time taken grows linearly with the text.
"""

import functools
import re
from fractions import Fraction

LONGEST = 1000  # characters; a longer answer is one that nobody meant, and is compared as it stands
DEEPEST = 50  # groups inside groups; the braces of deeper ones are compared as they stand


def equal(given: str, answer: str) -> bool:
    r"""Two answers have the same value and, where both have a name or a unit, the same one.

    `x=5` and `5 \text{ cm}` equal 5. It is symmetric but not transitive: 5 equals `x=5` and `y=5`.
    """
    ours, theirs = parts(given), parts(answer)
    same = all(a == b or not a or not b for a, b in zip(ours[1:], theirs[1:]))
    return ours[0] == theirs[0] != "" and same


def is_correct(text: str, answer: str, equal=equal) -> bool:
    """The final answer of `text` equals `answer`. Only evaluation passes another `equal`."""
    given = final_answer(text)
    return given is not None and equal(given, answer)


def final_answer(text: str) -> str | None:
    """What stands in the last box that is not empty, as written.

    None if the last box never closes: a response cut off in its final answer has none, and an
    earlier box does not step in for it.
    """
    contents = _boxes(text)
    cut_off = contents[-1:] == [None]
    return None if cut_off else next(filter(_is_answer, reversed(contents)), None)


def answers(text: str) -> list[str]:
    r"""Every boxed answer in order. An empty \boxed{}, as the prompt itself quotes it, is none.

    Of boxes inside boxes only the innermost counts, so one answer stays one.
    """
    return list(filter(_is_answer, _boxes(text)))


def _is_answer(content: str | None) -> bool:
    return bool(content) and canonical(content) != ""


def canonical(answer: str) -> Fraction | str:
    """What answers that mean the same share: a Fraction for a number, else normalised text."""
    return parts(answer)[0]


def parts(answer: str) -> tuple[Fraction | str, str, str]:
    r"""The canonical value, an unknown's name (`x =`, `x \in`), a number's unit; "" where none is.

    A percentage is no number but text, and no unit: `50%` equals `50.0 \%`, but neither 50 nor 0.5.
    """
    return (answer, "", "") if len(answer) > LONGEST else _parts(answer)


@functools.lru_cache(10_000)
def _parts(answer):
    text = _normalise(answer)
    name = match[0] if (match := _NAME.match(text)) else ""
    text = text.removeprefix(name)
    number, unit = _amount(text)
    if number is None:
        return _as_text(text), name, ""
    return (f"{number}%", name, "") if unit == "%" else (number, name, unit)


# Boxes. Without braces a box holds a number: in "I put it in \boxed and stop" there is no answer.

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_DECIMAL = rf"[+-]?{_UNSIGNED}"
_BOX = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{|({_DECIMAL}(?:/{_DECIMAL})?))")


def _boxes(text: str) -> list[str | None]:
    """The content of every box; None for one that does not close before the next begins."""
    _, *pieces = _BOX.split(text)  # a number or None, then what follows, and so on
    boxes = zip(pieces[::2], pieces[1::2])
    return [_closed(tail) if number is None else number for number, tail in boxes]


def _closed(tail: str) -> str | None:
    r"""`tail` up to the brace that closes the box opened before it; `\{` and `\}` are no braces."""
    # Of equal length, so that places in `plain` are places in `tail`. `\\` goes first: in `\\}` the
    # brace is real.
    plain = tail.replace(r"\\", "..").replace(r"\{", "..").replace(r"\}", "..")
    depth, end = 1, -1
    for piece in plain.split("}")[:-1]:
        end += len(piece) + 1
        depth += piece.count("{") - 1
        if not depth:
            return tail[:end]
    return None


# LaTeX. An answer becomes tokens, and these one string: every argument stands in braces, nothing
# else does, and a space is only where it separates two words or a command from a letter.

_TEXT, _THIN, _JOIN = "\ue000", "\ue001", "\ue002"  # text begins; a thin space; a negative space
_DOLLAR = "\ue003"  # `\$`; a bare $ may be a mark of mathematics
_TOKEN = re.compile(r"\\(?:begin|end)\{[a-zA-Z]*\}|\\[a-zA-Z]+|\\.|\s+|.", re.DOTALL)
_SAME = {"\\ ": " "}  # token: the token that it is read as
for _meaning, _spellings in (
    ("", r"\left \right \middle \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \textstyle"),
    ("", r"\mathbf \mathit \mathsf \mathtt \boldsymbol \bm \bf \it"),
    (_TEXT, r"\text \textrm \textbf \textit \textsf \textnormal \mbox \hbox \mathrm \rm"),
    (_THIN, "\\, \\: \\; \\> \u2009 \u202f"),
    (_JOIN, r"\!"),
    (" ", r"~ \quad \qquad"),
    (_DOLLAR, r"\$"),
    ("£", r"\pounds"),
    ("°", r"\degree"),
    ("%", r"\%"),
    ("-", "\u2212"),
    (r"\frac", r"\dfrac \tfrac \cfrac"),
    (r"\binom", r"\dbinom \tbinom"),
    (r"\{", r"\lbrace"),
    (r"\}", r"\rbrace"),
    (r"\emptyset", r"\varnothing"),
    (r"\le", r"\leq \leqslant ≤"),
    (r"\ge", r"\geq \geqslant ≥"),
    (r"\ne", r"\neq ≠"),
    (r"\to", r"\rightarrow"),
    (r"\pi", "π"),
    (r"\infty", "∞"),
    (r"\cup", "∪"),
    (r"\in", "∈"),
    (r"\begin{pmatrix}", r"\begin{bmatrix}"),
    (r"\end{pmatrix}", r"\end{bmatrix}"),
):
    _SAME |= dict.fromkeys(_spellings.split(" "), _meaning)

# How many arguments a command takes. Behind a command that is not here groups stay as they are.
_ARGUMENTS = {r"\frac": 2, r"\binom": 2}
_ARGUMENTS |= dict.fromkeys(r"^ _ \sqrt \overline \underline \vec \bar \hat \mathbb".split(), 1)
_NONE = r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \log \ln \le \ge \ne \to \in"
_NONE += r" \cup \cap \pm \cdot \times \circ \pi \infty"
_ARGUMENTS |= dict.fromkeys(_NONE.split(), 0)


def _normalise(answer: str) -> str:
    r"""`\dfrac 1{2} x` -> `\frac{1}{2}x`. _TEXT stays in it: it tells `5 \text{ m}` from `5m`."""
    tokens = []
    for token in _TOKEN.findall(answer):
        token = _SAME.get(token, " " if token.isspace() else token)
        if token and not (token == " " and tokens and _is_word(tokens[-1])):
            tokens.append(token)
    tokens.reverse()  # the next token is the last of the list
    written: list[str] = []
    while tokens:
        _item(tokens, written, 0)
    text = _respace("".join(written)).replace(r"^{\circ}", "°")
    return text.lstrip(f" ${_TEXT}").rstrip(f" .${_TEXT}")


def _is_word(token: str) -> bool:
    return token[0] == "\\" and token[-1].isalpha()


def _item(tokens, written, depth):
    """Move a token with its arguments, or a group without its braces. Every call pops one token."""
    token = tokens.pop()
    if token == "{" and depth < DEEPEST:
        _rest_of_group("}", tokens, written, depth)
        return
    written.append(token + " " if _is_word(token) else token)
    if depth == DEEPEST:
        return
    if token == r"\sqrt" and tokens[-1:] == ["["]:
        written.append(tokens.pop())
        _rest_of_group("]", tokens, written, depth)
        written.append("]")
    for _ in range(_ARGUMENTS.get(token, 0)):
        _argument(tokens, written, depth)
    while _is_word(token) and token not in _ARGUMENTS and tokens[-1:] == ["{"]:
        _argument(tokens, written, depth)


def _argument(tokens, written, depth):
    while tokens and tokens[-1] in (" ", _TEXT, _THIN, _JOIN):
        tokens.pop()
    written.append("{")
    if tokens and tokens[-1] != "}":
        _item(tokens, written, depth + 1)
    written.append("}")


def _rest_of_group(end, tokens, written, depth):
    while tokens and tokens[-1] != end:
        _item(tokens, written, depth + 1)
    if tokens:
        tokens.pop()


# Applied in this order. No pattern has two ways to match the same characters: none can blow up.
_SPACES = (
    (rf"(?<=[0-9]){_THIN}(?=[0-9]{{3}}(?![0-9]))", ","),  # 1\,000
    (rf"[ {_THIN}]+", " "),
    (rf" ?{_JOIN} ?", ""),  # 10,\! 080 is one number
    # 2 \sqrt{5}, p - q, 50 %; but not `New York`, `\frac12 cups`, and `1, 234`: two numbers
    (r" (?=[^\w ,])|(?<=[^\w ,}]) |(?<=\}) (?![a-zA-Z]{2})", ""),
    (r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1"),  # \pm 2; but not \cot x
    (r"(?<=[a-zA-Z0-9])(?<![a-zA-Z\\][a-zA-Z]) (?=[a-zA-Z](?![a-zA-Z]))", ""),  # 2 x y
)


def _respace(text: str) -> str:
    for pattern, new in _SPACES:
        text = re.sub(pattern, new, text)
    return text


# Numbers and their units.

_NAME = re.compile(r"[a-zA-Z](?:=|\\in(?![a-zA-Z]) ?)")
_FRACTION = re.compile(rf"\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}(?![0-9.,/])")
_CURRENCY = rf"[${_DOLLAR}¢£¤¥\u20a0-\u20cf]"
_AMOUNT = re.compile(
    rf"({_CURRENCY}?)([+-]?)({_CURRENCY}?)"
    rf"(?: ([+-]?))?"  # of a fraction's top: `-\frac{{-1}}{{2}}` has two signs
    rf"(?:({_DIGITS}) )?({_UNSIGNED})(?:/({_DECIMAL}))?"
)
_SIGNS = {_TEXT: " ", "$": "", _DOLLAR: "dollar ", "¢": "cent ", "£": "pound ", "€": "euro "}
_SIGNS |= {"¥": "yen ", "°": "degree "}

# Letters are a unit in text, and where they can hardly be a product: `5 \text{ m}`, `5 eggs`,
# `5 km`, but not `5 m` and `5 xy`.
_WORD = r"(?:[a-zA-Z]{2,}|[mgshL])(?:\^\{-?[1-9]\})?"
_LIKELY = r" (?=[a-zA-Z]{4}|(?:[mck]m|ft|kg|mph|lbs?|hrs?|day|min|men)(?![a-zA-Z]))"
_UNIT = re.compile(
    rf"{_TEXT}?(?:%|{_CURRENCY}|°{_TEXT}?[CF]?)|"
    rf"(?:{_TEXT}|{_LIKELY}){_WORD}(?:[ /.{_TEXT}-]+{_WORD})*"
)
# Words that make another number of it, or another answer.
_NO_UNIT = re.compile(
    r"""\b(?:or|and|not|is|are|if|but|plus|minus|squared|cubed|factorial
    |percent\w*|pi|sqrt|infinity|alpha|beta|gamma|theta|half|halves|thirds?|quarters?
    |(?:fif|six|seven|eigh|nin|ten|twelf)ths?|(?:hundred|thousand|[mbtr]+illion|dozen)(?:th)?s?
    |zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen
    |(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b""",
    re.IGNORECASE | re.VERBOSE,
)


def _amount(text: str) -> tuple[Fraction | None, str]:
    r"""The value and unit of `-1,234.50`, `\$5`, `1\frac{4}{5}`, `5 km`; None, "" for all else."""
    match = _AMOUNT.match(_FRACTION.sub(r" \1/\2", text))  # so `1\frac{4}{5}` is read as `1 4/5`
    rest = match.string[match.end() :] if match else ""
    if not match or _NO_UNIT.search(rest) or rest and not _UNIT.fullmatch(rest):
        return None, ""
    before, sign, after, inner_sign, whole, top, bottom = match.groups("")
    if whole and not (top.isdigit() and bottom.isdigit() and int(top) < int(bottom)):
        return None, ""  # a mixed number's fraction is below 1; `1 234` is two numbers
    whole, top, bottom = (Fraction(n.replace(",", "")) for n in (whole or "0", top, bottom or "1"))
    if not bottom:
        return None, ""
    value = whole + top / bottom
    return -value if (sign + inner_sign).count("-") == 1 else value, _unit(before + after + rest)


def _unit(text: str) -> str:
    r"""One spelling of a unit: `Hours` is `hour`, `\$` is `dollar`; but `mW` is not `MW`."""
    text = text.translate(str.maketrans(_SIGNS))
    words = re.sub("[a-zA-Z]{4,}", lambda word: word[0].lower().removesuffix("s"), text).split()
    return " ".join(words[1:] if words[:1] == words[1:2] else words)


# What is no number.


def _as_text(text: str) -> str:
    text = _respace(text.replace(_TEXT, " ")).replace(" ,", ",").replace(", ", ",").strip()
    # `2 \cdot \sqrt3`; but `2 \cdot \frac12` is not `2\frac12`
    text = re.sub(r"\\cdot(?=\\(?:sqrt|pi)(?![a-zA-Z]))", "", text)
    if re.fullmatch(r"\([a-zA-Z]\)", text):  # (B), of a choice
        return text[1]
    inside = text[2:-2]
    if text == rf"\{{{inside}\}}" and not re.search(r"\\[{}]", inside):  # a set has no order
        return rf"\{{{','.join(sorted(_elements(inside)))}\}}"
    return text


def _elements(text: str) -> list[str]:
    """What the commas outside all brackets separate; numbers by their value."""
    elements, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            elements.append("")
        else:
            elements[-1] += char
    return [_element(element) for element in elements]


def _element(text: str) -> str:
    number, unit = _amount(text)
    return text if number is None or unit else str(number)
