"""What the demonstration prints, from records and scores made by hand."""

from data import Problem
from demo.printed import chart, same_question, shown, step_of_teachers_end, table_row

ASKED = [Problem("Eva has 1 nut. On Monday she finds 2.", "3"), Problem("Sam has 5 nuts.", "5")]
RIGHT, WRONG = ["So it is \\boxed{3}.", "So it is \\boxed{5}."], "So it is \\boxed{9}."


def records(*texts):
    return [(problem, text, True) for problem, text in zip(ASKED, texts, strict=True)]


def test_the_question_that_is_shown_is_the_first_that_thinktuning_mends():
    mended = f"{WRONG}\n\nWait: look at Monday.\n\n{RIGHT[1]}"
    found = {
        "base": records(WRONG, WRONG),
        "grpo": records(WRONG, RIGHT[1]),
        "thinktuning": records(RIGHT[0], mended),  # the first was right at once
    }
    lines = same_question(found).splitlines()
    assert lines[0].endswith("whose wrong first answer ThinkTuning mends:")
    assert lines[1] == "Sam has 5 nuts.  (answer: 5)"
    assert [line.split(": ")[0].strip() for line in lines[2:5]] == ["base", "grpo", "thinktuning"]
    assert lines[3].endswith(RIGHT[1]) and lines[4].endswith(WRONG)
    assert [line.strip() for line in lines[5:]] == ["| Wait: look at Monday.", f"| {RIGHT[1]}"]


def test_where_nothing_is_mended_the_first_question_is_shown():
    found = {name: records(WRONG, RIGHT[1]) for name in ("base", "grpo", "thinktuning")}
    lines = same_question(found).splitlines()
    assert lines[0].startswith("ThinkTuning mends no wrong first answer")
    assert lines[1] == "Eva has 1 nut. On Monday she finds 2.  (answer: 3)"


def test_the_chart_marks_where_the_teacher_leaves():
    shares = [(0.0, 0.0, 0.0), (0.5, 0.1, 0.0), (1.0, 0.0, 0.0)]
    ours = [
        dict(step=i, fraction=0.1 if i < 2 else 0.0, reflection_rate=total)
        | dict(reflection_rate_first_wrong=wrong, reflection_rate_first_right=right)
        for i, (wrong, right, total) in enumerate(shares)
    ]
    curves = {"thinktuning": ours, "grpo": [{**metrics, "fraction": 0} for metrics in ours]}
    assert step_of_teachers_end(ours) == 2
    assert step_of_teachers_end(ours[:2]) == 2  # it never leaves
    lines = chart(curves).splitlines()
    assert "the teacher leaves at step 2" in lines[1]
    columns = {line[:5].strip(): line[6:] for line in lines[2:-1]}
    assert columns["100%"] == "  W" and columns["50%"] == " W|" and columns["10%"] == " r|"
    assert columns["0%"][0] == "W"


def test_a_share_that_does_not_exist_is_a_dash():
    assert shown(None) == "-" and shown(0.25) == "0.250" and shown(0.25, 4) == "0.2500"
    assert table_row("a", ["b", "c"]) == "a" + " " * 39 + " " * 15 + "b" + " " * 15 + "c"
