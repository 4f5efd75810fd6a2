"""Each picture of the pages: drawn by today's program, its numbers right, its words readable."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest
import torch

from grpo import shaped_ratio
from show import diagrams, figure, plan
from show.svg import LEFT, RIGHT, Axis, balanced

SVG = "{http://www.w3.org/2000/svg}"
PAGES = {"advantages": "grpo.md", "clip": "grpo.md", "aas": "off-policy.md", "memory": "memory.md"}


@pytest.fixture(params=figure.PICTURES)
def name(request):
    return request.param


def drawn(name):
    """The root of a picture as it is drawn today."""
    return ElementTree.fromstring(figure.PICTURES[name]().svg())


def words(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def test_the_committed_picture_is_what_the_program_draws_today(name):
    assert figure.picture(name).read_text() == figure.PICTURES[name]().svg(), (
        "run python -m show.figure"
    )


def test_no_picture_is_left_that_nobody_draws():
    files = {file.stem for file in figure.picture("x").parent.iterdir()}
    assert files == set(figure.PICTURES) == {*figure.FIGURES, *PAGES}


def test_a_picture_is_told_in_words(name):
    root, picture = drawn(name), figure.PICTURES[name]()
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title told"
    told = [root.find(f"{SVG}{tag}").text for tag in ("title", "desc")]
    assert told == [picture.title, picture.description] and all(told)
    assert [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == ["title", "told"]
    if name in PAGES:
        page = (figure.ROOT / "docs" / PAGES[name]).read_text()
        image = f"![{picture.description}](figures/{name}.svg)"
        assert image in " ".join(page.split())


# ------------------------------------------------------------------ whether it can be read

# em in a wide font (DejaVu Sans); 0.64 for all others. Chromium's widths are at most these.
WIDTHS = {"ijl'|,.:;! ()frt": 0.41, "mwMW%…": 0.98, "+−=<>≤≥": 0.84}


def boxes(root):
    """(words, left, top, right, bottom) of each text, in pixels of the picture."""
    (group,) = root.iter(f"{SVG}g")
    shift = float(group.get("transform").split(",")[1][:-1])
    inside = set(group.iter(f"{SVG}text"))
    for text in root.iter(f"{SVG}text"):
        style = text.get("class").split()
        size = 18 if "title" in style else 14 if {"label", "small"} & set(style) else 15
        bold = 1.1 if {"title", "label"} & set(style) else 1.0
        ems = [next((w for some, w in WIDTHS.items() if c in some), 0.64) for c in text.text]
        width = size * sum(ems) * bold
        x = (
            float(text.get("x"))
            - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
        )
        y = float(text.get("y")) + (shift if text in inside else 0)
        yield text.text, x, y - 0.75 * size, x + width, y + 0.2 * size


def test_words_stay_inside_and_apart(name):
    root = drawn(name)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert float(root.get("width")) / float(root.get("height")) == pytest.approx(
        width / height, abs=0.01
    )
    found = list(boxes(root))
    assert len(found) > 8
    for words, left, top, right, bottom in found:
        assert left >= 0 and right <= width and top >= 0 and bottom <= height, words
    for (one, l1, t1, r1, b1), (other, l2, t2, r2, b2) in combinations(found, 2):
        assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1, f"{one!r} overlaps {other!r}"


def test_lines_of_a_title_are_about_equally_long():
    assert balanced("one two three four five", 20) == ["one two three", "four five"]
    assert balanced("a short one", 20) == ["a short one"]


def test_a_log_axis_has_equal_distances_for_equal_factors():
    axis = Axis(1e-4, 1, 0, 100, log=True)
    assert [axis(10**power) for power in (-4, -3, -2, -1, 0)] == [0, 25, 50, 75, 100]
    assert Axis(0, 4, 100, 20)(1) == 80


# ------------------------------------------------------------------ whether its numbers are right


def polylines(root, axis_x, axis_y):
    """(style, [(x, y)]) of each line, in numbers of its axes."""
    for line in root.iter(f"{SVG}polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        yield line.get("class"), [(value(axis_x, x), value(axis_y, y)) for x, y in points]


def value(axis, at):
    share = (at - axis.start) / (axis.end - axis.start)
    if axis.log:
        return axis.low * (axis.high / axis.low) ** share
    return axis.low + share * (axis.high - axis.low)


def test_advantages_are_z_scores():
    mean = sum(diagrams.REWARDS) / 8
    std = math.sqrt(sum((r - mean) ** 2 for r in diagrams.REWARDS) / 7)
    expected = [(r - mean) / (std + 1e-6) for r in diagrams.REWARDS]
    root = drawn("advantages")
    shown = [w for w in words(root) if re.fullmatch(r"−?\d\.\d\d", w)]
    assert shown == [f"{a:.2f}".replace("-", "−") for a in expected]
    assert f"mean r = {mean}" in words(root)
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("class").startswith("bar")]
    for i, (reward, advantage) in enumerate(zip(diagrams.REWARDS, expected)):
        of_reward, of_advantage = bars[2 * i : 2 * i + 2]
        assert float(of_reward.get("height")) == pytest.approx(60 * reward, abs=0.1)
        assert float(of_advantage.get("height")) == pytest.approx(35 * abs(advantage), abs=0.1)
        goes_up = float(of_advantage.get("y")) < 245  # where Â is 0
        assert goes_up == (advantage > 0)


def test_the_clip_s_lines_are_its_formula_and_dotted_where_they_are_flat():
    def loss(rho, a):
        found = max(-a * rho, -a * min(max(rho, 0.8), 1.2))
        return min(found, -a * 3) if a < 0 else found

    lines = list(polylines(drawn("clip"), Axis(0, 4, LEFT, RIGHT), Axis(-2, 4, 296, 26)))
    for advantage, colour, kinks in ((1, "blue", [1.2]), (-1, "orange", [0.8, 3])):
        own = [(style, points) for style, points in lines if colour in style]
        ends = [points[-1][0] for _, points in own]
        assert ends == pytest.approx([*kinks, 4], abs=0.001) and own[0][1][0][0] == 0
        for style, points in own:
            for rho, shown in points:
                assert shown == pytest.approx(loss(rho, advantage), abs=0.003)
            (first, *_), (last, *_) = points[0], points[-1]
            slope = loss(last, advantage) - loss(first, advantage)
            assert ("dots" in style) == (abs(slope) < 0.01)
    assert {"0.8", "1.2", "3"} <= set(words(drawn("clip")))


def w(pi, a):
    """π/(π + γ) with guards (a) and (b), in Python's own floats."""
    gamma = 0.001 - 0.002 * (4 - a) / 8
    if pi + gamma <= 0:
        return 1 / 1.0001
    return 1 / 0.9999 if pi + gamma > 1 else pi / (pi + gamma)


