"""The report draws the numbers that were recorded, says what they say, lets nothing in or out."""

import functools
import http.server
import json
import math
import random
import re
import shutil
import subprocess
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from data.tokenizer import Tokenizer
from data.wordproblems import DAYS, counts, question, stories, worked_out
from data.wordproblems import line as line_of_story
from grpo import LossSettings, Rollout, policy_loss
from model import LM, ModelConfig
from run.config import Config
from show import charts, report
from show.charts import Line, Point, format_value, series, ticks, trend, trends
from show.read_runs import Recorded, read_runs
from show.transcripts import (
    LONGEST_TEXT,
    SHADES,
    article,
    guidance_tokens,
    telling_steps,
    transcripts,
)
from teacher import Feedback, augment
from thinktuning import loss_settings, main

HERE = Path(__file__).parents[1]


def step_metrics(step, accuracy, reflects=0.0, fraction=0.0, **more):
    """What train records at one step, as far as the page looks at it."""
    asked = 8 if fraction else 0
    return {
        "step": step,
        "reflection_rate": reflects,
        "mean_length": 8.0 + 60 * reflects,
        "sampled_accuracy": accuracy,
        "reward": accuracy,
        "fraction": fraction,
        "groups_equal": 0.25,
        "teacher_asked": asked,
        "teacher_parsed": asked,
        "guided": asked,
        "guided_share_of_rollouts": asked / 64,
        "teacher_opinion_right": 0.75 * asked,
        "guided_reward": float(asked),
        "guided_original_reward": asked / 4,
        "behaviours": {"self-conflict": asked // 2, "self-critique": asked // 4} if asked else {},
        "clip_fraction": 0.01,
        "dual_clip_fraction": 0.0,
        "entropy": 0.2,
        **more,
    }


def transcript(step, guided=False, **more):
    reason, phrase = "Wait, that does not fit.", "So the answer is \\boxed{4}."
    words = [
        ["\n\n", 0.976, 0.02],
        [reason, 0.4, 0.001],
        ["\n\n", 1.0, 0.99],
        [phrase, 1.0, 0.9],
        ["<|end|>", 1.0, 1.0],
    ]
    return {
        "step": step,
        "question": f"How many at step {step}?",
        "answer": "4",
        "student": "The answer is \\boxed{3}.",
        "attempt_right": False,
        "opinion": "incorrect" if guided else None,
        "reason": reason if guided else None,
        "phrase": phrase if guided else None,
        "reward": float(guided),
        "advantage": 1.5 if guided else -0.5,
        "guidance": "".join(t for t, *_ in words) if guided else "",
        "guidance_tokens": words if guided else [],
        **more,
    }


def make_run(path, metrics, lines=(), **config):
    path.mkdir(parents=True)
    settings = {"method": "thinktuning", "seed": 0, "steps": len(metrics), "learning_rate": 1e-4}
    (path / "config.json").write_text(json.dumps(settings | config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (path / "transcripts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def made(*paths) -> str:
    return report.page(*read_runs(paths))


def command(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def two_runs(tmp_path):
    """ThinkTuning climbs and its teacher leaves at step 6; GRPO stays where it was."""
    rng = random.Random(0)
    up = [
        step_metrics(
            s,
            min(0.95, 0.3 + 0.04 * s),
            min(1.0, 0.05 * s),
            0.1 if s < 6 else 0.0,
            w_guided=0.99,
            pi_guided=0.9 + 0.01 * s,
        )
        for s in range(40)
    ]
    flat = [step_metrics(s, 0.3 + 0.05 * rng.random()) for s in range(40)]
    lines = [transcript(s, guided=s < 6) for s in range(40)]
    return make_run(tmp_path / "a", up, lines), make_run(
        tmp_path / "b", flat, lines[6:], method="grpo"
    )


# Reading the page back


class Page(HTMLParser):
    """Checks that every tag closes where it should; collects tags, attributes and texts."""

    VOID = {"meta", "link"}
    SELF_CLOSED = {"path", "polyline", "polygon", "circle"}

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.SELF_CLOSED
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"{tag} closes what it did not open"

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.stack[-1], data))

    def of(self, tag):
        return [text for t, text in self.texts if t == tag]


def check_contained(text) -> Page:
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "image",
        "use",
    }
    for tag, attributes in page.tags:
        assert not any(
            name.startswith("on") or name in ("src", "srcset", "xlink:href") for name in attributes
        )
        assert attributes.get("href", "#").startswith("#") or (tag, attributes["href"]) == (
            "link",
            "data:,",
        )
        assert not re.search(
            r"url\(|//", attributes.get("style", "") + attributes.get("content", "")
        )
    assert not re.search(r"url\(|@import|//", "".join(page.of("style")))
    return page


def chart(text, quantity):
    """Polylines and polygons in units of the axis labels, title, a fifth of a pixel in y and x."""
    svg = next(
        m
        for m in re.findall(r"<svg viewBox=.*?</svg>", text, re.S)
        if f'aria-label="{quantity}' in m
    )
    root = ElementTree.fromstring(svg)
    labels = [
        (e.get("text-anchor"), float(e.get("x")), float(e.get("y")), e.text)
        for e in root.iter("text")
    ]
    percent = any(label.endswith("%") for _, _, _, label in labels)
    ys = [
        (y, float(label.rstrip("%").replace(",", "")) / (100 if percent else 1))
        for a, x, y, label in labels
        if x == 44 and a == "end"
    ]
    xs = [(x, float(label)) for a, x, _, label in labels if a == "middle"]

    def scale(pairs):
        (p0, v0), (p1, v1) = pairs[0], pairs[-1]
        assert all(
            abs(p0 + (v - v0) * (p1 - p0) / (v1 - v0) - p) < 0.11 for p, v in pairs
        )  # labels stand where they should
        return lambda p: v0 + (p - p0) * (v1 - v0) / (p1 - p0)

    fx, fy = scale(xs), scale(ys)

    def data(tag):
        corners = [[c.split(",") for c in e.get("points").split()] for e in root.iter(tag)]
        return [[(fx(float(x)), fy(float(y))) for x, y in line] for line in corners]

    return (
        data("polyline"),
        data("polygon"),
        root.find("title").text,
        0.2 * abs(fy(1.0) - fy(0.0)),
        0.2 * abs(fx(1.0) - fx(0.0)),
    )


def same(drawn, expected, dx, dy):
    drawn, expected = np.array(drawn), np.array(expected)
    assert drawn.shape == expected.shape
    assert np.abs(drawn[:, 0] - expected[:, 0]).max() <= dx
    assert np.abs(drawn[:, 1] - expected[:, 1]).max() <= dy


# What is drawn


def test_the_page_is_well_formed_and_holds_everything_that_it_shows(two_runs):
    text = made(*two_runs)
    page = check_contained(text)
    assert sum(tag == "h1" for tag, _ in page.tags) == 1 and ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))  # no heading level is left out
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= anchors
    images = [a for tag, a in page.tags if tag == "svg" and "aria-hidden" not in a]
    assert len(images) >= 13 and all(a["role"] == "img" and a["aria-label"] for a in images)
    figures, tables = (sum(tag == name for tag, _ in page.tags) for name in ("figure", "table"))
    assert figures == len(images) and tables >= figures + 2  # every chart has its numbers


