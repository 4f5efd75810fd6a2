"""One HTML page from one or several runs: the outcome, curves, what the teacher did, transcripts.

    python thinktuning.py report RUN [RUN ...] [--out FILE]

The page holds no script and asks no network for anything. Texts in it come from models and files,
so each passes through `esc`.
"""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections import defaultdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from data.exemplars import CUES
from show import charts
from show.charts import Line, Point, as_float, esc, finite, format_value, number, series, table
from show.read_runs import Recorded, check_steps, read_runs

STYLE = (Path(__file__).parent / "report.css").read_text()
METHODS = {"base": "Base", "grpo": "GRPO", "thinktuning": "ThinkTuning"}
INTRODUCTION = """In ThinkTuning a teacher at first adds its own second look to some responses:
these are guided. GRPO has no teacher. A response reflects if it boxes a second answer."""
MOST_BYTES = 980_000  # of the page; transcripts fill what the charts leave
MOST_POINTS = 300  # of the lines of a chart together, but no less than 10 of each
LONGEST_TEXT = 6_000  # characters


def prepare(args):
    """Read all that `args.runs` names and make the page; returns the function that writes it."""
    directory = Path(args.runs[0]) if len(args.runs) == 1 else Path()
    out = Path(args.out or directory / "report.html")
    runs, summaries = read_runs(args.runs)
    check_steps(runs)
    text = page(runs, summaries)

    def job():
        write_page(out, text)
        print(f"{out}, {len(text.encode()) / 1000:,.0f} kB")

    return job


def write_report(path) -> None:
    """report.html in the directory of a run or a demonstration."""
    write_page(Path(path) / "report.html", page(*read_runs([path])))


def write_page(out: Path, text: str) -> None:
    if out.is_symlink():  # in a directory that somebody else made it could lead anywhere
        raise FileExistsError(f"{out} is a link: delete it, or give another file with --out")
    out.write_text(text, encoding="utf-8")


def page(runs: list[Recorded], summaries: list[dict]) -> str:
    groups = group_runs(runs)
    tested = tested_methods(summaries)
    taught = [group for group in groups if any(p.mean for p in group.series("teacher_asked"))]
    sections = {
        "The outcome": held_out_table(tested),
        "What was run": runs_table(runs) + settings_table(groups),
        "What the student learned": method_charts(groups, LEARNED),
        "Inside the update": method_charts(groups, UPDATE),
        "What the teacher did": "".join(teacher_charts(group) for group in taught),
    }
    room = MOST_BYTES - len("".join([STYLE, *sections.values()]).encode())
    sections["Transcripts"] = transcripts(groups, room)
    nav, body = "", ""
    for heading, content in sections.items():
        if content:
            anchor = heading.lower().replace(" ", "-")
            nav += f'<a href="#{anchor}">{heading}</a> '
            body += f"""<section aria-labelledby="{anchor}"><h2 id="{anchor}">{heading}</h2>
{content}</section>\n"""
    title = esc(headline(tested or groups))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>{title}</title>
<style>{STYLE}</style></head>
<body><a class="skip" href="#main">Skip to the report</a>
<header><h1>{title}</h1><p class="kicker">{INTRODUCTION}</p>
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
    for i, members in enumerate(alike.values()):
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
    tested = []
    for method, name in METHODS.items():
        scores = [s[method] for s in summaries if isinstance(s.get(method), dict)]
        runs = [Recorded(Path(), {}, [{**row, "step": 0}], []) for row in scores]
        if runs:
            tested.append(Group(name, "", runs))
    return tested


def headline(groups: list[Group]) -> str:
    """What the best method reaches, and the others: held out if all were evaluated."""
    accuracy, what = "sampled_accuracy", "its last samples"
    for measure in ("eval_accuracy", "accuracy"):  # of runs, of demonstrations
        if all(group.series(measure) for group in groups):
            accuracy, what = measure, "held-out problems"
    scores = [(group.name, group.last(accuracy).mean) for group in groups]
    return best_and_others([score for score in scores if math.isfinite(score[1])], what)


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
    ("Mean length, tokens", "mean_length", ""),
    ("Accuracy under the teacher prompt", "teacher_prompt_accuracy", "%"),
)


def held_out_table(tested) -> str:
    rows = []
    for title, key, unit in HELD_OUT:
        rows.append([title, *(charts.with_error(group.last(key), unit) for group in tested)])
    several = max((len(group.runs) for group in tested), default=0)
    over = f"{several} demonstrations" if several > 1 else "the problems"
    caption = f"Held-out problems of the demonstration; ± is the standard error over {over}"
    content = table(caption, ["score", *(group.name for group in tested)], rows)
    return content if tested else ""


def runs_table(runs) -> str:
    rows = []
    for run in runs:
        planned, done = number(run.config, "steps") or 0, len(run.metrics)
        steps = f"{done} of {planned:g}: stopped early" if done < planned else done
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
    ("Accuracy on held-out problems", "%", "eval_accuracy", "Greedy, no teacher."),
    ("Held-out problems that it looks back on", "%", "eval_reflection_rate", "The same responses."),
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

