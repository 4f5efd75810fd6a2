"""The pages of the course: their lines of Python, and their numbers, against results/."""

import doctest
import json
import statistics
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SEEDS = range(15)


def result(name):
    return json.loads((DOCS.parent / "results" / f"{name}.json").read_text())


def words(page):
    return " ".join((DOCS / page).read_text(encoding="utf-8").split())


def missing(page, *sentences):
    return [sentence for sentence in sentences if sentence not in words(page)]


def test_the_lines_of_python_give_what_the_page_says():
    found = doctest.testfile(str(DOCS / "misconceptions.md"), module_relative=False)
    assert found.attempted >= 15 and found.failed == 0


def test_there_are_ten_misconceptions():
    text = (DOCS / "misconceptions.md").read_text(encoding="utf-8")
    assert [line.split()[1] for line in text.splitlines() if line.startswith("## ")] == [
        str(n) for n in range(1, 11)
    ]


def mean(runs, key="accuracy"):
    return statistics.fmean(run[key] for run in runs)


def with_error(runs):
    values = [run["accuracy"] for run in runs]
    return f"{mean(runs):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def test_numbers_of_the_misconceptions():
    demo, runs = result("demo-seed0"), result("ablate-all")
    teacher = demo["teacher_prompt"]["accuracy"]
    longer = [result(f"ablate-long-seed{n}") for n in range(10)]
    four_times = [runs["GRPO, four times the steps"][0] for runs in longer]
    gains = [
        round(100 * (four["accuracy"] - demos["base"]["accuracy"]))
        for four, demos in zip(four_times, (result(f"demo-seed{n}") for n in range(10)))
    ]
    assert {four["reflection_rate"] for four in four_times} == {0.0}
    assert sorted(gains)[-3:] == [2, gains[6], gains[2]]
    bases = [result(f"demo-seed{n}")["base"] for n in SEEDS]
    samples = sum(base["sampled_rollouts"] for base in bases)
    reflecting = sum(b["sampled_reflection_rate"] * b["sampled_rollouts"] for b in bases)
    fast = max(run["accuracy"] for run in result("ablate-rates")["grpo, 0.001"])
    planted = [result(f"demo-seed{n}")["planted"] for n in SEEDS]
    ends = {kind: f"{mean([seed[kind] for seed in planted]):.1%}" for kind in planted[0]}
    metrics = result("metrics-seed0")
    equal = metrics["grpo"]["groups_equal"].count(1.0)
    held = [share for share in metrics["thinktuning"]["clip_fraction"] if share]
    assert not missing(
        "misconceptions.md",
        f"Alone that model is right in {demo['base']['accuracy']:.3f} of the problems",
        f"Under the teacher prompt it is right in {teacher:.3f}",
        f"the student ends at {demo['thinktuning']['accuracy']:.3f}",
        f"is wrong in {round(500 * (1 - teacher))} of 500 replies",
        f"ends at {result('try-this')['1 help everybody']['thinktuning']['accuracy']:.3f}.",
        f"With AAS the accuracy is {with_error(runs['ThinkTuning'])}",
        f"the ordinary ratio {with_error(runs['no AAS: ordinary ratio'])}",
        f"a constant γ {with_error(runs['γ constant, as published'])}",
        f"In seeds 2 and 6 it gains {gains[2]} and {gains[6]} points",
        f"one of two runs reaches {fast:.3f} in this way in 60 steps",
        f"the misconception {ends['misconception']} of the answers end right",
        f"a slip in an earlier line as well, {ends['slip_before']} do",
        f"wrong attempt leaves only {ends['other_story']} right",
        f"wrote {samples:,} samples, of which {round(reflecting)} reflect",
        f"`groups_equal` is 1.0 in {equal} of 60 steps",
        f"the clip holds tokens in {len(held)} of the 60 steps",
        f"at most {max(held):.1%} of a step's tokens",
    )


ROWS = {  # of the slide on AAS: the row's name here and in results/ablate-all.json
    "ThinkTuning": "ThinkTuning",
    "no AAS: ordinary ratio": "no AAS: ordinary ratio",
    "γ constant": "γ constant, as published",
    "teacher for the whole run": "teacher for the whole run",
    "feedback shuffled": "feedback shuffled",
    "guidance without its reason": "guidance without its reason",
    "GRPO, four times the steps": "GRPO, four times the steps",
}


def test_numbers_of_the_slides():
    runs = result("ablate-all")
    for row, name in ROWS.items():
        took_off = [run["take_off"] for run in runs[name]]
        ends = "never" if None in took_off else ", ".join(map(str, took_off))
        assert not missing("slides.md", f"{row} {mean(runs[name]):.3f} {ends}")
    demos = [result(f"demo-seed{n}") for n in SEEDS]
    one_in = [1 / demo["base"]["floor"] for demo in demos]
    assert 200 < min(one_in) < 210 and 1750 < max(one_in) < 1800
    assert not missing("slides.md", "goes on after one answer in 200 to 1,800")
    models = [[demo[name] for demo in demos] for name in ("base", "grpo", "thinktuning")]
    for row, key, of in (
        ("accuracy", "accuracy", statistics.fmean),
        ("lowest", "accuracy", min),
        ("of the first answer", "first_answer_accuracy", statistics.fmean),
        ("reflects when wrong", "reflection_rate_first_wrong", statistics.fmean),
        ("reflects when right", "reflection_rate_first_right", statistics.fmean),
    ):
        cells = [of([run[key] for run in model]) for model in models]
        assert not missing("slides.md", " ".join([row, *(f"{cell:.3f}" for cell in cells)]))