def test_numbers_drawn_are_the_numbers_recorded(two_runs):
    text = made(*two_runs)
    for quantity, key in (
        ("Own samples that reflect", "reflection_rate"),
        ("Accuracy of the student", "sampled_accuracy"),
        ("Length of the student", "mean_length"),
        ("Entropy", "entropy"),
        ("Groups skipped", "groups_equal"),
    ):
        lines, bands, _, dy, dx = chart(text, quantity)
        assert not bands  # one run each, and no error recorded
        for line, path in zip(lines, two_runs, strict=True):
            same(
                line,
                [(m["step"], m[key]) for m in map(json.loads, open(path / "metrics.jsonl"))],
                dx,
                dy,
            )


def test_bands_are_mean_and_standard_error_over_seeds(tmp_path):
    rng = np.random.default_rng(0)
    values = 0.3 + 0.4 * rng.random((5, 30))  # (seeds, steps)
    paths = [
        make_run(tmp_path / f"r{i}", [step_metrics(s, v) for s, v in enumerate(row)], seed=i)
        for i, row in enumerate(values)
    ]
    (line,), (band,), _, dy, dx = chart(made(*paths), "Accuracy of the student")
    mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(5)
    same(line, list(enumerate(mean)), dx, dy)
    same(band[:30], list(enumerate(mean + error)), dx, dy)
    same(band[30:][::-1], list(enumerate(mean - error)), dx, dy)
    assert "standard error over 5 runs" in made(*paths)


def test_the_band_of_one_run_is_the_error_that_it_recorded(tmp_path):
    metrics = [
        step_metrics(
            s,
            0.5,
            **(
                {
                    "eval_accuracy": 0.4 + s / 100,
                    "eval_accuracy_se": 0.03,
                    "eval_reflection_rate": 0.2,
                }
                if s % 5 == 4
                else {}
            ),
        )
        for s in range(20)
    ]
    (line,), (band,), _, dy, dx = chart(
        made(make_run(tmp_path / "r", metrics)), "Accuracy on validation problems"
    )
    same(line, [(s, 0.4 + s / 100) for s in (4, 9, 14, 19)], dx, dy)
    same(band[:4], [(s, 0.43 + s / 100) for s in (4, 9, 14, 19)], dx, dy)


def test_a_share_s_band_ends_at_0_and_100_percent():
    assert charts.band(Point(0, 0.98, 0.05), "%") == (pytest.approx(0.93), 1.0)
    assert charts.band(Point(0, 0.02, 0.05), "%") == (0.0, pytest.approx(0.07))
    assert charts.band(Point(0, 3.0, 4.0), "tokens") == (-1.0, 7.0)


def test_the_rollouts_that_nobody_helped_earn_what_is_left_of_the_mean():
    rewards, guided = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0, 3]
    metrics = {
        "reward": sum(rewards) / 8,
        "guided": 2,
        "guided_reward": 2.0,
        "guided_share_of_rollouts": 2 / 8,
    }
    assert report.unguided_reward(metrics) == pytest.approx(
        np.mean([r for i, r in enumerate(rewards) if i not in guided])
    )
    nobody = {"reward": 0.5, "guided": 0, "guided_reward": 0, "guided_share_of_rollouts": 0.0}
    assert report.unguided_reward(nobody) is None


def test_long_runs_are_drawn_as_means_over_bins_and_stay_under_one_megabyte(tmp_path):
    values = np.random.default_rng(1).random(10_000)
    metrics = [step_metrics(s, v, fraction=0.1 if s < 1500 else 0.0) for s, v in enumerate(values)]
    long = [
        transcript(
            s,
            s < 1500,
            student="word " * 9000,
            question="why " * 3000,
            guidance="x" * (s < 1500),
            guidance_tokens=[["日本<", 0.5, 0.01]] * 3000,
        )
        for s in (0, 700, 1400, 1500, 8000)
        for _ in range(3)
    ]
    long.append(transcript(9999, student="the very end"))
    runs = [
        Recorded(tmp_path, {"method": "thinktuning", "seed": i, "p_init": i}, metrics, long)
        for i in range(2)
    ]
    text = report.page(runs, [])
    size, left_out = len(text.encode()), Page(text).of("p")[-1]
    assert 800_000 < size < 1_000_000 and left_out.endswith(
        "would not fit on the page; transcripts.jsonl has them."
    )
    check_contained(text)
    every = 1 + 9_999 // 120
    polylines, _, _, dy, dx = chart(text, "Accuracy of the student")
    same(
        polylines[0],
        [(s + (every - 1) / 2, values[s : s + every].mean()) for s in range(0, 10_000, every)],
        dx,
        dy,
    )
    assert any(
        note.endswith(f"Each point is a mean over {every} steps.") for note in Page(text).of("p")
    )
    assert [int(s) for s in re.findall("<h3>ThinkTuning, p_init 0, step ([0-9]+): ", text)] == [
        0,
        1400,
        1500,
        9999,
    ]


