"""One HTML page from one or several runs: the outcome, curves, what the teacher did, transcripts.

    python thinktuning.py report RUN [RUN ...] [--out FILE]

The page holds no script and asks no network for anything. Texts in it come from models and files,
so each passes through `esc`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.exemplars import CUES
from show import charts, transcripts
from show.charts import Line, Point, esc, finite, format_value, number, series, table
from show.read_runs import Recorded, check_steps, read_runs

STYLE = (Path(__file__).parent / "report.css").read_text()
METHODS = {"base": "Base", "grpo": "GRPO", "thinktuning": "ThinkTuning"}
INTRODUCTION = """In ThinkTuning a teacher at first adds its own second look to some responses:
these are guided. GRPO has no teacher. A response reflects if it boxes a second
answer."""
QUICK = " These runs were quick ones: too short to show anything."
RELOAD = 5  # seconds until a browser reads the page of a run again that has not ended
LIVE = f" The run has not ended: this page shows it so far, and reloads every {RELOAD} seconds."
FEW = 10  # steps: after fewer the heading says how many, because that is hardly a result
MOST_BYTES = 980_000  # of the page; transcripts fill what the charts leave
MOST_POINTS = 300  # of the lines of a chart together, but no less than 10 of each


def prepare(args):
    """Read all that `args.runs` names and make the page; returns the function that writes it."""
    directory = Path(args.runs[0]) if len(args.runs) == 1 else Path()
    out = Path(args.out or directory / "report.html")
    runs, summaries = read_runs(args.runs)
    check_file(out)
    check_steps(runs)
    text = page(runs, summaries)

    def job():
        write_page(out, text)
        print(f"{out}, {len(text.encode()) / 1000:,.0f} kB")

    return job


def check_file(out: Path) -> None:
    """Raises ValueError if no page can be written there."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"{out} cannot be written: name a file, in a directory that exists")


def write_report(path, live=False) -> None:
    """report.html in the directory of a run or a demonstration; `live`: it has not ended.

    The page takes the old one's place at once, so nobody reads half of it.
    """
    out = Path(path) / "report.html"
    temporary = out.with_suffix(".tmp")
    write_page(temporary, page(*read_runs([path]), live))
    temporary.replace(out)


def write_page(out: Path, text: str) -> None:
    if out.is_symlink():  # in a directory that somebody else made it could lead anywhere
        raise FileExistsError(f"{out} is a link: delete it, or give another file with --out")
    out.write_text(text, encoding="utf-8")


