r"""How often the built-in comparison and math-verify agree, on the answers of a problem file.

    python -m tools.agreement FILE > results/grading-math500.json

Every reference is rewritten in each of the ways below, if that changes it, and both graders
compare the result with the reference. Then every reference is compared with every other.
"""

import json
import re
import sys
from itertools import permutations

from data import load_problems
from data.grading import MathVerify
from data.reward import equal

WHOLE = re.compile(r"-?[0-9]+")
WORDS = re.compile(r"\\(?:text|mbox|begin)|\\ ")  # where letters are no variables and spaces count


def _if(condition, function):
    """A rewrite that applies `function` to the answers that meet the condition.

    The others stay as they are, and so are left out.
    """
    return lambda a: function(a) if condition(a) else a


def _terms_reversed(a):
    terms = re.findall(r"[+-]?[^+-]+", a.replace(" ", ""))
    return "".join(t if t[0] in "+-" else "+" + t for t in reversed(terms)).removeprefix("+")


def _mixed(a):
    """`\\frac{14}{3}` -> `4\\frac{2}{3}`"""
    match = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", a)
    if not match or int(match[2]) < int(match[3]):
        return a
    whole, top = divmod(int(match[2]), int(match[3]))
    return rf"{match[1]}{whole}\frac{{{top}}}{{{match[3]}}}"


# Other ways to write the same answer. Trailing words are not part of it, and a grader may refuse
# them.
SAME = {
    "as it is": lambda a: a,
    "spaces doubled": lambda a: a.replace(" ", "  "),
    "spaces around signs": _if(
        lambda a: not WORDS.search(a), lambda a: re.sub(r" ?([-+=()\[\]^]) ?", r" \1 ", a)
    ),
    "spaces left out": _if(
        lambda a: not WORDS.search(a), lambda a: re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", "", a)
    ),
    r"\, after commas": _if(lambda a: r"\!" not in a, lambda a: a.replace(", ", r",\,")),
    r"\dfrac": lambda a: a.replace(r"\frac", r"\dfrac"),
    r"\left and \right": _if(
        lambda a: r"\left" not in a and not WORDS.search(a),
        lambda a: re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", a)),
    ),
    r"no \left, no \right": lambda a: a.replace(r"\left", "").replace(r"\right", ""),
    "a/b for fractions": _if(
        lambda a: a.startswith((r"\frac", "-")),
        lambda a: re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", a),
    ),
    "$ around": lambda a: f"${a}$",
    r"\displaystyle": lambda a: rf"\displaystyle {a}",
    "a full stop": lambda a: f"{a}.",
    r"no \text": lambda a: re.sub(r"\\(?:text|mbox)\{([^{}]*)\}", r"\1", a),
    r"^{\circ}": lambda a: a.replace(r"^\circ", r"^{\circ}"),
    "no unit": lambda a: re.sub(
        r" ?\\(?:text|mbox)\{ ?(?:inches|cm|cents|degrees)\}(?:\^2)?|\^\\circ|\\\$", "", a
    ),
    "a unit: cm": _if(WHOLE.fullmatch, lambda a: rf"{a} \text{{ cm}}"),
    "a unit: square feet": _if(WHOLE.fullmatch, lambda a: rf"{a}\text{{ square feet}}"),
    "a unit: eggs": _if(WHOLE.fullmatch, lambda a: rf"{a} \text{{ eggs}}"),
    "a dollar sign": _if(WHOLE.fullmatch, lambda a: rf"\${a}"),
    ".0": _if(WHOLE.fullmatch, lambda a: f"{a}.0"),
    "thousands by comma": _if(WHOLE.fullmatch, lambda a: f"{int(a):,}"),
    r"thousands by \,": _if(WHOLE.fullmatch, lambda a: f"{int(a):,}".replace(",", r"\,")),
    "a mixed number": _mixed,
    "braces around": lambda a: f"{{{a}}}",
    "x = in front": _if(lambda a: not re.search(r"=|\\in(?!f)|\\text", a), lambda a: f"x = {a}"),
    "no x = in front": lambda a: re.sub(r"^[a-z] ?(?:=|\\in) ?", "", a),
    r"\cdot before roots and pi": lambda a: re.sub(r"(\d) ?(\\sqrt|\\pi)", r"\1 \\cdot \2", a),
    "square brackets for a matrix": lambda a: a.replace("pmatrix", "bmatrix"),
    "terms in reverse": _if(re.compile(r"[-+ \w^]*\w [-+] \w[-+ \w^]*").fullmatch, _terms_reversed),
    r"trailing \text": lambda a: rf"{a} \text{{ in total}}",
    "trailing words": lambda a: f"{a} is the answer",
}


def _one_more(a):
    return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), a, count=1)


# Other answers.
DIFFERENT = {
    "the first number is one more": _one_more,
    "the sign is turned": _if(
        lambda a: a != "0" and not re.search(r"(?<!^)[-+]|[=,(\[]|\\(?:text|mbox|begin|pm)", a),
        lambda a: a[1:] if a.startswith("-") else f"-{a}",
    ),
    "a second answer follows": lambda a: (
        rf"{a} \text{{ or }} {_one_more(a) if _one_more(a) != a else 0}"
    ),
    "a percentage": _if(WHOLE.fullmatch, lambda a: rf"{a}\%"),
    "another base": lambda a: re.sub(r"_\{?(\d)\}?$", lambda base: f"_{int(base[1]) - 1}", a),
}


VERDICTS = {
    "both": (True, True),
    "only_builtin": (True, False),
    "only_math_verify": (False, True),
    "neither": (False, False),
}


def compare(answers, rewrite, math_verify) -> dict:
    """How many of `answers` are changed by `rewrite`, and how many of those each grader accepts.

    The example is the first pair on which the graders differ, or else the first pair.
    """
    forms = [(rewrite(a), a) for a in answers if rewrite is SAME["as it is"] or rewrite(a) != a]
    verdicts = [(equal(*pair), bool(math_verify(*pair))) for pair in forms]
    counts = {name: verdicts.count(verdict) for name, verdict in VERDICTS.items()}
    differing = [pair for pair, (ours, theirs) in zip(forms, verdicts) if ours != theirs]
    example = (differing or forms)[0]
    return {
        "n": len(forms),
        "agree": counts["both"] + counts["neither"],
        **counts,
        "example": example,
    }


def compare_pairs(answers, math_verify) -> dict:
    """The pairs of differently written references that at least one grader calls equal."""
    distinct = sorted(set(answers))
    found = {"both": [], "only_builtin": [], "only_math_verify": []}
    for pair in permutations(distinct, 2):
        verdict = (equal(*pair), bool(math_verify(*pair)))
        for name in found:
            if verdict == VERDICTS[name]:
                found[name].append(pair)
    return {"distinct": len(distinct), "n": len(distinct) * (len(distinct) - 1), **found}


def main(path):
    answers = [p.answer for p in load_problems(path)]
    math_verify = MathVerify()
    report = {
        "problems": len(answers),
        "math_verify": math_verify.version,
        "same": {
            name: compare(answers, rewrite, math_verify.equal) for name, rewrite in SAME.items()
        },
        "different": {
            name: compare(answers, rewrite, math_verify.equal)
            for name, rewrite in DIFFERENT.items()
        },
        "pairs": compare_pairs(answers, math_verify.equal),
        "given_up": math_verify.given_up,
    }
    math_verify.close()
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python -m tools.agreement FILE")
        main(sys.argv[1])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