def test_many_methods_are_drawn_with_fewer_points(tmp_path):
    metrics = [step_metrics(s, s / 130, fraction=0.1) for s in range(130)]
    runs = [
        Recorded(tmp_path, {"method": "thinktuning", "p_init": i}, metrics, [transcript(0, True)])
        for i in range(24)
    ]
    text = report.page(runs, [])
    size = len(text.encode())
    assert size < 1_000_000
    polylines, _, _, dy, dx = chart(text, "Accuracy of the student")
    every = 1 + 129 // len(polylines[0])
    assert len(polylines) == 24 and every > 2
    expected = [
        (s + (every - 1) / 2, np.arange(s, min(130, s + every)).mean() / 130)
        for s in range(0, 130, every)
    ]
    same(polylines[7], expected, dx, dy)


# What is said


def points(*values, error=0.0):
    return [Point(i, v, error) for i, v in enumerate(values)]


def test_titles_follow_the_data(two_runs, tmp_path):
    text = made(*two_runs)
    swapped = [
        make_run(
            tmp_path / "s" / p.name,
            [json.loads(line) for line in open(other / "metrics.jsonl")],
            method=json.loads((p / "config.json").read_text())["method"],
        )
        for p, other in zip(two_runs, two_runs[::-1])
    ]
    flipped = made(*swapped)
    title = chart(text, "Own samples that reflect")[2]
    assert title == "ThinkTuning rises from 7.5% to 100%; GRPO stays at 0%"
    title = chart(flipped, "Own samples that reflect")[2]
    assert title == "ThinkTuning stays at 0%; GRPO rises from 7.5% to 100%"
    assert "GRPO shows no clear change" in chart(text, "Accuracy of the student")[2]
    assert "ThinkTuning shows no clear change" in chart(flipped, "Accuracy of the student")[2]
    assert re.search("<h1>ThinkTuning gets 95% of its last samples right, GRPO 3", text)
    assert re.search("<h1>GRPO gets 95% of its last samples right, ThinkTuning 3", flipped)
    assert "ThinkTuning: the teacher leaves at step 6" in Page(text).of("h3")
    assert chart(text, "Its replies")[2] == "On average: in format 100%, opinion right 75%"
    earned = chart(text, "Reward of a rollout")[2]
    assert earned.startswith(
        "On average: with help 1, the same attempts alone 0.25, nobody helped 0."
    )


def test_a_trend_is_named_only_where_it_stands_out_from_the_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 80)
    assert trend(points(*np.linspace(0.2, 0.8, 80) + noise), "%").startswith("rises from 2")
    assert trend(points(*np.linspace(0.8, 0.2, 80) + noise), "%").startswith("falls from 7")
    named = [
        trend(points(*0.5 + rng.normal(0, 0.05, 80)), "%").startswith("shows no clear change")
        for _ in range(200)
    ]
    # Two standard errors of a difference of two means of 8; a peak may also be named.
    assert 0.75 < sum(named) / 200
    assert trend(points(0.4, 0.41, error=0.03), "%") == "shows no clear change (40% to 41%)"
    assert trend(points(0.4, 0.61, error=0.03), "%") == "rises from 40% to 61%"
    assert trend(points(0.5, 0.5, 0.5), "%") == "stays at 50%"
    peak = points(*[0.0] * 20, *[1.0] * 20, *[0.0] * 20)
    assert trend(peak, "%") == "moves between 0% and 100% and ends at 0%"
    dip = points(*[1.0] * 20, *[0.5] * 20, *[1.0] * 20)
    assert trend(dip, "") == "moves between 0.5 and 1 and ends at 1"
    assert trend(points(7.0), "tokens") == "is at 7"


def test_a_headline_of_many_methods_gives_their_range():
    scores = list(zip("abcdef", (0.1, 0.9, 0.3, 0.2, 0.15, 0.4)))
    best = "b gets 90% of held-out problems right"
    shown = report.best_and_others(scores[:4], "held-out problems")
    assert shown == best + ", c 30%, d 20%, a 10%"
    shown = report.best_and_others(scores, "held-out problems")
    assert shown == best + ", the others 10% to 40%"


def test_many_lines_are_told_by_the_highest_and_the_lowest():
    lines = [
        Line(name, "s0", points(0.1, end))
        for name, end in (("a", 0.2), ("b", 0.9), ("c", 0.05), ("d", 0.3))
    ]
    assert trends(lines, "%") == "b ends highest (90%), c lowest (5%)"


def test_numbers_are_shown_with_the_digits_that_they_need():
    assert [format_value(v, "%") for v in (0.0, 0.0003, 0.005, 0.334, 1.0)] == [
        "0%",
        "under 0.1%",
        "0.5%",
        "33.4%",
        "100%",
    ]
    assert [format_value(v, "") for v in (0.0, 0.12345, 73.288, 1234.5, math.nan)] == [
        "0",
        "0.123",
        "73.3",
        "1,234",
        "–",
    ]


@pytest.mark.parametrize(
    "low, high",
    [
        (0, 0),
        (0, 1),
        (0.3, 0.31),
        (5, 5),
        (-3, 2),
        (0, 1e-15),
        (0, 9.9e11),
        (-4, -4),
        (0.955, 1.0),
        (0.2, 0.2 + 3e-17),
    ],
)
def test_ticks_are_few_round_and_reach_around_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high * (1 - 1e-9) and 2 <= len(found) <= 8
    gaps = np.diff(found)
    assert np.allclose(gaps, gaps[0])
    assert f"{gaps[0]:.0e}"[0] in "1235"
    assert all(t == int(t) for t in ticks(0, max(1, int(high)), whole=True))


def test_variants_of_one_method_are_told_apart_by_what_differs(tmp_path):
    metrics = [step_metrics(s, 0.5) for s in range(3)]
    runs = [
        make_run(tmp_path / f"{rate}-{seed}", metrics, learning_rate=rate, seed=seed)
        for rate in (1e-4, 1e-3)
        for seed in (0, 1)
    ]
    groups = report.group_runs(
        read_runs([*runs, make_run(tmp_path / "g", metrics, method="grpo")])[0]
    )
    assert [(g.name, len(g.runs)) for g in groups] == [
        ("ThinkTuning, learning_rate 0.0001", 2),
        ("ThinkTuning, learning_rate 0.001", 2),
        ("GRPO", 1),
    ]
    assert len({g.style for g in groups}) == 3