def test_the_weights_lines_are_the_formula_with_its_guards():
    x = Axis(1e-5, 1, LEFT, RIGHT, log=True)
    good, bad = Axis(0, 1, 136, 26), Axis(-2, 4, 390, 198)
    lines = [*polylines(drawn("aas"), x, good)][:2] + [*polylines(drawn("aas"), x, bad)][2:]
    assert len(lines) == 2 + 2 * 4
    for i, (style, points) in enumerate(lines):
        advantage = (4, 2, -4, -4, -4, -4, -2, -2, -2, -2)[i]
        pis = [10 ** (round(60 * math.log10(pi)) / 60) for pi, _ in points]  # as they were drawn
        for pi, (_, shown) in zip(pis, points):
            gamma = 0.001 * advantage / 4
            expected = pi / (pi + gamma) if "thin" in style else w(pi, advantage)
            assert shown == pytest.approx(expected, abs=0.003)
        if advantage < 0 and "dashes" in style:
            assert max(pis) < 0.0101  # set aside by guard (c)
        if advantage < 0 and style in ("line orange", "line green"):
            assert min(pis) == pytest.approx(0.01) and max(pis) == 1
        if advantage > 0:
            assert (min(pis), max(pis)) == pytest.approx((1e-5, 1))
    shaded = [r for r in drawn("aas").iter(f"{SVG}rect") if r.get("class") == "help"]
    assert float(shaded[0].get("width")) == pytest.approx((RIGHT - LEFT) * 3 / 5, abs=0.1)


def test_the_weights_labels_are_numbers_of_the_formula():
    shown = words(drawn("aas"))
    assert f"{w(0.01, -4):.2f} for Â = −4" in shown and f"{w(0.01, -2):.2f} for Â = −2" in shown
    assert "w = 1/1.0001" in shown and diagrams.weight(1e-4, -4.0) == pytest.approx(1 / 1.0001)
    assert "w = 1/0.9999" in shown and diagrams.weight(1.0, 4.0) == pytest.approx(1 / 0.9999)
    assert all(abs(w(pi, a) - 1) < 0.12 for pi in (0.01, 0.1, 1) for a in (-4, -2, 2, 4))
    for pi in (1e-4, 0.003, 0.5):  # w is the weight of the gradient, as the caption says
        for a in (-4.0, -2.0, 2.0, 4.0):
            logp = torch.tensor([[math.log(pi)]], dtype=torch.float64, requires_grad=True)
            shaped_ratio(logp, torch.tensor([[a]], dtype=torch.float64)).sum().backward()
            assert logp.grad.item() == pytest.approx(w(pi, a))


def test_the_bars_of_memory_are_the_plan_s_bytes():
    gib, n = 2**30, 3_212_749_824
    root = drawn("memory")
    shown = words(root)
    keys = (
        f"weights {2 * n / gib:.1f}",
        f"optimizer {12 * n / gib:.1f}",
        f"teacher {2 * n / gib:.1f}",
    )
    assert set(keys) <= set(shown)
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("class").startswith("bar")][4:]
    page = (figure.ROOT / "docs" / "memory.md").read_text()
    cells = dict(re.findall(r"^\| ([\w* ]+) \| (.*) \|$", page, re.M))
    peaks = cells["**at the peak**"].replace("*", "").split(" | ")
    assert [word[:-4] for word in shown if word.endswith(" GiB")][-3:] == peaks
    sums = [word for word in shown if re.fullmatch(r"\d+\.\d( GiB)?", word)]
    for run, config in enumerate(diagrams.RUNS.values()):
        parts = plan.memory(config, diagrams.SIZES)
        for i, phase in enumerate(("sampling", "asking the teacher", "update")):
            place = 3 * run + i
            sizes = [parts[key] / gib for key in ("weights", "optimizer", "teacher", phase)]
            own = bars[4 * place : 4 * place + 4]
            for bar, size in zip(own, sizes):  # 230 pixels are 160 GiB; a pixel is left free
                assert float(bar.get("width")) == pytest.approx(230 * size / 160 - 1, abs=0.16)
            assert float(sums[place].split()[0]) == pytest.approx(sum(sizes), abs=0.051)
            assert cells[phase].split(" | ")[run] == f"{sizes[-1]:.1f}"