def page(runs: list[Recorded], summaries: list[dict], live=False) -> str:
    groups = group_runs(runs)
    tested = tested_methods(summaries)
    taught = [group for group in groups if any(p.mean for p in group.series("teacher_asked"))]
    sections = {
        "The outcome": held_out_table(tested) + base_table(summaries),
        "Planted attempts": planted_table(summaries),
        "What was run": runs_table(runs, live) + settings_table(groups),
        "What the student learned": method_charts(groups, LEARNED),
        "Inside the update": method_charts(groups, UPDATE),
        "What the teacher did": "".join(teacher_charts(group) for group in taught),
    }
    room = MOST_BYTES - len("".join([STYLE, *sections.values()]).encode())
    sections["Transcripts"] = transcripts.section(groups, room)
    nav, body = "", ""
    for heading, content in sections.items():
        if content:
            anchor = heading.lower().replace(" ", "-")
            nav += f'<a href="#{anchor}">{heading}</a> '
            body += f"""<section aria-labelledby="{anchor}"><h2 id="{anchor}">{heading}</h2>
{content}</section>\n"""
    title = esc(looking_back(tested) or headline(tested or groups))
    introduction = INTRODUCTION + QUICK * any(bool(s.get("quick")) for s in summaries) + LIVE * live
    reload = f'<meta http-equiv="refresh" content="{RELOAD}">\n' if live else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
{reload}<link rel="icon" href="data:,"><title>{title}</title>
<style>{STYLE}</style></head>
<body><a class="skip" href="#main">Skip to the report</a>
<header><h1>{title}</h1><p class="kicker">{introduction}</p>
<nav aria-label="Sections">{nav}</nav></header>
<main id="main">
{body}</main></body></html>
"""


class Group(NamedTuple):
    """Runs that differ in nothing but their seed: one line, with a band."""

    name: str
    style: str  # a class of report.css
    runs: list[Recorded]
    every: int = 1  # steps of a point

    def series(self, measure) -> list[Point]:
        return series(self.runs, measure, self.every)

    def last(self, measure) -> Point:
        return [Point(0, math.nan, 0.0), *finite(self.series(measure))][-1]

    def teacher_left(self) -> int | None:
        """The first step without help after the last one with it; None: it stayed, or none came."""
        metrics = [m for run in self.runs for m in run.metrics]
        helped = [m["step"] for m in metrics if number(m, "fraction")]
        last = max(helped, default=math.inf)
        return min((m["step"] for m in metrics if m["step"] > last), default=None)


def group_runs(runs) -> list[Group]:
    """ThinkTuning comes first; settings that set two groups of one method apart join its name."""
    alike = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.config.get("method") != "thinktuning"):
        settings = {key: value for key, value in run.config.items() if key != "seed"}
        alike[json.dumps(settings, sort_keys=True)].append(run)
    most = min(120, max(10, MOST_POINTS // max(1, len(alike))))
    every = 1 + max((m["step"] for run in runs for m in run.metrics), default=0) // most
    groups = []
    # A method keeps its colour and its dashes, also on a page without the other one.
    first = 0 if any(run.config.get("method") == "thinktuning" for run in runs) else 1
    for i, members in enumerate(alike.values(), first):
        name, config = method_of(members[0]), members[0].config
        rivals = [other[0].config for other in alike.values() if method_of(other[0]) == name]
        for key, value in config.items():
            if key != "seed" and any(rival.get(key) != value for rival in rivals):
                name += f", {key} {value!s:.40}"
        groups.append(Group(name, f"s{i % 6}", members, every))
    return groups


def method_of(run: Recorded) -> str:
    method = str(run.config.get("method", "no method"))
    return METHODS.get(method, method)


# The outcome, and what was run.


def tested_methods(summaries) -> list[Group]:
    """The methods of demonstrations, with their held-out scores as the metrics of one step."""
    tested = [scores_at(summaries, name, method) for method, name in METHODS.items()]
    return [group for group in tested if group.runs]


def scores_at(summaries, name: str, *keys: str) -> Group:
    """What the summaries hold under the keys, one inside the other, as the metrics of one step."""
    runs = []
    for found in summaries:
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict):
            runs.append(Recorded(Path(), {}, [{**found, "step": 0}], []))
    return Group(name, "", runs)


def looking_back(tested: list[Group]) -> str:
    """When the trained methods reflect on their answers; "" if that is not known of each."""
    found = [how_it_reflects(g) for g in reversed(tested) if g.name != METHODS["base"]]
    return "; ".join(found) if all(found) else ""


def how_it_reflects(group: Group) -> str:
    wrong = group.last("reflection_rate_first_wrong").mean
    right = group.last("reflection_rate_first_right").mean
    sampled = group.last("sampled_reflection_rate").mean
    if wrong == right == 0 and not sampled >= 0.01:
        how_many = "hardly any" if sampled > 0 else "none"
        return f"{group.name} reflects on {how_many} of its held-out answers"
    gave_both = 0 < group.last("first_answer_accuracy").mean < 1
    if not gave_both or not math.isfinite(wrong + right):
        return ""
    of_wrong, of_right = format_value(wrong, "%"), format_value(right, "%")
    if of_wrong == of_right:
        return f"{group.name} reflects on {of_wrong} of its answers, wrong and right alike"
    shares = f"{of_wrong} of its wrong answers and on {of_right} of its right ones"
    return f"{group.name} reflects on {shares}"


def headline(groups: list[Group]) -> str:
    """What the best method reaches, and the others: held out if all were evaluated."""
    accuracy, what = "sampled_accuracy", "its last samples"
    for measure in ("eval_accuracy", "accuracy"):  # of runs, of demonstrations
        if all(group.series(measure) for group in groups):
            accuracy, what = measure, "held-out problems"
    scores = [(group.name, group.last(accuracy).mean) for group in groups]
    scores = [score for score in scores if math.isfinite(score[1])]
    steps = sorted(len(run.metrics) for group in groups for run in group.runs)
    after = ""
    if accuracy != "accuracy" and scores and steps[0] < FEW:  # of runs, not of demonstrations
        after = "After " + " to ".join(map(str, sorted({steps[0], steps[-1]}))) + " steps: "
    return after + best_and_others(scores, what)


def best_and_others(scores: list[tuple[str, float]], what: str) -> str:
    if not scores:
        return "Nothing was measured"
    scores = sorted(scores, key=lambda score: -score[1])
    (best, share), *others = [(name, format_value(mean, "%")) for name, mean in scores]
    shown = "".join(f", {name} {its_share}" for name, its_share in others)
    if len(others) > 3:
        shown = f", the others {others[-1][1]} to {others[0][1]}"
    return f"{best} gets {share} of {what} right{shown}"


HELD_OUT = (  # score, key, unit
    ("Accuracy, greedy", "accuracy", "%"),
    ("Accuracy, sampled", "sampled_accuracy", "%"),
    ("Accuracy of the first answer", "first_answer_accuracy", "%"),
    ("Wrong at first, right in the end", "wrong_to_right", ""),
    ("Right at first, wrong in the end", "right_to_wrong", ""),
    ("Reflects: answers a second time", "reflection_rate", "%"),
    ("… when the first answer is wrong", "reflection_rate_first_wrong", "%"),
    ("… when the first answer is right", "reflection_rate_first_right", "%"),
    ("… and names the line that is wrong", "names_line", "%"),
    ("Reflects, sampled, first answer wrong", "sampled_reflection_rate_first_wrong", "%"),
    ("Reflects, sampled, first answer right", "sampled_reflection_rate_first_right", "%"),
    ("Mean length, tokens", "mean_length", ""),
)


def held_out_table(tested) -> str:
    rows = []
    for title, key, unit in HELD_OUT:
        cells = [charts.with_error(group.last(key), unit) for group in tested]
        if any(cell != "–" for cell in cells):
            rows.append([title, *cells])
    several = max((len(group.runs) for group in tested), default=0)
    over = f"{several} demonstrations" if several > 1 else "the problems"
    caption = f"Test problems of the demonstration; ± is the standard error over {over}"
    content = table(caption, ["score", *(group.name for group in tested)], rows)
    return content if rows else ""


BASE_MODEL = (  # score, part of the summary, key
    ("Right under the teacher prompt", "teacher_prompt", "accuracy"),
    ("Its opinion of an attempt is right", "teacher_prompt", "opinion_accuracy"),
    ("Goes on after its own answer: the floor", "base", "floor"),
)


def base_table(summaries) -> str:
    rows = []
    for title, part, key in BASE_MODEL:
        score = scores_at(summaries, part, part).last(key)
        if finite([score]):
            rows.append([title, charts.with_error(score, "%")])
    caption = "The base model, which is also the teacher"
    return table(caption, ["score", "Base"], rows) if rows else ""


PLANTED = {  # kinds of attempts
    "misconception": "wrong by the misconception",
    "right": "right, to the same questions",
    "slip_before": "another slip, then the misconception",
    "other_story": "another story’s wrong attempt",
}
FOUND = (  # column, key, unit
    ("attempts", "attempts", ""),
    ("reflects", "goes_on", "%"),
    ("names the line", "names_line", "%"),
    ("takes over its number", "takes_over", "%"),
    ("right", "accuracy", "%"),
)
PLANTED_NOTE = """<p>ThinkTuning’s model goes on from an attempt as if it had just written it.
Some attempts it would never write. They show whether it reads the attempt or only the question:
whether it names the line with the misconception, and takes over the attempt’s own number before
that line. Those two are shares of the attempts after which it reflects.</p>"""


def planted_table(summaries) -> str:
    """What ThinkTuning's model does with attempts that it did not write."""
    rows = []
    for kind, title in PLANTED.items():
        group = scores_at(summaries, title, "planted", kind)
        if group.runs:
            rows.append([title, *(charts.with_error(group.last(key), u) for _, key, u in FOUND)])
    heads = ["planted attempt", *(column for column, *_ in FOUND)]
    return PLANTED_NOTE + table("Planted attempts, greedy", heads, rows) if rows else ""