def test_a_demonstration_shows_its_held_out_table_first(tmp_path):
    def summary(shift):
        return {
            "base": {
                "accuracy": 0.3 + shift,
                "accuracy_se": 0.021,
                "reflection_rate": 0.0,
                "wrong_to_right": 0,
            },
            "thinktuning": {"accuracy": 0.9 + shift, "accuracy_se": 0.01, "reflection_rate": 1.0},
            "seed": 0,
        }

    shifts = (0.0, 0.03, 0.06)
    for i, shift in enumerate(shifts):
        make_run(
            tmp_path / f"d{i}" / "thinktuning", [step_metrics(s, 0.5) for s in range(3)], seed=i
        )
        (tmp_path / f"d{i}" / "summary.json").write_text(json.dumps(summary(shift)))
    one = check_contained(made(tmp_path / "d0"))
    assert one.of("h1") == ["ThinkTuning gets 90% of held-out problems right, Base 30%"]
    assert "30% ± 2.1%" in one.of("td") and one.of("h2")[0] == "The outcome"
    (tmp_path / "d0" / "summary.json").write_text(
        json.dumps({**summary(0.0), "base": {"accuracy": math.nan}})
    )
    odd = check_contained(made(tmp_path / "d0"))  # what was not measured is not compared
    assert odd.of("h1") == ["ThinkTuning gets 90% of held-out problems right"] and "–" in odd.of(
        "td"
    )
    (tmp_path / "d0" / "summary.json").write_text(json.dumps(summary(0.0)))
    three = check_contained(made(*(tmp_path / f"d{i}" for i in range(3))))
    error = np.std(shifts, ddof=1) / math.sqrt(3)
    assert f"33% ± {100 * error:.1f}%" in three.of("td") and "over 3 demonstrations" in "".join(
        three.of("caption")
    )


def look(wrong, right, first=0.4, sampled=0.0):
    return {
        "accuracy": 0.5,
        "first_answer_accuracy": first,
        "reflection_rate_first_wrong": wrong,
        "reflection_rate_first_right": right,
        "sampled_reflection_rate": sampled,
    }


NEVER = look(0.0, 0.0)
SHARES = " reflects on {} of its wrong answers and on {} of its right ones"


@pytest.mark.parametrize(
    "ours, grpo, said",
    [
        (
            look(1.0, 0.0, sampled=0.58),
            NEVER,
            "ThinkTuning"
            + SHARES.format("100%", "0%")
            + "; GRPO reflects on none of its held-out answers",
        ),
        (
            look(0.987, 0.051),
            look(0.0, 0.0, sampled=0.002),
            "ThinkTuning"
            + SHARES.format("98.7%", "5.1%")
            + "; GRPO reflects on hardly any of its held-out answers",
        ),
        (
            NEVER,
            look(0.64, 0.01),
            "ThinkTuning reflects on none of its held-out answers; GRPO"
            + SHARES.format("64%", "1%"),
        ),
        (
            look(1.0, 1.0),
            NEVER,
            "ThinkTuning reflects on 100% of its answers, wrong and right alike"
            "; GRPO reflects on none of its held-out answers",
        ),
        (
            NEVER,
            NEVER,
            "ThinkTuning reflects on none of its held-out answers; GRPO reflects on none of its held-out answers",
        ),
        (NEVER, look(0.0, 0.0, sampled=0.3), "GRPO reflects on 0% of its answers, wrong and"),
        # No wrong answers, or nothing measured: then the accuracy is what can be said.
        (look(0.0, 1.0, first=1.0), NEVER, "gets 50% of held-out problems right"),
        (look(1.0, 0.0), {"accuracy": 0.4}, "gets 50% of held-out problems right"),
        (look(math.nan, 0.0), NEVER, "gets 50% of held-out problems right"),
        (look(1.0, "high"), NEVER, "gets 50% of held-out problems right"),
    ],
)
def test_the_headline_says_when_the_trained_methods_look_back(ours, grpo, said):
    base = {**look(0.9, 0.9), "accuracy": 0.3}  # the base model is no finding
    page = check_contained(report.page([], [{"base": base, "grpo": grpo, "thinktuning": ours}]))
    assert page.of("h1") == page.of("title") and said in page.of("h1")[0]


def test_the_headline_of_several_demonstrations_is_about_their_means():
    summaries = [{"thinktuning": look(wrong, 0.0), "grpo": NEVER} for wrong in (1.0, 0.9, 0.8)]
    (title,) = Page(report.page([], summaries)).of("h1")
    assert (
        title
        == "ThinkTuning"
        + SHARES.format("90%", "0%")
        + "; GRPO reflects on none of its held-out answers"
    )


def rows_of(text, caption):
    """The cells of each row of a table, by the row's head; {} if there is no such table."""
    found = re.search(f"<caption>{caption}.*?</table>", text, re.S)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', found[0] if found else "")
    return {head: re.findall("<td>(.*?)</td>", cells) for head, cells in rows}


def demonstration():
    """A summary of a demonstration with all its parts."""
    names = ("goes_on", "names_line", "takes_over", "accuracy")
    shares = {
        "misconception": (1.0, 0.98, 0.96, 0.94),
        "right": (0.0, None, None, 1.0),
        "slip_before": (0.9, 0.8, 0.7, 0.0),
        "other_story": (0.6, 0.5, 0.4, 0.3),
    }
    sampled = {
        "sampled_reflection_rate_first_wrong": 0.993,
        "sampled_reflection_rate_first_right": 0.005,
    }
    return {
        "base": {**NEVER, "floor": 0.0099, "names_line": None},
        "grpo": {**NEVER, "names_line": None},
        "thinktuning": {**look(1.0, 0.0), **sampled, "names_line": 0.97},
        "teacher_prompt": {"accuracy": 0.992, "accuracy_se": 0.004, "opinion_accuracy": 1.0},
        "planted": {
            kind: {**dict(zip(names, values)), "attempts": 150} for kind, values in shares.items()
        },
        "floor": 0.01,
        "quick": False,
    }


HELD_OUT, BASE, PLANTED = "Test problems", "The base model", "Planted attempts"