# Transcripts.

SHADES = (0.5, 0.9, 0.99, 1.01)  # limits of w: the darker, the more the student learns from a token


def transcripts(groups, room: int) -> str:
    """Rollouts of each method's first run at its telling steps, as fit into `room` bytes."""
    found = []  # (place at its step, heading, rollout)
    for group in groups:
        lines = group.runs[0].transcripts
        for step, why in telling_steps(lines).items():
            at_step = [line for line in lines if line["step"] == step]
            heading = f"{group.name}, step {step}: {why}"
            found += [(place, heading, line) for place, line in enumerate(at_step)]
    articles, left_out = {heading: "" for _, heading, _ in found}, 0
    for _, heading, line in sorted(found, key=itemgetter(0)):  # one of each step first
        text = article(line)
        if (size := len(text.encode())) > room:
            left_out += 1
        else:
            articles[heading] += text
            room -= size
    content = legend() if found else ""
    for heading, texts in articles.items():
        content += f'<h3>{esc(heading)}</h3><div class="grid">{texts}</div>' if texts else ""
    if left_out:
        content += f"<p>{left_out} more would not fit on the page; transcripts.jsonl has them.</p>"
    return content


def telling_steps(lines) -> dict[int, str]:
    """Steps worth reading and why: the first, the teacher's last, the one after it, the last."""
    steps = sorted({line["step"] for line in lines})
    guided = [line["step"] for line in lines if line.get("guidance")]
    told = {step: "the last step" for step in steps[-1:]}
    if guided:
        alone = [step for step in steps if step > max(guided)]
        told |= {step: "the first on its own" for step in alone[:1]}
        told[max(guided)] = "the teacher’s last"
    told |= {step: "the first step" for step in steps[:1]}
    return dict(sorted(told.items()))


def legend() -> str:
    limits = [*(f"below {limit}" for limit in SHADES), f"{SHADES[-1]} or more"]
    shades = [f'<li><span class="w{i}">{words}</span></li>' for i, words in enumerate(limits)]
    return f"""<p>From each method’s first run. The teacher’s tokens are shaded by w = π/(π + γ),
the weight of each in the loss as its update began:</p><ul class="phrase">{"".join(shades)}
<li><span class="wn">none: guard (c), or another shaping</span></li></ul>"""


def article(line: dict) -> str:
    """One rollout: question, attempt, the teacher's opinion, reason and phrase, its reward."""
    facts = {
        "Right answer": shorten(line.get("answer")),
        "Attempt": "right" if line.get("attempt_right") else "wrong",
        "Reward": format_value(number(line, "reward") or 0.0, ""),
        "Advantage": f"{number(line, 'advantage') or 0.0:+.2f}",
    }
    listed = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    body = labelled("student", "Student", shorten(line.get("student")))
    if line.get("opinion"):
        body += labelled("opinion", "Teacher’s opinion", shorten(line["opinion"]))
    if line.get("guidance"):
        body += guidance(line)
    elif line.get("opinion"):
        body += '<p class="note">Its words did not fit after the attempt.</p>'
    question = f'<p class="question" dir="auto">{shorten(line.get("question"))}</p>'
    return f"<article>{question}<dl>{listed}</dl>{body}</article>\n"


def guidance(line) -> str:
    """The teacher's reason and phrase, each token shaded by its weight."""
    boundary = len(f"\n\n{line['reason']}") if line.get("reason") else 0
    parts, length = {"reason": "", "phrase": ""}, 0
    try:
        for text, w, pi in line.get("guidance_tokens")[: LONGEST_TEXT // 4]:
            part = "reason" if length < boundary else "phrase"
            parts[part] += shaded(str(text), as_float(w), as_float(pi))
            length += len(str(text))
    except (TypeError, ValueError):
        problem = "guidance_tokens is not a list of [text, w, π]; restore it or delete the line"
        raise ValueError(f"transcripts.jsonl, step {line['step']}: {problem}") from None
    shown = [labelled(name, f"Teacher’s {name}", text) for name, text in parts.items() if text]
    return "".join(shown)


def shaded(text, w, pi) -> str:
    """One token with a class for its weight."""
    shade = "n" if math.isnan(w) else bisect(SHADES, w)
    title = f"w {format_value(w, '')}, π {format_value(pi, '')}"
    shown = esc(text).replace("\n", "↵\n" if text.strip() else "↵")
    return f'<span class="w{shade}" title="{title}">{shown}</span>' if text else ""


def labelled(part, label, content) -> str:
    content = f'<p dir="auto">{content}</p>'
    return f'<div class="part {part}"><p class="label">{label}</p>{content}</div>'


def shorten(text) -> str:
    text = str(text if text is not None else "–")
    more = len(text) - LONGEST_TEXT
    return f"{esc(text[:LONGEST_TEXT])} … ({more:,} more characters)" if more > 0 else esc(text)
