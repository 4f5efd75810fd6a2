"""The README's picture and its numbers, held against the results files."""

import json
import re
import statistics

import pytest

from show import figure

CURVES = figure.curves("demonstration")


def summary(seed: int) -> dict:
    return json.loads((figure.ROOT / "results" / f"demo-seed{seed}.json").read_text())


@pytest.fixture(params=figure.FIGURES)
def name(request):
    return request.param


def test_every_point_of_the_picture_is_a_number_of_the_results_file(name):
    picture, curves = figure.picture(name).read_text(), figure.curves(name)
    for key, (_, style, *_) in figure.CURVE.items():
        points = re.search(rf'<polyline class="line {style}" points="([^"]*)"', picture)[1].split()
        assert len(points) == len(curves[key])
        for point, share in zip(points, curves[key], strict=True):
            height = figure.BOTTOM - float(point.split(",")[1])
            # Coordinates have one decimal, so a share is drawn to within 0.05 of the plot's height.
            assert height / (figure.BOTTOM - figure.TOP) == pytest.approx(share, abs=0.0003)


def test_the_words_of_the_picture_are_those_of_the_results_file(name):
    picture, curves = figure.picture(name).read_text(), figure.curves(name)
    leaves = next(step for step, p in enumerate(curves["fraction"]) if p == 0)
    assert f">the teacher leaves at step {leaves}<" in picture
    for key, (label, *_) in figure.CURVE.items():
        assert f">{label}: {round(100 * curves[key][-1])}%</text>" in picture


def test_a_title_that_the_curves_do_not_show_is_refused():
    swapped = CURVES | {"right": CURVES["wrong"], "wrong": CURVES["right"]}
    with pytest.raises(ValueError, match="does not show what the title says"):
        figure.draw("demonstration", swapped)


def test_curves_are_read_from_the_metrics_of_both_runs(tmp_path):
    for method, rates in (("grpo", (0.0, 0.25)), ("thinktuning", (0.5, 1.0))):
        (tmp_path / method).mkdir()
        lines = []
        for i, rate in enumerate(rates):
            split = {"reflection_rate_first_wrong": rate / 2, "reflection_rate_first_right": 0.125}
            fraction = 0.1 - 0.1 * i
            lines.append({"step": i, "reflection_rate": rate, "fraction": fraction, **split})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / method / "metrics.jsonl").write_text(text)
    curves = figure.curves_of(tmp_path)
    assert curves == {
        "grpo": [0.0, 0.25],
        "wrong": [0.25, 0.5],
        "right": [0.125, 0.125],
        "fraction": [0.1, 0.0],
    }


def test_the_readme_shows_the_picture_and_tells_it_in_words():
    readme = " ".join((figure.ROOT / "README.md").read_text().split())
    assert f"![{figure.description(CURVES)}](docs/figures/demonstration.svg)" in readme


def test_the_readmes_result_is_that_of_fifteen_seeds():
    readme = (figure.ROOT / "README.md").read_text()
    runs = [summary(seed) for seed in range(15)]
    for title, key in (
        ("accuracy", "accuracy"),
        ("accuracy of the first answer", "first_answer_accuracy"),
        ("reflects after a wrong first answer", "reflection_rate_first_wrong"),
        ("reflects after a right one", "reflection_rate_first_right"),
    ):
        cells = []
        for name in ("base", "grpo", "thinktuning"):
            values = [run[name][key] for run in runs]
            cells.append(f"{sum(values) / 15:.3f} ({min(values):.3f}–{max(values):.3f})")
        assert f"| {title} | {' | '.join(cells)} |" in readme


def span(values) -> str:
    low, high = round(100 * min(values)), round(100 * max(values))
    return f"{low}%" if low == high else f"{low} to {high}%"


def test_the_readmes_lines_on_planted_attempts_are_those_of_fifteen_seeds():
    readme = " ".join((figure.ROOT / "README.md").read_text().split())
    runs = [summary(seed) for seed in range(15)]
    planted = {kind: [run["planted"][kind] for run in runs] for kind in runs[0]["planted"]}
    # Shares of all attempts of a kind, not of those after which it reflects.
    alone = [1 - found["goes_on"] for found in planted["right"]]
    named = [found["goes_on"] * found["names_line"] for found in planted["other_story"]]
    taken = [found["goes_on"] * found["takes_over"] for found in planted["slip_before"]]
    ends_right = [found["accuracy"] for found in planted["slip_before"]]
    for words, shares in (
        ("it is left alone", alone),
        ("it names that wrong line", named),
        ("it goes on from the attempt's number", taken),
        ("after such a slip the answer is right in the end", ends_right),
    ):
        cell = f"{statistics.median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})"
        assert f"{words} | {cell} |" in readme
    teacher = span([run["teacher_prompt"]["accuracy"] for run in runs])
    (no_narrator,) = json.loads((figure.ROOT / "results/ablate-narrator-seed0.json").read_text())[
        "no narrator"
    ]
    assert f"accuracy {no_narrator['accuracy']:.3f}, no reflection" in readme
    assert no_narrator["reflection_rate"] == 0
    assert f"solves {teacher} of these problems" in readme