def test_a_demonstration_shows_its_planted_attempts_its_teacher_and_its_floor():
    text = report.page([], [demonstration()])
    check_contained(text)
    assert rows_of(text, PLANTED) == {
        "wrong by the misconception": ["150", "100%", "98%", "96%", "94%"],
        "right, to the same questions": ["150", "0%", "–", "–", "100%"],
        "another slip, then the misconception": ["150", "90%", "80%", "70%", "0%"],
        "another story’s wrong attempt": ["150", "60%", "50%", "40%", "30%"],
    }
    assert rows_of(text, BASE) == {
        "Right under the teacher prompt": ["99.2% ± 0.4%"],
        "Its opinion of an attempt is right": ["100%"],
        "Goes on after its own answer: the floor": ["1%"],
    }
    scores = rows_of(text, HELD_OUT)
    assert scores["Reflects, sampled, first answer wrong"] == ["–", "–", "99.3%"]
    assert scores["Reflects, sampled, first answer right"] == ["–", "–", "0.5%"]
    assert scores["… and names the line that is wrong"] == ["–", "–", "97%"]
    three = report.page([], [demonstration() for _ in range(3)])
    assert rows_of(three, PLANTED) == rows_of(text, PLANTED)


def test_what_a_summary_does_not_hold_is_not_on_the_page():
    older = {name: {"accuracy": 0.5} for name in ("base", "grpo", "thinktuning")}
    page = report.page([], [older])
    check_contained(page)
    assert list(rows_of(page, HELD_OUT)) == ["Accuracy, greedy"]
    assert rows_of(page, BASE) == rows_of(page, PLANTED) == {}
    assert "Planted attempts" not in page and "quick" not in page
    assert "These runs were quick ones" in report.page([], [{**older, "quick": True}])
    part = report.page([], [{**older, "planted": {"right": {"accuracy": 1.0}, "x": {}}}])
    assert rows_of(part, PLANTED) == {"right, to the same questions": ["–", "–", "–", "–", "100%"]}


# Odd runs


def test_runs_of_no_step_of_one_step_and_stopped_early(tmp_path):
    empty = check_contained(made(make_run(tmp_path / "empty", [])))
    assert empty.of("h1") == ["Nothing was measured"] and not [
        t for t, _ in empty.tags if t == "figure"
    ]
    one = made(
        make_run(tmp_path / "one", [step_metrics(0, 0.5, fraction=0.1)], [transcript(0, True)])
    )
    check_contained(one)
    assert chart(one, "Accuracy of the student")[2] == "ThinkTuning is at 50%"
    assert "the teacher stays to the end" in one
    stopped = make_run(tmp_path / "stopped", [step_metrics(s, 0.5) for s in range(7)], steps=80)
    assert "7 of 80: stopped early" in made(stopped)
    gone = make_run(tmp_path / "gone", [step_metrics(0, 0.5)])
    (gone / "transcripts.jsonl").unlink()
    check_contained(made(gone))


def test_values_that_are_no_numbers_leave_a_gap(tmp_path):
    odd = {3: None, 4: math.nan, 5: math.inf, 9: "high", 10: 10**400, 14: [1]}
    metrics = [step_metrics(s, odd.get(s, s / 40)) for s in range(20)]
    lines, _, _, dy, dx = chart(made(make_run(tmp_path / "r", metrics)), "Accuracy of the student")
    for line, steps in zip(
        lines, (range(3), range(6, 9), range(11, 14), range(15, 20)), strict=True
    ):
        same(line, [(s, s / 40) for s in steps], dx, dy)
    nothing = [{"step": s, "reward": None, "fraction": None, "behaviours": None} for s in range(3)]
    assert "<figure>" not in made(make_run(tmp_path / "n", nothing))


def test_a_seed_that_stopped_early_leaves_the_others_in_the_mean(tmp_path):
    runs = [
        make_run(
            tmp_path / f"r{i}",
            [step_metrics(s, 0.2 * (i + 1)) for s in range(4 - i)],
            steps=4,
            seed=i,
        )
        for i in range(2)
    ]
    found = series(read_runs(runs)[0], "sampled_accuracy")
    assert [p.mean for p in found] == pytest.approx([0.3, 0.3, 0.3, 0.2]) and found[3].error == 0