def runs_table(runs, live=False) -> str:
    rows, early = [], "so far" if live else "stopped early"
    for run in runs:
        planned, done = number(run.config, "steps") or 0, len(run.metrics)
        steps = f"{done} of {planned:g}: {early}" if done < planned else done
        rows.append([run.path, method_of(run), run.config.get("seed", "–"), steps])
    return table("Every run on this page", ["directory", "method", "seed", "steps"], rows)


def settings_table(groups) -> str:
    configs = [group.runs[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if key != "seed")
    rows = []
    for key in keys:
        rows.append([key, *(config.get(key, "–") for config in configs)])
    content = table("Settings", ["setting", *(group.name for group in groups)], rows)
    return f"<details><summary>All {len(rows)} settings</summary>{content}</details>"


# Charts.

LEARNED = (  # quantity, unit, metric, what to know
    ("Accuracy on validation problems", "%", "eval_accuracy", "Greedy, no teacher."),
    ("Validation problems it reflects on", "%", "eval_reflection_rate", "The same responses."),
    ("Accuracy of the student’s own samples", "%", "sampled_accuracy", "Before any help."),
    ("Own samples that reflect", "%", "reflection_rate", "Before any help."),
)
UPDATE = (
    ("Mean reward", "reward", "reward", "After help: what the advantages are made of."),
    ("Groups skipped", "%", "groups_equal", "All rewards are equal: there is nothing to learn."),
    ("Entropy of the policy", "nats", "entropy", "Mean over the tokens that were trained on."),
    ("Length of the student’s own samples", "tokens", "mean_length", "Before any help."),
    ("Tokens held by PPO’s clip", "%", "clip_fraction", "Their ratio is far from 1: no gradient."),
    ("Tokens held by the dual clip", "%", "dual_clip_fraction", "In bad rollouts: no gradient."),
)


def method_charts(groups, specification) -> str:
    """One chart for each metric, with a line for each method."""
    figures = ""
    for quantity, unit, metric, note in specification:
        lines = [Line(g.name, g.style, g.series(metric)) for g in groups]
        figures += chart(quantity, unit, lines, note, groups)
    return f'<div class="grid">{figures}</div>' if figures else ""


def teacher_charts(group: Group) -> str:
    """Charts of one method's teacher, with a line for each measure."""
    left, figures = group.teacher_left(), ""
    for quantity, unit, measures, note, finding in TEACHER:
        lines = []
        for i, (name, measure) in enumerate(measures.items()):
            lines.append(Line(name, f"t{i}", group.series(measure)))
        figures += chart(quantity, unit, lines, note, [group], finding)
    leaves = "stays to the end" if left is None else f"leaves at step {left}"
    return f'<h3>{esc(group.name)}: the teacher {leaves}</h3><div class="grid">{figures}</div>'


def chart(quantity, unit, lines, note, groups, finding=charts.trends) -> str:
    """A figure of the lines that have a number; its note says what bands and points are."""
    lines = [line for line in lines if finite(line.points)]
    if not lines:
        return ""
    if any(p.error for line in lines for p in line.points):
        runs = max(len(group.runs) for group in groups)
        over = f"{runs} runs" if runs > 1 else "the problems"
        note += f" The band is ± the standard error over {over}."
    if groups[0].every > 1:
        note += f" Each point is a mean over {groups[0].every} steps."
    marks = sorted({group.teacher_left() for group in groups} - {None})
    return charts.figure(quantity, unit, lines, finding(lines, unit), note, marks)


def share(metrics, part: str, whole: str) -> float | None:
    a, b = number(metrics, part), number(metrics, whole)
    return None if a is None or not b else a / b


def behaviour_share(metrics, name: str) -> float | None:
    seen, parsed = metrics.get("behaviours"), number(metrics, "teacher_parsed")
    if not parsed or not isinstance(seen, dict):
        return None
    return (number(seen, name) or 0.0) / parsed


def unguided_reward(metrics) -> float | None:
    """The mean reward of the rollouts without help: what the guided ones leave of the mean."""
    mean, part = number(metrics, "reward"), number(metrics, "guided_share_of_rollouts")
    guided = share(metrics, "guided_reward", "guided")
    if mean is None or guided is None or part in (None, 1.0):
        return None
    return (mean - part * guided) / (1 - part)


SCHEDULE = {"p": "fraction", "guided share": "guided_share_of_rollouts"}
REPLIES = {
    "in format": partial(share, part="teacher_parsed", whole="teacher_asked"),
    "opinion right": partial(share, part="teacher_opinion_right", whole="teacher_parsed"),
}
REWARDS = {
    "with help": partial(share, part="guided_reward", whole="guided"),
    "the same attempts alone": partial(share, part="guided_original_reward", whole="guided"),
    "nobody helped": unguided_reward,
}
BEHAVIOURS = {name: partial(behaviour_share, name=name) for name in CUES}
WEIGHTS = {"π": "pi_guided", "w": "w_guided"}
TEACHER = (  # quantity, unit, measures, what to know, what the title says
    ("How often it helps", "%", SCHEDULE, "p is what the schedule asks for.", charts.trends),
    ("Its replies", "%", REPLIES, "Right: the grader says the same.", charts.averages),
    ("Reward of a rollout", "reward", REWARDS, "Means over a step.", charts.averages),
    ("Behaviours in its replies", "%", BEHAVIOURS, "Found by cue words.", charts.averages),
    (
        "Its words, seen by the student",
        "",
        WEIGHTS,
        "π: probability. w: AAS's weight, of the tokens that it shapes.",
        charts.trends,
    ),
)
