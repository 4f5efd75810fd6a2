"""Tests of data/: the reward, the readers of problem files, the fetch of GSM8K."""

import http.server
import importlib.util
import json
import random
import re
import socket
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import Problem, grading, gsm8k, load_problems, reward
from data.grading import Grader, MathVerify
from data.reward import LONGEST, answers, canonical, equal, final_answer, is_correct
from data.scores import first_is_right, reflects, score, vote
from tools import agreement

SHARED = Path(__file__).resolve().parents[2] / "shared"


def boxed(answer) -> str:
    return rf"so it is \boxed{{{answer}}}"


# ------------------------------------------------------------------ the reward: which box


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{1} no, wait: \boxed{2}.", "2"),
        (r"$\boxed{\frac{1}{2}}$ and {more}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{} tail}", r"\{"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \\} b}", r"a \\"),  # an escaped backslash: the brace after it is real
        (r"\boxed{a \\\} b}", r"a \\\} b"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {8}", "8"),
        ("\\boxed\n{8}", "8"),
        (r"\boxed 8", "8"),
        (r"\boxed8.", "8"),
        (r"\boxed -1,234.5, so", "-1,234.5"),
        (r"\boxed 1/2", "1/2"),
        (r"\fbox{8}", "8"),
        (r"\fbox {8}", "8"),
        (r"\boxed{\fbox{8}}", "8"),
        (r"It is \boxed{7}. No, wait: \boxed {8}.", "8"),
        (r"It is \boxed{7}. No, wait: \fbox 8.", "8"),
        (
            r"\boxed{7}, which I \boxed and leave; \boxed x",
            "7",
        ),  # without braces only a number is an answer
        (r"\boxedx{8}", None),
        (r"\fboxsep{8}", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{{}\,}", None),
        (r"\boxed{...}", None),
        (r"\boxed{x=}", None),
        (r"\boxed{7}, as asked in \boxed{}.", "7"),
        (r"I will put it in \boxed{}. It is \boxed{7}.", "7"),
        (r"\boxed{\{\}}", r"\{\}"),  # the empty set
        (r"\boxed{1} \boxed{} \boxed {2", None),
        (r"\boxed{1} then \boxed{2", None),  # cut off: the earlier box does not step in
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed", None),
        (r"boxed{3}", None),
        ("the answer is 42 #### 42", None),  # falls back on nothing
        ("", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


def test_answers_lists_closed_innermost_boxes_in_order():
    assert answers(r"\boxed{3} Wait. \boxed{\frac{1}{2}} hmm \boxed{7") == ["3", r"\frac{1}{2}"]
    assert answers(r"\boxed{\boxed{5}}") == [
        "5"
    ]  # one answer, not two: it must not look like a second thought
    assert answers(r"\boxed{} \boxed {3} \fbox{ } \boxed 4 \fbox{5} \boxed{~}") == ["3", "4", "5"]
    assert answers("nothing here") == []


@pytest.mark.parametrize(
    "empty", [r"\boxed{}", r"\boxed {}", r"\fbox{ }", "\\boxed{\n}", r"\boxed{\;}"]
)
def test_an_empty_box_is_a_quotation_and_no_answer(empty):
    quoted, problem = rf"I will put it in {empty}. So it is \boxed{{7}}.", Problem("q", "7")
    assert answers(quoted) == ["7"] and first_is_right(quoted, "7") and not reflects(quoted)
    found = score([(problem, quoted, True)])
    assert (found["accuracy"], found["first_answer_accuracy"], found["reflection_rate"]) == (
        1,
        1,
        0,
    )
    assert (found["wrong_to_right"], found["right_to_wrong"]) == (0, 0)
    asked = rf"So it is \boxed{{7}}, in {empty} as asked."
    assert is_correct(asked, "7") and not reflects(asked)
    assert vote([empty, quoted, empty, empty]) == [("7", 1)]
    alone = score([(problem, empty, True)] * 2, samples=2)
    assert (alone["accuracy"], alone["maj@2"], alone["reflection_rate"]) == (0, 0, 0)


BOX = r"\boxed{"


def naive_last_box(text):
    """Character by character, the content of the last box that is not empty; None if the last box of all is not closed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth, i, content = 1, start + len(BOX), ""
    while i < len(text):
        if text[i] == "\\" and i + 1 < len(text) and text[i + 1] in "\\{}":
            content += text[i : i + 2]
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return content if canonical(content) else naive_last_closed_box(text[:start])
        content += text[i]
        i += 1
    return None


def naive_last_closed_box(text):
    """The last box that is not empty, if a closed one stands behind the text: what is open here holds that one."""
    while BOX in text:
        found = naive_last_box(text)
        if found is not None:
            return found
        text = text[: text.rfind(BOX)]
    return None


@given(
    st.lists(st.sampled_from([BOX, "{", "}", "\\", "{}", "a", " ", "\n", "½"]), max_size=40).map(
        "".join
    )
)
def test_last_box_agrees_with_a_naive_scan(text):
    assert final_answer(text) == naive_last_box(text)
    if final_answer(text) is not None:
        assert answers(text)[-1] == final_answer(text)


@given(
    st.lists(st.sampled_from([BOX, "{", "}", "7", "a", " ", "."]), max_size=30).map("".join),
    st.lists(
        st.sampled_from([r"\boxed{", r"\boxed {", "\\boxed\n\t{", r"\fbox{", r"\fbox  {"]),
        min_size=30,
        max_size=30,
    ),
)
def test_every_spelling_of_a_box_is_the_same_box(text, spellings):
    plain, *pieces = text.split(BOX)
    respelled = plain + "".join(spelling + piece for spelling, piece in zip(spellings, pieces))
    assert answers(respelled) == answers(text) and final_answer(respelled) == final_answer(text)


# ------------------------------------------------------------------ the reward: equality


@pytest.mark.parametrize(
    "ours, reference",
    [
        ("42", "42"),
        ("42.", "42"),
        (" 42 ", "42"),
        ("3.0", "3"),
        ("3.", "3"),
        (".5", "0.5"),
        ("007", "7"),
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("1{,}234", "1234"),
        (r"10,\! 080", "10,080"),
        ("$5", "5"),
        (r"\$5", "5"),
        ("$5$", "5"),
        ("$ 5.00", "5"),
        ("-$5", "-5"),
        (r"-\$5.50", "-5.5"),
        ("$-5$", "-5"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("- 7", "-7"),
        ("+7", "7"),
        ("-0", "0"),
        ("1/2", "0.5"),
        ("1 / 2", "2/4"),
        ("-1/2", "-.5"),
        ("6/3", "2"),
        ("1,000/2", "500"),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac{1}{2}", "0.5"),
        (r"\tfrac12", "1/2"),
        (r"\frac 59", "5/9"),
        (r"-\frac{1}{2}", "-0.5"),
        (r"\frac{-1}{2}", r"-\frac12"),
        (r"\frac{ 11 }{ 20 }", "11/20"),
        (r"\frac{1,000}{3}", "1000/3"),
        ("50%", "50%"),
        ("50 %", "50%"),
        (r"50\%", "50%"),
        (r"50.0\%", "50 %"),
        (r"\frac{1}{2}\%", "0.5%"),
        (r"\text{42}", "42"),
        (r"\mathrm{east}", "east"),
        (r"\text{ (C) }", "(C)"),
        ("New   York", "New York"),
        ("east.", "east"),
        ("p-q", "p - q"),
        ("3,5, 7", "3, 5, 7"),
        (r"2\sqrt{5}", r"2 \sqrt5"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
        (r"x\,y", "x y"),
        (r"52_{8}", "52_8"),
        (r"\{1,\;2\}", r"\{1, 2\}"),
        ("$x$", "x"),
        (r"(2,\infty)", r"(2, \infty)"),
        (r"a \\ b", r"a\\b"),
        ("1e400", "1e400"),
        ("nan", "nan"),
        ("1" * 900 + ".0", "1" * 900),
        ("90", r"90^\circ"),
        (r"90^{\circ}", r"90^\circ"),
        ("90°", r"90 \text{ degrees}"),
        (r"x = 90^\circ", r"90^\circ"),
        (r"15\text{ cm}^2", "15"),
        (r"15\mbox{cm}^2", r"15 \text{ cm}^2"),
        (r"1,234 \text{ miles}", "1234"),
        ("5.40 cm", r"5.4\text{ cm}"),
        (r"\$18.90", "18.9"),
        (r"\$18.90", "18.9 dollars"),
        (r"18\$", r"\$18"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
        ("x=5", "5"),
        ("x = 5", "x=5.0"),
        ("y=2x+3", "2x + 3"),
        (r"x \in [-2,7]", "[-2, 7]"),
        (r"x = 3 \text{ hours}", "3"),
        (r"\displaystyle\frac12", "0.5"),
        (r"3\cdot\sqrt{13}", r"3 \sqrt{13}"),
        (r"2 \cdot \pi", r"2\pi"),
        (r"3\pm2\sqrt2", r"3 \pm 2 \sqrt{2}"),
        (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("B", r"\text{(B)}"),
        ("(B).", r"\text{B}"),
        # what LaTeX shows alike
        ("{12}", "12"),
        ("{{1}2}", "12"),
        ("1{}2", "12"),
        (r"\sqrt x", r"\sqrt{x}"),
        (r"\sqrt 13", r"\sqrt{1}3"),
        (r"\cot{x}", r"\cot x"),
        (r"\cot {2x}", r"\cot 2x"),
        (r"\frac ab", r"\frac{a}{b}"),
        (r"\frac{a}b", r"\frac a{b}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"2^\frac12", r"2^{\frac{1}{2}}"),
        (r"\sqrt[3]2", r"\sqrt[3]{2}"),
        ("x_{1}", "x_1"),
        (r"x^{2}", "x ^ 2"),
        ("2 x y", "2xy"),
        (r"x \le 5", r"x\leq 5"),
        (r"x\geq5", r"x \ge{5}"),
        (r"x\ne 1", r"x \neq 1"),
        ("x ≤ π", r"x\le\pi"),
        (r"\lbrace 1\rbrace", r"\{1\}"),
        (r"\textrm{even}", r"\text{even}"),
        (r"\mathbf{42}", "42"),
        (r"\mathbf{v}", "v"),
        (r"{\bf 7}", "7"),
        (r"\bf 7", "7"),
        (r"\bf{7}", "7"),
        (r"{\rm even}", r"\textbf{even}"),
        (r"\bigl(1,2\bigr)", "(1,2)"),
        (r"\vec v", r"\vec{v}"),
        (r"\mathbb R", r"\mathbb{R}"),
        # units in words
        (r"18 \text{ eggs}", "18"),
        (r"18\text{eggs}", "18"),
        ("42 apples", "42"),
        (r"5 \text{ km/h}", "5"),
        ("5 km/h", "5"),
        ("5 Hours", "5"),
        ("5 Hours", r"5 \text{ hours}"),
        ("1 hour", "1 hours"),
        (r"12 \text{ m}", "12"),
        (r"25\,\mathrm{~m/s^2}", "25"),
        (r"3\ \text{sq. ft}", "3"),
        (r"60 \text{ miles per hour}", "60"),
        (r"\frac12 \text{ of the cake}", "0.5"),
        (r"\frac34 cups", "0.75"),
        (r"\text{18 eggs}", "18"),
        ("€18", "18"),
        ("£18", "18"),
        ("18€", "€18"),
        ("€18", "18 euros"),
        (r"\pounds 18.50", "18.5"),
        ("₹18", "18"),
        (r"\$-7", "-7"),
        ("-€7", "-7"),
        (r"\$18 \text{ per hour}", r"18 \text{ dollars per hour}"),
        (r"\$18 \text{ dollars}", r"\$18"),
        (r"25^\circ\text{C}", "25"),
        # numbers
        (r"1\,000", "1000"),
        (r"12\,345\,678.5", "12345678.5"),
        ("1\u202f000", "1,000"),
        (r"1\frac{4}{5}", "9/5"),
        (r"1\frac45", "1.8"),
        (r"-1 \frac{4}{5}", "-9/5"),
        ("1 4/5", r"\frac95"),
        (r"137 \frac{1}{2}", "137.5"),
        (r"2\frac12 \text{ cups}", "2.5"),
        (r"-\frac{-1}{2}", "1/2"),
        # sets
        (r"\{1,2,3\}", r"\{3, 1, 2\}"),
        (r"\{\frac12, 2\}", r"\left\{ 2, 0.5 \right\}"),
        (r"\{(1,2),(3,4)\}", r"\{(3,4),\,(1,2)\}"),
        (r"x \in \{1,2\}", r"\{2,1\}"),
    ],
)
def test_equal(ours, reference):
    assert is_correct(boxed(ours), reference)
    assert is_correct(boxed(reference), ours)


@pytest.mark.parametrize(
    "ours, reference",
    [
        ("42", "43"),
        ("-7", "7"),
        ("1", "11"),
        ("4", "42"),
        ("4 2", "42"),
        ("x42", "42"),
        ("12,34", "1234"),
        ("1,23", "123"),
        ("1234,567", "1234567"),
        ("1, 234", "1234"),
        ("1,234", "1, 234"),
        (",234", "234"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("0.5", "50%"),
        ("5%", "50%"),
        ("0.333", "1/3"),
        ("0.3333333333333333", "1/3"),
        ("1/0", "0"),
        ("0/0", "1"),
        (r"\frac{1}{0}", "1"),
        ("1/2/2", "1/4"),
        ("1e2", "100"),
        ("1E2", "100"),
        ("1e400", "inf"),
        ("1e999999999", "1"),
        ("nan", "0"),
        ("inf", "infinity"),
        ("1_000", "1000"),
        ("0x10", "16"),
        ("2**3", "8"),
        ("2+2", "4"),
        ("4j", "4"),
        ("--7", "7"),
        ("", "0"),
        ("٤٢", "42"),
        ("４２", "42"),
        ("4²", "42"),
        ("²", "2"),
        ("½", "1/2"),
        ("Ⅳ", "4"),
        ("1.2.3", "1.23"),
        ("..5", ".5"),
        (r"137\frac12", "1371/2"),
        ("NewYork", "New York"),
        ("East", "east"),
        (r"\sqrt{2}", "2"),
        (r"\leftarrow", "arrow"),
        (r"\textit", "it"),
        ("5$3", "53"),
        ("1" * 5000, "1" * 4999),
        ("1" * 5000 + ".0", "1" * 5000),
        (r"15 \text{ cm}", r"15 \text{ kg}"),
        (r"15\text{ cm}^2", r"15\text{ cm}"),
        (r"90^\circ", "90 cm"),
        (r"36^\circ", r"\$36"),
        (r"5.4 \text{ cents}", r"\$5.4"),
        (r"15 \text{ million}", "15"),
        (r"15 \text{ or } 16", "15"),
        (r"15 \text{ cm or } 16", "15"),
        ("1, 234 miles", "1234"),
        ("5 percent", "5"),
        ("2k", "2"),
        ("2km", "2"),
        ("2 k", "2"),
        (r"\sin 30^\circ", r"\sin 30"),
        ("cm", ""),
        ("x=5", "y=5"),
        ("x=5", "x=6"),
        ("x=5", r"x \in 5"),
        ("x=", "5"),
        ("x=", "x="),
        ("x<5", "5"),
        ("xy=5", "5"),
        ("x=y=5", "5"),
        (r"2 \cdot 3", "23"),
        (r"2 \cdot \frac{1}{2}", r"2\frac{1}{2}"),
        (r"f \circ g", "fg"),
        (r"\cot x", r"\cotx"),
        ("(B)", "(C)"),
        (r"\begin{vmatrix} 1 \end{vmatrix}", r"\begin{pmatrix} 1 \end{pmatrix}"),
        ("(1,2)", "1,2"),
        ("(1,2)", "[1,2]"),
        ("52_8", "52_9"),
        # what LaTeX shows otherwise
        (r"\sqrt 13", r"\sqrt{13}"),
        (r"\frac123", r"\frac{1}{23}"),
        (r"\frac{1}{2}2", r"\frac{1}{22}"),
        ("2^10", "2^{10}"),
        ("x_12", "x_{12}"),
        (r"\sqrt[3]{2x}", r"\sqrt[3]{2}x"),
        (r"\sqrt[3]{2}", r"\sqrt{2}"),
        (r"\overline{AB}", r"\overline AB"),
        (r"\foo{ab}c", r"\foo{a}bc"),
        (r"x\le 5", r"x<5"),
        (r"\mathbb{R}", "R"),
        (r"x^{}2", "x^2"),
        (r"\log_{10}2", r"\log_1 02"),
        # other units, no units, other values
        (r"18 \text{ eggs}", r"18 \text{ apples}"),
        (r"5 \text{ km/h}", r"5 \text{ mph}"),
        (r"5 \text{ km/h}", r"5 \text{ km}"),
        ("5 mW", "5 MW"),
        (r"5 \text{ m}", r"5 \text{ s}"),
        (r"5 \text{ m}", r"5 \text{ ms}"),
        (r"18 \text{ eggs}", "19"),
        ("€18", "£18"),
        ("€18", r"\$18"),
        (r"25^\circ\text{C}", r"25^\circ\text{F}"),
        ("$18 per hour", r"18 \text{ eggs}"),
        ("2 xy", "2"),
        ("2 m", "2"),
        (r"2\mathrm{i}", "2"),
        (r"2\text{k}", "2"),
        ("2 theta", "2"),
        (r"2\text{ pi}", "2"),
        (r"7 \text{ or eight}", "7"),
        ("7 or more", "7"),
        ("18 dozen", "18"),
        ("18 thousand eggs", "18"),
        ("3 quarters", "3"),
        ("3 fifths", "3"),
        ("7 is the answer", "7"),
        (r"7 \text{ squared}", "7"),
        (r"1 \text{ half}", "1"),
        ("5 and a half", "5"),
        (r"3 \text{ feet } 4", "3"),
        (r"12\,34", "1234"),
        (r"1234\,567", "1234567"),
        ("1 000", "1000"),
        (r"2\frac32", "7/2"),
        (r"2\frac32", "3"),
        (r"2\cdot\frac12", "5/2"),
        ("1 4/5", "14/5"),
        (r"1.5\frac12", "2"),
        (r"1\frac{-1}{2}", "1/2"),
        (r"x\frac12", "1/2"),
        (r"2\frac12x", "2.5"),
        (r"\{1,2\}", r"\{1,3\}"),
        (r"\{1,2\}", "1,2"),
        (r"\{(1,2)\}", r"\{(2,1)\}"),
        (r"(1,2)", "(2,1)"),
        (r"\{1\}\cup\{2\}", r"\{2\}\cup\{1\}"),
    ],
)
def test_not_equal(ours, reference):
    assert not is_correct(boxed(ours), reference)
    assert not is_correct(boxed(reference), ours)


def test_only_the_last_closed_box_earns():
    assert is_correct(r"\boxed{1} no: \boxed{2}", "2")
    assert not is_correct(r"\boxed{2} no: \boxed{1}", "2")
    assert not is_correct(r"\boxed{2} and \boxed{2", "2")
    assert not is_correct("2", "2")


@pytest.mark.parametrize("reference", ["", " ", ".", "$"])
def test_nothing_equals_an_empty_reference(reference):
    assert not is_correct(boxed(""), reference) and not is_correct(boxed(reference), reference)


def test_canonical_sorts_answers_into_classes():
    votes = ["1/2", "0.5", r"\frac12", "50%", "50 %", "half", " half."]
    assert [canonical(vote) for vote in votes] == [Fraction(1, 2)] * 3 + ["50%"] * 2 + ["half"] * 2
    assert len({canonical(vote) for vote in votes}) == 3
    assert {canonical(vote) for vote in ("18", r"\$18", "18 dollars", "x = 18.0")} == {Fraction(18)}


@given(st.integers(-(10**15), 10**15), st.integers(0, 99))
def test_ways_to_write_an_amount(whole, cents):
    plain = f"{whole}.{cents:02}"
    for written in (
        f"{whole:,}.{cents:02}",
        rf"\${plain}",
        f"${plain}$",
        f" {plain}00",
        f"{plain}.",
    ):
        assert is_correct(boxed(written), plain)
    assert not is_correct(boxed(plain), f"{whole}.{cents + 1:02}" if cents < 99 else f"{whole}.98")


@given(st.fractions(), st.fractions())
def test_numbers_are_equal_exactly_when_their_values_are(a, b):
    latex = rf"\frac{{{b.numerator}}}{{{b.denominator}}}"
    assert is_correct(boxed(latex), str(a)) == (a == b)
    assert is_correct(boxed(latex), f"{b.numerator}/{b.denominator}")


@given(st.text(max_size=60))
def test_any_answer_equals_itself_and_equality_is_symmetric(answer):
    assert isinstance(canonical(answer), (str, Fraction))
    if final_answer(boxed(answer)) == answer:
        assert is_correct(boxed(answer), answer) == (canonical(answer) != "")


# Two spellings of one expression are equal, and two expressions are not. An expression is a tuple: an operator, its arguments.


def expressions(depth=3):
    leaf = st.sampled_from([("leaf", text) for text in ("x", "y", "ab", "2x", "13y", r"\pi ")])
    operators = {
        "frac": 2,
        "sqrt": 1,
        "root": 1,
        "power": 2,
        "cot": 1,
        "sum": 2,
        "at most": 2,
        "bar": 1,
    }
    if not depth:
        return leaf
    one = expressions(depth - 1)
    return leaf | st.one_of([st.tuples(st.just(name), *[one] * n) for name, n in operators.items()])


def spelled(expression, draw):
    """One of the ways to write the expression."""

    def any_of(*choices):
        return draw(st.sampled_from(choices))

    def space():
        return any_of("", "", " ", "  ", r"\;", r"\quad ", "~")

    def argument(inner):
        text = spelled(inner, draw)
        return any_of(" ", "") + (
            "{" + text + "}" if not is_one_token(inner) or any_of(True, False) else " " + text
        )

    name, *inner = expression
    if name == "leaf":
        text = space().join(re.findall(r"\\pi |[0-9]+|.", inner[0]))
    elif name == "frac":
        text = any_of(r"\frac", r"\dfrac", r"\tfrac") + argument(inner[0]) + argument(inner[1])
    elif name in ("sqrt", "bar"):
        text = {"sqrt": r"\sqrt", "bar": r"\overline"}[name] + argument(inner[0])
    elif name == "root":
        text = r"\sqrt[3]" + argument(inner[0])
    elif name == "power":
        text = f"({spelled(inner[0], draw)})^{argument(inner[1])}"
    elif name == "cot":
        text = any_of(r"\cot{%s}", r"\cot %s", r"{\cot} %s") % f"({spelled(inner[0], draw)})"
    else:
        between = "+" if name == "sum" else any_of(r"\le ", r"\leq ", r"\leq{}", "≤")
        text = f"{any_of('(', chr(92) + 'left(')}{spelled(inner[0], draw)}{space()}{between}{space()}{spelled(inner[1], draw)})"
    return any_of("%s", "%s", "{%s}", r"{\bf %s}", r"\mathbf{%s}", r"\displaystyle %s") % text


def is_one_token(expression):
    return expression in (("leaf", "x"), ("leaf", "y"), ("leaf", r"\pi "))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(expressions(), expressions(), st.data())
def test_two_spellings_are_equal_exactly_when_the_expressions_are(one, other, data):
    assert equal(spelled(one, data.draw), spelled(one, data.draw))
    assert equal(spelled(one, data.draw), spelled(other, data.draw)) == (one == other)


UNITS = [
    "eggs",
    "apples",
    "km",
    "km/h",
    "m",
    "s",
    "miles per hour",
    "cm^2",
    "cm^3",
    "square feet",
    "dollars",
    "euros",
    "degrees",
]


@settings(deadline=None)
@given(
    st.integers(-(10**6), 10**6),
    st.sampled_from(UNITS),
    st.sampled_from(UNITS),
    st.integers(-(10**6), 10**6),
    st.data(),
)
def test_a_unit_in_words_may_be_left_out_but_not_changed(
    number, unit, other_unit, other_number, data
):
    def written(n, unit):
        signs = {"dollars": rf"\${n}", "euros": f"€{n}", "degrees": rf"{n}^\circ"}
        command = data.draw(st.sampled_from([r"\text", r"\mathrm", r"\textrm ", r"\mbox"]))
        ways = [
            f"{n}{command}{{{unit}}}",
            rf"{n}\,{command}{{ {unit}}}",
            f"{n} {command}{{~{unit} }}.",
            signs.get(unit),
        ]
        return data.draw(st.sampled_from(list(filter(None, ways))))

    assert equal(written(number, unit), str(number)) and equal(f"{number:,}", written(number, unit))
    assert equal(written(number, unit), written(number, unit))
    assert equal(written(number, unit), written(number, other_unit)) == (unit == other_unit)
    assert equal(written(number, unit), str(other_number)) == (number == other_number)


@settings(deadline=None)
@given(st.integers(0, 10**7), st.integers(1, 99), st.integers(2, 100), st.booleans())
def test_mixed_numbers_and_thousands(whole, top, bottom, negative):
    sign, value = ("-", -1) if negative else ("", 1)
    for mixed in (rf"{sign}{whole}\frac{{{top}}}{{{bottom}}}", f"{sign}{whole} {top}/{bottom}"):
        assert equal(mixed, str(value * (whole + Fraction(top, bottom)))) == (top < bottom)
    assert equal(f"{sign}{whole:,}".replace(",", r"\,"), f"{sign}{whole}")


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["1", "-2", "0.5", "x", r"\pi", "(1,2)", r"\sqrt{2}"]),
        min_size=1,
        max_size=6,
    ),
    st.randoms(),
)
def test_a_set_has_no_order_and_a_tuple_has(elements, rng):
    shuffled = rng.sample(elements, len(elements))
    one, other = ", ".join(elements), ",".join(shuffled).replace("0.5", r"\frac12")
    assert equal(rf"\{{{one}\}}", rf"\left\{{{other}\right\}}")
    assert equal(f"({one})", f"({','.join(shuffled)})") == (elements == shuffled)
    assert not equal(rf"\{{{one}\}}", rf"\{{{one},7\}}")


LATEX = [
    BOX,
    "{",
    "}",
    "\\",
    "$",
    "%",
    "1",
    ",",
    ".",
    "/",
    "-",
    " ",
    r"\frac",
    r"\text{",
    r"\left",
    r"\!",
    "~",
    "²",
    "e9",
    "x=",
    r"\circ",
    "^",
    " cm",
    r"\fbox",
    r"\sqrt[",
    r"\{",
    r"\}",
    r"\,000",
    r"\bf",
    " eggs",
    "€",
    r"\foo{",
    "]",
    " 1/2",
]


@given(
    st.lists(st.sampled_from(LATEX)).map("".join),
    st.lists(st.sampled_from(LATEX), max_size=8).map("".join),
)
def test_no_input_breaks_the_reward(text, reference):
    assert is_correct(text, reference) in (True, False)


HUNDRED_KB = 100_000
HOSTILE = {
    "open": "{",
    "close": "}",
    "pairs": "{}",
    "turned": "}{",
    "boxes": BOX,
    "empty boxes": BOX + "}",
    "nested boxes": BOX + BOX + "}}",
    "escapes": BOX + r"\}",
    "backslashes": "\\",
    "mixed": BOX + "{}}{",
    "bare boxes": r"\boxed",
    "spaced boxes": r"\boxed ",
    "boxed digits": r"\boxed 1",
    "digits": "1",
    "digits, commas": "111,",
}


def count(monkeypatch, name, size):
    """The sum of `size(*arguments)` over all calls of a function of data.reward from now on, in a list."""
    total, function = [0], getattr(reward, name)

    def counting(*arguments):
        total[0] += size(*arguments)
        return function(*arguments)

    monkeypatch.setattr(reward, name, counting)
    return total


@pytest.mark.parametrize("head", ["", BOX, r"\boxed "])
@pytest.mark.parametrize("name", HOSTILE)
def test_of_100_kb_every_character_is_looked_at_once_for_boxes_and_once_for_answers(
    name, head, monkeypatch
):
    reward._parts.cache_clear()
    searched, normalised = count(monkeypatch, "_closed", len), count(monkeypatch, "_normalise", len)
    text = (head + HOSTILE[name] * HUNDRED_KB)[:HUNDRED_KB]
    for read in (answers, final_answer, answers):
        searched[0] = 0
        read(text + "}")
        assert searched[0] <= len(text)
    assert normalised[0] <= len(text)  # all three together


def test_a_box_nested_50_000_deep_closes():
    text = BOX + "{" * 50_000 + "}" * 50_001
    assert len(final_answer(text)) == HUNDRED_KB and not is_correct(text, "42")


@pytest.mark.parametrize(
    "piece",
    [
        *LATEX,
        "\t",
        "11",
        "111,",
        r"\frac1",
        "{1",
        "x ",
        r"\ ",
        r"\quad",
        "^^",
        r"\sqrt",
        "[",
        r"\text{ cm",
        " abcd",
        r"1\,",
        r"\{1,",
        "(",
        r"\frac{",
        r"\frac\frac",
        r"\foo",
        "1 ",
    ],
)
def test_normalising_the_longest_answer_takes_every_token_once(piece, monkeypatch):
    items, respaced = count(monkeypatch, "_item", lambda *_: 1), count(monkeypatch, "_respace", len)
    searched = count(monkeypatch, "_elements", len)
    for head in ("", "1", r"1\text{", r"\{"):
        for end in ("", "}", r"\}", "x"):
            items[0] = respaced[0] = searched[0] = 0
            answer = (head + piece * LONGEST)[: LONGEST - len(end)] + end
            value, *_ = reward._parts.__wrapped__(answer)
            assert (
                items[0] <= len(answer)
                and respaced[0] <= 8 * len(answer)
                and searched[0] <= 4 * len(answer)
            )
            assert len(str(value)) <= 4 * len(answer)


def test_what_is_longer_is_not_normalised(monkeypatch):
    normalised = count(monkeypatch, "_normalise", len)
    assert not equal("1" * (LONGEST + 1), "1" * (LONGEST + 1) + ".0") and equal(
        "x" * HUNDRED_KB, "x" * HUNDRED_KB
    )
    assert normalised[0] == 0


@pytest.mark.parametrize("n", [reward.DEEPEST - 2, reward.DEEPEST + 2, 400])
def test_groups_are_read_to_a_depth_and_deeper_ones_compared_as_they_stand(n):
    assert equal("{" * n + "5" + "}" * n, "5") == (n < reward.DEEPEST)
    assert equal("x^{" * n + "5" + "}" * n, "x^{" * n + "5" + "}" * n)
    assert not equal("x^{" * n + "5" + "}" * n, "x^{" * n + "6" + "}" * n)


# ------------------------------------------------------------------ grading: with math-verify


@pytest.fixture(scope="module")
def math_verify():
    """math-verify's own opinion."""
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is not installed")
    opinion = MathVerify()
    yield opinion
    opinion.close()


@pytest.fixture(scope="module")
def grader():
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "SECONDS", 2)  # one test waits for the end of them
        grader = Grader("math-verify")
        yield grader
        grader.close()


@pytest.fixture(scope="module")
def references():
    """The answers of MATH-500, in order and with their repetitions."""
    path = SHARED / "math500" / "test.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [problem.answer for problem in load_problems(str(path))]


@pytest.fixture(scope="module")
def measured():
    return json.loads(
        (Path(__file__).parents[1] / "results" / "grading-math500.json").read_text(encoding="utf-8")
    )


def test_without_math_verify_the_built_in_comparison_grades_and_says_so(monkeypatch):
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    grader = Grader()
    assert grader.equal("1/2", "0.5") and not grader.equal("q-p", "-p+q")
    assert str(grader) == "the built-in comparison (math-verify is not installed)"
    assert str(Grader("builtin")) == "the built-in comparison"
    with pytest.raises(ValueError, match="pip install math-verify.*--grader builtin"):
        Grader("math-verify")


def test_a_math_verify_that_does_not_start_is_a_sentence_not_a_silent_fallback(
    tmp_path, monkeypatch
):
    (tmp_path / "math_verify.py").write_text("raise ImportError('a part of it is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: True)
    for name in ("auto", "math-verify"):
        with pytest.raises(ChildProcessError, match="does not start.*--grader builtin"):
            Grader(name)
    Grader("builtin")


def test_either_of_the_two_suffices(grader):
    assert grader.equal("-q+p", "p - q") and not equal("-q+p", "p - q")  # only math-verify knows
    assert grader.equal("42.", "42") and not grader.math_verify.equal(
        "42.", "42"
    )  # only the built-in one does
    assert not grader.equal("q-p", "p - q") and not grader.equal("43", "42")
    assert str(grader).startswith("math-verify 0.") and "or the built-in comparison" in str(grader)


@pytest.mark.parametrize(
    "text, right",
    [
        (r"\boxed{-q+p}", True),
        (r"\boxed{1} no: \boxed{-q+p}.", True),
        (r"$\boxed{-q+p}$ I hope", True),
        (r"\boxed{-q+p} no: \boxed{1}", False),
        (r"\boxed{-q+p} no: \boxed{-q+p", False),
        ("-q+p", False),
        ("$-q+p$", False),
        ("The final answer is $-q+p$. I hope it is correct.", False),
        (r"\fbox{-q+p}", True),
        (r"\boxed{}", False),
        (r"$-q+p$ and $\boxed{1}$", False),
        (r"The final answer is $-q+p$. I hope. \boxed{1}", False),
        (r"\boxed{1 \boxed {-q+p}}", True),
        (r"\boxed{1 \fbox{-q+p}}", True),
        (r"\boxed{-q+p \fbox{1}}", False),
        (r"\boxed{1? The final answer is $-q+p$. I hope}", False),
        (r"\boxed{1? Answer: $-q+p$}", False),
        (r"\boxed{1$ $-q+p}", False),
    ],
)
def test_math_verify_sees_the_last_box_and_nothing_else(grader, text, right):
    assert is_correct(text, "p - q", grader.equal) == right


def test_an_answer_without_end_is_given_up_and_the_next_one_graded(grader):
    before = grader.math_verify.given_up
    for n in (1, 2):  # the second time it is remembered
        assert not grader.equal("9^{9^{9^{9}}}", "42")
        assert grader.math_verify.given_up == before + n
    assert f"{before + 2} comparisons left to the built-in one alone" in str(grader)
    assert grader.equal("-q+p", "p - q")


@pytest.mark.parametrize("piece", ["{}", "9^", r"\frac", "$", r"\text{a}"])
def test_what_is_too_long_never_reaches_math_verify(grader, piece):
    text = boxed((piece * HUNDRED_KB)[: HUNDRED_KB // 2 * 2])
    before = grader.math_verify.given_up
    assert not is_correct(text, "42", grader.equal)
    assert grader.math_verify.given_up == before + (final_answer(text) is not None)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(LATEX), max_size=12).map("".join),
    st.lists(st.sampled_from(LATEX), max_size=8).map("".join),
)
def test_no_short_input_breaks_the_grader(grader, given_answer, reference):
    assert grader.equal(given_answer, reference) in (True, False)
    assert grader.equal("-q+p", "p - q")  # and it goes on


def test_all_of_math500_is_right_against_itself(references, math_verify):
    assert len(references) == 500
    for answer in references:
        assert final_answer(boxed(answer)) == answer
        assert is_correct(boxed(answer), answer) and is_correct(
            boxed(answer), answer, math_verify.equal
        )


def test_the_built_in_comparison_agrees_as_often_as_measured(references, measured):
    for kind, rewrites in (("same", agreement.SAME), ("different", agreement.DIFFERENT)):
        assert measured[kind].keys() == rewrites.keys()
        for name, rewrite in rewrites.items():
            found = agreement.compare(references, rewrite, lambda *_: True)
            recorded = measured[kind][name]
            assert (found["n"], found["both"]) == (
                recorded["n"],
                recorded["both"] + recorded["only_builtin"],
            ), name


def test_different_references_stay_different(references, measured):
    pairs = measured["pairs"]
    found = agreement.compare_pairs(references, lambda *_: False)
    assert found["n"] == pairs["n"] == 301 * 300
    assert sorted(found["only_builtin"]) == sorted(
        map(tuple, pairs["both"] + pairs["only_builtin"])
    )
    meant = {
        frozenset(pair)
        for pair in (
            (r"10,\!080", "10080"),
            ("2 \\sqrt{5}", "2\\sqrt{5}"),
            (r"\frac14", r"\frac{1}{4}"),  # written differently
            ("15", r"15\mbox{ cm}^2"),
            ("36", r"\$36"),
            ("5", "x=5"),
            *((n, rf"{n}^\circ") for n in ("30", "36", "90", "120")),
        )
    }
    assert {frozenset(pair) for pair in found["only_builtin"]} == meant


def test_math_verify_says_of_pairs_what_was_measured(references, measured, math_verify):
    equal_pairs = {
        tuple(pair) for pair in measured["pairs"]["both"] + measured["pairs"]["only_math_verify"]
    }
    distinct, rng = sorted(set(references)), random.Random(0)
    for pair in [*equal_pairs, *(tuple(rng.sample(distinct, 2)) for _ in range(200))]:
        assert math_verify.equal(*pair) == (pair in equal_pairs), pair


@pytest.mark.slow
def test_math_verify_agrees_as_often_as_measured(references, measured, math_verify):
    for kind, rewrites in (("same", agreement.SAME), ("different", agreement.DIFFERENT)):
        for name, rewrite in rewrites.items():
            found, recorded = (
                agreement.compare(references, rewrite, math_verify.equal),
                measured[kind][name],
            )
            assert abs(found["agree"] - recorded["agree"]) <= 2, (
                name
            )  # a comparison or two may run out of time


# ------------------------------------------------------------------ problem files


def write(path, *lines) -> str:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return str(path)


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"question": " 1+1? ", "answer": "2"},
        "",
        "   ",
        {"problem": "2+2?", "answer": " 4 ", "solution": r"\boxed{5}"},
        {"question": "GSM8K's", "answer": "It is <<1+1=2>>2.\n#### 9\nno\n#### 1,234"},
        {"question": "more follows", "answer": "2+2=4\n#### 4\nThat is all. The 4 is\nright."},
        {"question": "on the next line", "answer": "####\n 4 \n\n"},
        {"question": "no mark", "answer": "a\nb"},
        {"question": "a\u2028b", "answer": 7},
        '{"question": "c\u2028d", "answer": 2.50}\r',
    )
    assert load_problems(path) == [
        ("1+1?", "2"),
        ("2+2?", "4"),
        ("GSM8K's", "1,234"),
        ("more follows", "4"),
        ("on the next line", "4"),
        ("no mark", "a\nb"),
        ("a\u2028b", "7"),
        ("c\u2028d", "2.5"),
    ]
    assert all(isinstance(problem, Problem) for problem in load_problems(path, "whatever"))


@pytest.mark.parametrize(
    "value, answer",
    [
        ("42", "42"),
        ("-3", "-3"),
        ("0", "0"),
        ("3.0", "3.0"),
        ("1e22", "10000000000000000000000"),
        ("1e-7", "0.0000001"),
        ("1" + "0" * 400, "1" + "0" * 400),
    ],
)
def test_numbers_as_answers(tmp_path, value, answer):
    path = write(tmp_path / "p.jsonl", f'{{"question": "q", "answer": {value}}}')
    assert load_problems(path) == [("q", answer)]
    assert is_correct(boxed(answer), load_problems(path)[0].answer)


def test_json_is_a_list_or_one_object_a_line(tmp_path):
    entries = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"}]
    listed = write(tmp_path / "list.json", json.dumps(entries, indent=2))
    lines = write(tmp_path / "lines.json", *entries)
    assert load_problems(listed) == load_problems(lines) == [("p", "1"), ("q", "2")]


@pytest.mark.parametrize("name", ["p.jsonl", "P.JSONL", "p.json", "P.Json"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_and_lines_are_read_whatever_the_file_is_called(tmp_path, name, indent):
    entries = [{"question": "p", "answer": "1"}, {"question": "q", "answer": 2}]
    assert load_problems(write(tmp_path / name, *entries)) == [("p", "1"), ("q", "2")]
    assert load_problems(write(tmp_path / name, json.dumps(entries, indent=indent))) == [
        ("p", "1"),
        ("q", "2"),
    ]


@pytest.mark.parametrize(
    "entry, answer",
    [
        ({"problem": "p", "solution": r"Half of 6 is $\boxed{3}$."}, "3"),
        (
            {"problem": "p", "solution": r"First \boxed{4}, but no: \boxed{\frac{1}{2}}. Done."},
            r"\frac{1}{2}",
        ),
        ({"question": "p", "solution": r"\boxed{ 7 }"}, "7"),
        ({"problem": "p", "answer": None, "solution": r"\boxed{8}"}, "8"),
        ({"problem": "p", "answer": "9", "solution": r"\boxed{8}"}, "9"),
    ],
)
def test_the_answer_of_a_solution_is_its_last_box(tmp_path, entry, answer):
    assert load_problems(write(tmp_path / "p.jsonl", entry)) == [("p", answer)]


def test_the_boxes_of_the_math500_solutions_are_its_answers(tmp_path):
    path = SHARED / "math500" / "test.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    problems = load_problems(str(path))
    solutions = [
        {"problem": e["problem"], "solution": e["solution"]}
        for e in json.loads(path.read_text(encoding="utf-8"))
    ]
    boxed_ones = load_problems(write(tmp_path / "p.jsonl", *solutions))
    assert [p.question for p in boxed_ones] == [p.question for p in problems]
    assert all(
        is_correct(boxed(ours.answer), theirs.answer) for ours, theirs in zip(boxed_ones, problems)
    )


def test_a_byte_order_mark_and_a_path_object_are_fine(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "1"}\r\n')
    assert load_problems(path) == [("q", "1")]


GOOD = '{"question": "q", "answer": "1"}'


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"question": "q", "answer": "1"', "not JSON"),
        ("{}}", "not JSON"),
        ("#### 42", "not JSON"),
        ("[1, 2]", "not an object"),
        ('"text"', "not an object"),
        ("null", "not an object"),
        ('{"answer": "1"}', 'no "question"'),
        ('{"question": "q"}', 'no "answer"'),
        ('{"question": "q", "answer": null}', 'no "answer"'),
        (r'{"problem": "q", "solution": "It is 7."}', 'no \\boxed{...} in its "solution"'),
        (r'{"problem": "q", "solution": "It is \\boxed{7"}', 'no \\boxed{...} in its "solution"'),
        (r'{"problem": "q", "solution": "It is \\boxed{ }"}', 'no \\boxed{...} in its "solution"'),
        ('{"problem": "q", "solution": ["7"]}', '"solution" is empty or not text'),
        ('{"problem": "q", "solution": null}', 'no "solution"'),
        ('{"data": [{"question": "q", "answer": "1"}]}', 'no "question"'),
        ('{"question": "q", "answer": ""}', '"answer" is empty'),
        ('{"question": " ", "answer": "1"}', '"question" is empty'),
        ('{"question": 5, "answer": "1"}', '"question" is empty or not text'),
        ('{"question": "q", "answer": ["1"]}', '"answer" is empty or not text'),
        ('{"question": "q", "answer": true}', '"answer" is empty or not text'),
        ('{"question": "q", "answer": NaN}', '"answer" is empty'),
        ('{"question": "q", "answer": 1e400}', '"answer" is empty'),
        ('{"question": "q", "answer": "so\\n#### "}', 'nothing after "####"'),
        ('{"question": "\\ud800", "answer": "1"}', "surrogate"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "too long"),
        ("[" * 100_000, "too deep"),
        ('{"a":' * 100_000, "too deep"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "bad.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError) as error:
        load_problems(path)
    message = str(error.value)
    assert f"{path}, line 3: " in message and complaint in message
    assert "\n" not in message and len(message) < len(path) + 200


def test_a_bad_item_of_a_list_is_named(tmp_path):
    path = write(tmp_path / "bad.json", "[", GOOD, ", 7]")
    with pytest.raises(ValueError, match="item 2: not an object"):
        load_problems(path)
    with pytest.raises(ValueError, match="not JSON .* at line 2, column"):
        load_problems(write(tmp_path / "broken.json", "[", GOOD))
    with pytest.raises(
        ValueError,
        match=r"lists.jsonl: not JSON \(Extra data at line 2.*one object on each line, or all of them in",
    ):
        load_problems(write(tmp_path / "lists.jsonl", '["q", "1"]', '["q", "2"]'))
    with pytest.raises(
        ValueError,
        match="object.json, line 1: not JSON .* one object on each line, or all of them in one list",
    ):
        load_problems(
            write(tmp_path / "object.json", json.dumps({"data": [json.loads(GOOD)]}, indent=2))
        )


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"question": "caf\xe9", "answer": "1"}')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        load_problems(str(path))


@pytest.mark.parametrize(
    "name, content", [("e.jsonl", ""), ("b.jsonl", "\n \n"), ("e.json", ""), ("l.json", "[]")]
)
def test_an_empty_file_is_refused(tmp_path, name, content):
    with pytest.raises(ValueError, match="holds no problems"):
        load_problems(write(tmp_path / name, content))


def test_a_missing_file_or_a_directory_is_refused(tmp_path):
    (tmp_path / "dir.jsonl").mkdir()
    for name in ("missing.jsonl", "missing.json", "dir.jsonl"):
        with pytest.raises(FileNotFoundError, match=name):
            load_problems(str(tmp_path / name))


def test_unknown_sources_and_splits_list_what_is_known():
    with pytest.raises(ValueError, match="'gsm9k'.*wordproblems, gsm8k.*jsonl"):
        load_problems("gsm9k")
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        load_problems("wordproblems", "dev")
    with pytest.raises(ValueError, match="'validation'.*train, test"):
        load_problems("gsm8k", "validation")


JSON = [
    '{"question":',
    '{"problem":',
    '"answer":',
    '"q"',
    ",",
    "}",
    "[",
    "]",
    "\n",
    "1",
    "1e999",
    '"\\ud800"',
    '"####"',
    "null",
    '"solution":',
    r'"\\boxed{1}"',
]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from(JSON), max_size=12).map("".join).map(str.encode),
    st.sampled_from([".json", ".jsonl", ".JSONL"]),
)
def test_any_bytes_give_problems_or_one_sentence(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        problems = load_problems(str(path))
    except ValueError as error:
        assert (
            not isinstance(error, UnicodeError)
            and "\n" not in str(error)
            and str(path) in str(error)
        )
    else:
        assert problems and all(p.question.strip() and p.answer.strip() for p in problems)


# ------------------------------------------------------------------ GSM8K


TINY = b'{"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\\n#### 4"}\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory and a two-file "GSM8K" whose checksum is known; no proxy between us and ourselves."""
    monkeypatch.setenv("THINKTUNING_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gsm8k, "SHA256", dict.fromkeys(("train", "test"), gsm8k._sha256(TINY)))
    return tmp_path / "cache" / "gsm8k"


@pytest.fixture
def serve():
    """serve(status, body, announced length) -> URL of a local server that answers so, and the paths asked of it."""
    servers = []

    def start(status=200, body=TINY, length=None):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/data", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_fetched_once_then_read_from_the_cache(cache, serve):
    url, asked = serve()
    for _ in range(2):
        assert gsm8k.load("test", url) == [Problem("Two and two?", "4")]
    assert asked == ["/data/test.jsonl"]
    assert load_problems("gsm8k", "test") == [
        ("Two and two?", "4")
    ]  # from the cache: no network needed
    assert [path.name for path in cache.iterdir()] == ["test.jsonl"]


@pytest.mark.parametrize(
    "answer, complaint",
    [
        ({"body": TINY + b" "}, "wrong SHA-256"),
        (
            {"body": TINY[:30], "length": len(TINY)},
            "wrong SHA-256|could not fetch",
        ),  # the connection breaks half-way
        ({"body": b""}, "wrong SHA-256"),
        ({"body": b"x" * 200_000}, "wrong SHA-256"),
        ({"status": 404}, "could not fetch .*404"),
        ({"status": 500}, "could not fetch .*500"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_what_to_do(
    cache, serve, monkeypatch, answer, complaint
):
    monkeypatch.setattr(gsm8k, "MAX_BYTES", 100_000)
    url, _ = serve(**answer)
    with pytest.raises((OSError, ValueError), match=complaint) as error:
        gsm8k.load("train", url)
    assert f"{url}/train.jsonl" in str(error.value) and f"put it at {cache / 'train.jsonl'}" in str(
        error.value
    )
    assert not list(cache.glob("*"))
    assert gsm8k.load("train", serve()[0])  # and the next try starts from nothing


def test_no_more_is_read_than_the_bound(cache, serve, monkeypatch):
    monkeypatch.setattr(gsm8k, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="1,001 bytes"):
        gsm8k.load("train", serve(body=b"x" * 5_000_000)[0])


def test_offline_says_so(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        ConnectionError, match="could not fetch .*with a network, or fetch it by any other means"
    ):
        gsm8k.load("test", f"http://127.0.0.1:{port}")
    assert not cache.exists()


def test_a_server_that_never_answers_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(gsm8k, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ConnectionError, match="timed out"):
            gsm8k.load("test", f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_damaged_cache_is_refused_not_used(cache):
    cache.mkdir(parents=True)
    (cache / "test.jsonl").write_bytes(TINY[:-10])
    with pytest.raises(ValueError, match="delete it"):
        gsm8k.load("test")


def test_a_failed_write_leaves_nothing(cache, serve, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gsm8k.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        gsm8k.load("test", serve()[0])
    assert not list(cache.glob("*"))


# ------------------------------------------------------------------ real data, where it is


@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_gsm8k_itself(split, count, tmp_path, monkeypatch):
    path = SHARED / "gsm8k" / f"{split}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    monkeypatch.setenv("THINKTUNING_DATA", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / path.name).write_bytes(path.read_bytes())
    problems = load_problems(
        "gsm8k", split
    )  # put there by hand: the checksum is looked at, nothing is fetched
    assert problems == load_problems(str(path)) and len(problems) == count
    for problem in problems:
        assert isinstance(canonical(problem.answer), Fraction)
        assert is_correct(boxed(problem.answer), problem.answer)
        assert is_correct(boxed(rf"\${problem.answer}.00"), problem.answer)
        assert not is_correct(boxed(problem.answer + "1"), problem.answer)


def test_math500_references_equal_themselves():
    path = SHARED / "math500" / "test.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    problems = load_problems(str(path))
    assert len(problems) == 500
    for entry, problem in zip(json.loads(path.read_text(encoding="utf-8")), problems):
        assert is_correct(boxed(problem.answer), problem.answer)
        assert is_correct(
            boxed(f" {problem.answer} .".replace(r"\frac", r"\dfrac").replace(" ", "  ")),
            problem.answer,
        )
        assert is_correct(entry["solution"], problem.answer), (
            problem
        )  # the worked solution's own box


def test_word_problems_are_problems():
    pytest.importorskip("data.wordproblems")
    for split in ("train", "validation", "test"):
        problems = load_problems("wordproblems", split)
        assert problems and all(isinstance(problem, Problem) for problem in problems)
        assert all(is_correct(boxed(problem.answer), problem.answer) for problem in problems)


def test_data_does_not_import_torch_nor_the_grader_its_package():
    code = (
        "import sys, data, data.reward, data.gsm8k, data.grading; "
        "sys.exit(bool({'torch', 'sympy', 'math_verify'} & {*sys.modules}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    )