HOSTILE = (
    "</style></title><script>alert(1)</script>",
    "\"' onload='alert(1)' x=\"<img src=http://e.example/x.png>",
    "</svg>]]><!--",
    "\x00\x07\x1b[31m\x7f\x85\ufffe",
    "\ud800 lone \udfff",
    "\u202eright to left\u2066",
    "&lt;script&gt;",
    "javascript:alert(1)",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_comes_from(text, tmp_path):
    name = re.sub(r"[\x00/\ud800-\udfff]", "_", text)
    fields = ("question", "answer", "student", "opinion", "reason", "phrase", "guidance")
    line = {
        **transcript(0, True),
        **dict.fromkeys(fields, text),
        "guidance_tokens": [[text, 0.3, 0.1], [text, None, 0.1]],
    }
    metrics = [step_metrics(s, 0.5, fraction=0.1, behaviours={text: 1}) for s in range(3)]
    runs = [
        make_run(tmp_path / name, metrics, [line], **{"published": text, text: text}),
        make_run(tmp_path / "other", metrics, [line], method=text),
    ]
    page = made(*runs)
    check_contained(page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", page)
    shown = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    questions = Page(page).of("p")
    assert shown in questions  # unescaped by the parser, it is the very text


def test_texts_are_isolated_from_the_direction_of_others(two_runs):
    page = Page(made(*two_runs))
    assert all(a.get("dir") == "auto" for tag, a in page.tags if a.get("class") == "question")
    assert [t for t, _ in page.tags].count("article") >= 6


@pytest.mark.parametrize(
    "broken", ['{"step": 1', "[1]", "{}", '{"step": "1"}', '{"step": -1}', "[" * 9999]
)
def test_a_broken_line_is_named_with_file_and_number(broken, tmp_path, capsys):
    run = make_run(tmp_path / "run", [step_metrics(0, 0.5)])
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        keep = (run / name).read_text()
        (run / name).write_text('{"step": 0}\n' + broken + "\n")
        assert command("report", run) == 2
        err = capsys.readouterr().err
        assert f"{name}, line 2:" in err and err.count("\n") == 1 and "Traceback" not in err
        (run / name).write_text(keep)
    assert not (run / "report.html").exists()


def test_tokens_that_are_no_triples_are_named(tmp_path, capsys):
    run = make_run(
        tmp_path / "run",
        [step_metrics(7, 0.5)],
        [transcript(7, True, guidance_tokens=[["a", 1.0]])],
    )
    assert command("report", run) == 2
    assert "transcripts.jsonl, step 7: guidance_tokens" in capsys.readouterr().err


def test_whatever_the_fields_hold_there_is_a_page():
    rng = random.Random(0)
    values = (
        None,
        True,
        [],
        {},
        "x",
        "\ud800",
        -1,
        0,
        1e300,
        1e-300,
        math.nan,
        math.inf,
        10**400,
        [[1]],
        {"a": 1},
    )
    for _ in range(150):
        metrics = [
            step_metrics(s, 0.5, 0.2, 0.1 * (s < 3), eval_accuracy=0.4, eval_accuracy_se=0.1)
            for s in range(5)
        ]
        lines, config = (
            [transcript(s, s < 3) for s in range(5)],
            {"method": "grpo", "seed": 0, "steps": 5, "samples": 3},
        )
        summary = {
            **demonstration(),
            "base": {"accuracy": 0.3, "accuracy_se": 0.02, "reflection_rate": 0.1},
            "grpo": {"accuracy": 0.9},
        }
        for spoilt in (
            rng.choice(metrics),
            rng.choice(lines),
            config,
            rng.choice([summary, summary["base"], summary["thinktuning"], summary["planted"]]),
        ):
            spoilt[rng.choice([k for k in spoilt if k not in ("step", "guidance_tokens")])] = (
                rng.choice(values)
            )
        runs = [Recorded(Path("r"), config, metrics, lines)] * rng.choice((1, 2))
        check_contained(report.page(runs, rng.choice(([], [summary]))))


def test_a_page_that_cannot_be_written_is_refused_before_it_is_made(tmp_path, capsys):
    run = make_run(tmp_path / "run", [step_metrics(0, 0.5)])
    for out in (tmp_path, tmp_path / "nowhere" / "report.html"):
        assert command("report", run, "--out", out) == 2
        assert f"{out} cannot be written: name a file" in capsys.readouterr().err


def test_a_method_keeps_its_colour_on_a_page_without_the_other(tmp_path):
    paths = {
        method: make_run(tmp_path / method, [step_metrics(0, 0.5)], method=method)
        for method in ("grpo", "thinktuning")
    }
    styles = lambda *methods: {
        g.name: g.style for g in report.group_runs(read_runs([paths[m] for m in methods])[0])
    }
    both = styles("grpo", "thinktuning")
    assert both == {"ThinkTuning": "s0", "GRPO": "s1"}
    assert styles("grpo") | styles("thinktuning") == both


def test_a_directory_that_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "run", [step_metrics(0, 0.5)])
    for words, path in (
        ("no metrics.jsonl", tmp_path / "empty"),
        ("not a directory", tmp_path / "nowhere"),
    ):
        assert command("report", path) == 2
        assert words in (err := capsys.readouterr().err) and path.name in err
    unstepped = make_run(tmp_path / "unstepped", [])
    assert command("report", unstepped) == 2
    err = capsys.readouterr().err
    assert err == f"error: {unstepped}: no step has finished yet, so there is nothing to show\n"
    assert command("report", run, unstepped, "--out", tmp_path / "both.html") == 0
    capsys.readouterr()
    (run / "config.json").write_text("[]")
    assert command("report", run) == 2 and "config.json" in capsys.readouterr().err
    (run / "config.json").unlink()
    assert command("report", run) == 2 and "config.json" in capsys.readouterr().err


def test_where_the_page_goes(two_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("report", two_runs[0]) == 0 and "report.html" in capsys.readouterr().out
    assert (two_runs[0] / "report.html").read_text() == made(two_runs[0])
    assert command("report", *two_runs) == 0 and (tmp_path / "report.html").read_text() == made(
        *two_runs
    )
    assert command("report", *two_runs, "--out", "x.html") == 0 and (tmp_path / "x.html").exists()
    assert command("report", two_runs[0], "--out", "no/where.html") == 2
    assert "no/where.html" in capsys.readouterr().err
    again = made(*two_runs, two_runs[0], tmp_path)
    assert again == made(*two_runs)  # a run given twice counts once


def test_every_training_run_writes_its_report(tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = Tokenizer.builtin()
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 2, 1, 16, 64, max_seq_len=256)
    LM(config).save(tmp_path / "model", tokenizer)
    flags = "--steps 2 --questions 2 --samples 2 --max-tokens 8 --teacher-reply 30"
    flags += " --data wordproblems --eval-data wordproblems --eval-count 4"
    places = ["--model", tmp_path / "model", "--out", tmp_path / "run"]
    assert command("train", *places, *flags.split()) == 0
    page = check_contained((tmp_path / "run" / "report.html").read_text())
    assert page.of("h1") == ["After 2 steps: ThinkTuning gets 0% of held-out problems right"]


# Transcripts


def guided_rollout(
    advantage,
    reason="Wait, that does not fit.",
    phrase="So the answer is \\boxed{7}.",
    max_tokens=200,
):
    tokenizer = Tokenizer.builtin()
    response = tokenizer.encode("The answer is \\boxed{8}.") + [next(iter(tokenizer.stop))]
    r = Rollout(
        [1, 2],
        response,
        True,
        question="q",
        answer="7",
        text="The answer is \\boxed{8}.",
        advantage=advantage,
    )
    assert augment(r, Feedback("incorrect", reason, phrase), tokenizer, max_tokens)
    generator = torch.Generator().manual_seed(0)
    r.old_logprobs = (-9 * torch.rand(len(r.response), generator=generator)).tolist()
    return r, tokenizer


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"published": "gamma"}, {"guards": False}, {"gamma_min": 0.05, "gamma_max": -0.02}],
)
def test_the_weight_of_a_token_is_its_share_of_the_loss_s_gradient(advantage, options):
    settings = loss_settings(Config(**options))
    r, tokenizer = guided_rollout(advantage)
    found = guidance_tokens(r, tokenizer, settings)
    logprobs = torch.tensor([r.old_logprobs], dtype=torch.float64, requires_grad=True)
    guided = torch.arange(len(r.response))[None] >= r.guided_from
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    loss, _ = policy_loss(
        logprobs,
        logprobs.detach(),
        advantages,
        torch.ones_like(guided),
        guided,
        **asdict(settings),
    )
    loss.backward()
    weights = (-logprobs.grad[0] * len(r.response) / advantage)[r.guided_from :]
    unlikely = 0
    for (_, w, pi), expected, logprob in zip(
        found, weights.tolist(), r.old_logprobs[r.guided_from :], strict=True
    ):
        assert pi == pytest.approx(math.exp(logprob), abs=5.1e-5)
        if advantage < 0 and math.exp(logprob) < settings.unlikely:  # guard (c): an ordinary token
            unlikely += 1
            assert w is None and expected == pytest.approx(1.0)
        else:
            assert w == pytest.approx(expected, abs=1e-4, rel=1e-4)
    assert unlikely > 3 or advantage > 0


def test_transcripts_show_what_teaches_and_different_questions():
    tokenizer = guided_rollout(1.0)[1]
    rollouts = []
    for q, advantages in (("a", (0.0,) * 4), ("b", (2.0, -0.7, -0.7, -0.7)), ("c", (0.5,) * 4)):
        for advantage in advantages:
            rollouts.append(Rollout([1], [2, 3], True, question=q, advantage=advantage))
    rollouts[1].feedback = Feedback("correct", "r", "p")
    rollouts[9].feedback = Feedback("correct", "r", "p")
    shown = transcripts(rollouts, tokenizer, 0, LossSettings())
    assert [(t["question"], t["advantage"]) for t in shown] == [("c", 0.5), ("a", 0.0), ("b", 2.0)]
    shown = transcripts(rollouts[4:8], tokenizer, 0, LossSettings(), most=5)
    assert [t["advantage"] for t in shown] == [2.0, -0.7, -0.7, -0.7]


def test_other_shapings_have_no_weight_and_unguided_rollouts_no_tokens():
    r, tokenizer = guided_rollout(1.0)
    assert all(
        w is None for _, w, _ in guidance_tokens(r, tokenizer, LossSettings(shaping="ratio"))
    )
    unguided = Rollout([1], [2, 3], True, old_logprobs=[0.0, 0.0])
    assert guidance_tokens(unguided, tokenizer, LossSettings()) == []


@pytest.mark.parametrize("phrase", ["día 7 → 3 日本 🙂 \\boxed{7}", "ends 🙂"])
def test_characters_spelt_by_several_tokens_stay_whole(phrase):
    r, tokenizer = guided_rollout(1.0, phrase=phrase)
    half = tokenizer.encode("🙂")[:2] if phrase.startswith("ends") else []
    r.response = r.response[:-1] + half
    r.old_logprobs = [0.0] * len(r.response)
    found = guidance_tokens(r, tokenizer, LossSettings())
    assert len(found) == len(r.response) - r.guided_from
    assert "".join(text for text, *_ in found) == tokenizer.decode(r.response[r.guided_from :])
    assert "🙂" in [text.strip() for text, *_ in found] and "" in [text for text, *_ in found]


def test_transcripts_keep_the_teacher_s_parts_apart_and_the_page_colours_them():
    r, tokenizer = guided_rollout(1.5)
    r.reward = 1.0
    other = Rollout(
        [1, 2],
        r.response[: r.guided_from],
        True,
        question="q",
        answer="8",
        old_logprobs=[0.0] * r.guided_from,
    )
    feedback = Feedback("incorrect", "Wait, that does not fit.", "So the answer is \\boxed{7}.")
    r.asked, r.feedback, r.attempt = True, feedback, "The answer is \\boxed{8}."
    first, second = transcripts([other, r], tokenizer, 3, LossSettings())  # guided ones come first
    assert (first["reason"], first["phrase"], first["attempt_right"]) == (*feedback[1:], False)
    assert (second["reason"], second["guidance_tokens"], second["attempt_right"]) == (
        None,
        [],
        True,
    )
    assert json.loads(json.dumps(first)) == first
    shown = article(first)
    for name, words in (("reason", feedback.reason), ("phrase", feedback.phrase)):
        block = re.search(f'<div class="part {name}">.*?</div>', shown, re.S)[0]
        assert re.sub("<[^>]*>|↵|&lt;.end.&gt;", "", block.partition("</p>")[2]) == words
    weights = [w for _, w, _ in first["guidance_tokens"]]
    shades = [int(n) for n in re.findall(r'<span class="w(\d)"', shown)]
    assert shades == np.digitize(weights, SHADES).tolist()
    facts = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", shown)
    assert facts == [
        ("Right answer", "7"),
        ("The student alone", "wrong"),
        ("Reward", "1"),
        ("Advantage", "+1.50"),
    ]
    assert '<p dir="auto">incorrect</p>' in shown


def test_telling_steps_are_the_first_the_last_guided_the_next_and_the_last():
    lines = [transcript(s, guided=s in (0, 1, 5)) for s in range(12)]
    assert list(telling_steps(lines)) == [0, 5, 6, 11]
    assert list(telling_steps(lines[:1])) == [0] and telling_steps([]) == {}
    assert list(telling_steps(lines[6:])) == [6, 11]


def marked_lines(**fields):
    return re.findall("<mark>(.*?)</mark>", article(transcript(0, **fields)))


def test_the_attempt_s_line_that_the_reflection_names_is_marked():
    looked = 0
    for story in stories("test", 40):
        attempt = worked_out(story, mistaken=True)
        if story.trap is None:
            continue
        weekday, wrong = DAYS[story.trap], wrong_line(story)
        named = f"Hmm, I was too quick there: look at {weekday}."
        about = dict(question=question(story), student=attempt)
        given = dict(guided=True, reason=named, guidance=named, guidance_tokens=[])
        assert marked_lines(**about, **given) == [wrong]  # the teacher's reflection
        own = {**about, "student": f"{attempt}\n\n{named}\n\n{worked_out(story)}"}
        assert marked_lines(**own) == [wrong]  # the student's own; its new lines have no mark
        assert marked_lines(**{**own, "student": own["student"].replace("look at", "not")}) == []
        assert marked_lines(**about, guided=False, reason=named) == []  # words that did not fit
        assert marked_lines(**about, **{**given, "reason": "Wait. Look at Sunday."}) == []
        looked += 1
    assert looked > 10


def wrong_line(story):
    return line_of_story(story, story.trap, counts(story, mistaken=True)[story.trap], True)


def test_the_page_says_what_the_mark_means_if_there_is_one(tmp_path):
    text = "Tuesday, a friend: 4 + 4 = 8. So the answer is \\boxed{8}.\n\nWait: look at Tuesday."
    asked = "Mia has 4 cups. On Tuesday a friend buys 4. How many cups does Mia have now?"
    metrics = [step_metrics(0, 0.5)]
    about = dict(question=asked, student=text)
    page = made(make_run(tmp_path / "r", metrics, [transcript(0, **about)]))
    marks = check_contained(page).of("mark")
    assert marks == ["the line that the reflection names", "Tuesday, a friend: 4 + 4 = 8."]
    other = {**about, "question": "A shop sells 4 cups on Tuesday. How many does Mia have now?"}
    plain = made(make_run(tmp_path / "s", metrics, [transcript(0, **other)]))
    assert "<mark>" not in plain and text in Page(plain).of("p")  # other data: as they are
    assert marked_lines(**{**about, "student": text + "x" * LONGEST_TEXT}) == []


@pytest.mark.parametrize("text", HOSTILE)
def test_a_marked_line_and_what_stands_around_it_stay_text(text):
    clean = re.sub(r"[:.]", "", text)
    attempt = f"{text} Monday {clean}: 1 + 1 = 2. {text}"
    asked = f"Mia has 1 cups. {text} How many cups does Mia have now?"
    student = f"{attempt}\n\nlook at Monday {text}"
    shown = article(transcript(0, question=asked, student=student))
    page = Page(shown)
    assert page.of("mark") == [charts.UNFIT.sub("\ufffd", f"Monday {clean}: 1 + 1 = 2.")]
    assert {tag for tag, _ in page.tags} == {"article", "p", "dl", "div", "dt", "dd", "mark"}


# How it looks


def luminance(colour):
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels))


def contrast(a, b):
    """WCAG 2.2's contrast ratio."""
    a, b = sorted((luminance(a), luminance(b)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast_is_that_of_wcag_aa_in_both_colour_schemes(scheme):
    css = (HERE / "show" / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    assert ".phrase { --hue: var(--c0); }" in css and ".reason { --hue: var(--c2); }" in css
    colours = {
        name: tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for name, code in re.findall(r"--([\w]+): #(\w{6})", blocks[scheme])
    }
    assert {"paper", "card", "ink", "soft", "c0", "c2", "c5"} <= colours.keys()
    for ground in ("paper", "card"):
        for name in colours.keys() - {"paper", "card", "rule", "edge", "mark"}:
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        assert contrast(colours["edge"], colours[ground]) >= 3  # axes
    mark = re.search(r"\nmark \{(.*?)\}", css, re.S)[
        1
    ]  # it has an underline for who sees no colour
    assert "background: var(--mark); color: var(--ink)" in mark and "underline" in mark
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    for share in map(int, re.findall(r"var\(--hue\) (\d+)%", css)):
        for name in ("c2", "c0"):
            shade = tuple(
                share / 100 * h + (1 - share / 100) * g
                for h, g in zip(colours[name], colours["card"])
            )
            assert contrast(colours["ink"], shade) >= 4.5, (name, share)


@pytest.fixture
def browser(tmp_path):
    """visit(page) -> (its widths at 1280 and 390 px, requests, console lines), in Chromium."""
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not chromium:
        pytest.skip("no Chromium here")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def visit(text):
        (tmp_path / "page.html").write_text(text)
        frames = "".join(
            f'<iframe src="page.html" width="{w}" height="800" style="border:0"></iframe>'
            for w in (1280, 390)
        )
        (tmp_path / "frames.html").write_text(f"""<link rel="icon" href="data:,">{frames}<script>
            onload = () => document.title = [...document.querySelectorAll("iframe")].map(f => {{
                f.contentDocument.querySelectorAll("details").forEach(d => d.open = true)
                return f.contentDocument.documentElement.scrollWidth
            }}).join(" ")</script>""")
        flags = (
            "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-sync"
        )
        flags += " --disable-background-networking --disable-component-update"
        flags += " --enable-logging=stderr --window-size=1800,1000 --dump-dom"
        # A directory for each visit: the cache of the last one might give its page again.
        profile = f"--user-data-dir={tempfile.mkdtemp(dir=tmp_path)}"
        address = f"http://127.0.0.1:{server.server_port}/frames.html"
        words = [chromium, *flags.split(), profile, address]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        widths = re.search(r"<title>([\d ]+)</title>", done.stdout)
        assert widths, done.stderr[-2000:]
        seen, requests[:] = set(requests), []
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return [int(w) for w in widths[1].split()], seen, console

    yield visit
    server.shutdown()
    server.server_close()


def test_a_browser_finds_no_error_no_request_and_nothing_too_wide(browser, two_runs, tmp_path):
    lines = [
        {**transcript(0, True), "student": "x" * 900, "guidance_tokens": [["y" * 900, 0.5, 0.1]]}
    ]
    metrics = [step_metrics(s, 0.5, fraction=0.1) for s in range(9)]
    wide = [
        make_run(tmp_path / (letter * 200), metrics, lines, published=letter * 300)
        for letter in "zq"
    ]
    widths, requests, console = browser(made(*two_runs, *wide))
    assert widths == [1280, 390] and requests == {"/frames.html", "/page.html"} and console == []
    bad = '<p style="width: 2000px">wide<img src="picture.png">'  # these three are noticed
    bad += '<script>console.error("heard")</script>'
    widths, requests, console = browser(bad)
    assert min(widths) > 1280 and "/picture.png" in requests
    assert any("heard" in line for line in console)
