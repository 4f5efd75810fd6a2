"""One self-contained HTML page from one or several runs: the outcome, curves, what the teacher did, transcripts.

    python thinktuning.py report RUN [RUN ...] [--out FILE]

Everything is drawn from the run directories, and every title says what their numbers say. The page holds no script and
asks no network for anything. Texts in it come from models and files, so each passes through `esc`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data.scores import mean_and_se
from show.charts import Line, averages, details, esc, figure, finding, finite, number, plus_minus, series, show, swatch, table
from show.read_runs import Recorded, read_runs

STYLE = (Path(__file__).parent / "report.css").read_text()
METHODS = {"base": "Base", "grpo": "GRPO", "thinktuning": "ThinkTuning"}
BEHAVIOURS = ("self-conflict", "self-critique", "self-agreement", "self-consultation")
LEAD = ("GRPO samples a group of responses to each question and learns from how each one’s reward compares with its group’s. "
        "ThinkTuning does the same, but at first a teacher adds a second look of its own to some of them: they are guided, and "
        "its tokens weigh w = π/(π + γ), little where the student finds them impossible. A response reflects when a second "
        "boxed answer follows its first.")
LIMIT, CHARTS = 980_000, 500_000  # bytes of the page, and of the charts on it; the transcripts fill what is left
POINTS = (120, 60, 30, 15)  # of a line, the first number with which the charts fit: longer runs are drawn as means over steps
LONGEST = 6_000  # characters of one text


class Group(NamedTuple):
    """Runs that differ in nothing but their seed: one line, with a band."""
    name: str
    style: str  # a class of report.css
    runs: list[Recorded]
    every: int  # steps of a point


def prepare(args):
    """Read all that `args.runs` names and make the page; returns the function that writes it."""
    out = Path(args.out or (Path(args.runs[0]) if len(args.runs) == 1 else Path()) / "report.html")
    text = page(*read_runs(args.runs))

    def job():
        write_page(out, text)
        print(f"{out}, {len(text.encode()) / 1000:,.0f} kB")

    return job


def write_report(path) -> None:
    """report.html in the directory of a run or a demonstration."""
    write_page(Path(path) / "report.html", page(*read_runs([path])))


def write_page(out: Path, text: str) -> None:
    if out.is_symlink():  # in a directory that somebody else made it could lead anywhere
        raise FileExistsError(f"{out} is a link: nothing was written; take it away, or give another file with --out")
    out.write_text(text, encoding="utf-8")


def page(runs: list[Recorded], summaries: list[dict]) -> str:
    for most in POINTS:
        groups = group_runs(runs, most)
        taught = [g for g in groups if any(number(m, "teacher_asked") for r in g.runs for m in r.metrics)]
        charts = [("learned", "What the student learned", curves(groups, LEARNED)),
                  ("update", "Inside the update", curves(groups, UPDATE)),
                  ("teacher", "What the teacher did", "".join(teacher_curves(g, len(taught) > 1) for g in taught))]
        if size(charts) <= CHARTS:
            break
    results = outcome(groups, summaries)
    sections = [("outcome", "The outcome", tiles(results) + held_out_table(summaries) + left_out(runs, summaries)),
                ("runs", "What was run", runs_table(runs) + settings(groups)), *charts]
    sections.append(("transcripts", "Transcripts", transcripts(groups, LIMIT - len(STYLE) - size(sections))))
    sections = [s for s in sections if s[2]]
    nav = "".join(f'<a href="#{anchor}">{title}</a> ' for anchor, title, _ in sections)
    body = "".join(f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{title}</h2>{content}</section>\n'
                   for anchor, title, content in sections)
    title = esc(headline(results))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>{title}</title>
<style>{STYLE}</style></head>
<body><a class="skip" href="#main">Skip to the report</a>
<header><p class="kicker">Report of {len(runs)} run{"s" * (len(runs) != 1)}</p><h1>{title}</h1>
<p class="kicker">{LEAD}</p>
<nav aria-label="Sections">{nav}</nav></header>
<main id="main">
{body}</main></body></html>
"""


def size(sections) -> int:
    return sum(len(content.encode()) for _, _, content in sections)


def group_runs(runs, most: int) -> list[Group]:
    """One group for each method; settings that set two groups of one method apart join its name. ThinkTuning comes first.

    most: points that a line may have.
    """
    alike, every = defaultdict(list), 1 + max((m["step"] for r in runs for m in r.metrics), default=0) // most
    for run in sorted(runs, key=lambda r: r.config.get("method") != "thinktuning"):
        alike[json.dumps({k: v for k, v in run.config.items() if k != "seed"}, sort_keys=True)].append(run)
    groups = []
    for i, members in enumerate(alike.values()):
        config = members[0].config
        rivals = [m[0].config for m in alike.values() if m[0].config.get("method") == config.get("method")]
        own = [f"{k} {v!s:.40}" for k, v in config.items() if k != "seed" and any(r.get(k) != v for r in rivals)]
        groups.append(Group(", ".join([method_of(config), *own]), f"s{i % 6}", members, every))
    return groups


def method_of(config) -> str:
    method = str(config.get("method", "no method"))
    return METHODS.get(method, method)


# The outcome, and what was run.

def outcome(groups, summaries) -> list[tuple]:
    """(name, style, accuracy, its error, reflection rate, of what) for each method: held-out scores, or the last samples'."""
    styles = {method_of(g.runs[0].config): g.style for g in reversed(groups)}
    results = []
    for method, name in METHODS.items():
        rows = [s[method] for s in summaries if isinstance(s.get(method), dict)]
        if rows:
            results.append((name, styles.get(name, "sbase"), *over_seeds(rows, "accuracy"),
                            over_seeds(rows, "reflection_rate")[0], "held-out problems"))
    if results:
        return results
    held_out = all(any("eval_accuracy" in m for r in g.runs for m in r.metrics) for g in groups)
    keys = ("eval_accuracy", "eval_reflection_rate") if held_out else ("sampled_accuracy", "reflection_rate")
    for g in groups:
        right, reflects = (finite(series(g.runs, key)) for key in keys)
        if right and reflects:
            results.append((g.name, g.style, right[-1].mean, right[-1].error, reflects[-1].mean,
                            "held-out problems" if held_out else "its last samples"))
    return results


def over_seeds(rows, key) -> tuple[float, float]:
    """A score's mean over demonstrations and its standard error; of one alone, the error over problems that it holds."""
    rows = [r for r in rows if math.isfinite(number(r, key) if key in r else math.nan)]
    if len(rows) == 1:
        return rows[0][key], number(rows[0], key + "_se") or 0.0
    return mean_and_se([r[key] for r in rows]) if rows else (math.nan, 0.0)


def headline(results) -> str:
    ranked = sorted((r for r in results if math.isfinite(r[2])), key=lambda r: -r[2])
    if not ranked:
        return "Nothing was measured"
    name, _, accuracy, *_, what = ranked[0]
    others = [f", {r[0]} {show(r[2], '%')}" for r in ranked[1:]]
    if len(others) > 3:
        others = [f", the others {show(ranked[-1][2], '%')} to {show(ranked[1][2], '%')}"]
    return f"{name} gets {show(accuracy, '%')} of {what} right" + "".join(others)


def tiles(results) -> str:
    """The outcome in figures that the back row can read."""
    shown = "".join(f'<div class="tile {style}"><p class="name">{swatch(style)} {esc(name)}</p>\n<p class="big">'
                    + show(accuracy, "%") + (f" <small>± {show(error, '%')}</small>" if error else "")
                    + f'</p><p>of {what} right</p><p><b>{show(reflects, "%")}</b> of responses reflect</p></div>'
                    for name, style, accuracy, error, reflects, what in results)
    return f'<div class="tiles">{shown}</div>' if shown else ""


HELD_OUT = (
    ("Accuracy, greedy", "accuracy", "%"), ("Accuracy, sampled", "sampled_accuracy", "%"),
    ("Accuracy of the first answer", "first_answer_accuracy", "%"),
    ("Wrong at first, right in the end", "wrong_to_right", ""), ("Right at first, wrong in the end", "right_to_wrong", ""),
    ("Reflects: answers a second time", "reflection_rate", "%"),
    ("… when the first answer is wrong", "reflection_rate_first_wrong", "%"),
    ("… when the first answer is right", "reflection_rate_first_right", "%"),
    ("Mean length, tokens", "mean_length", ""), ("Accuracy under the teacher prompt", "teacher_prompt_accuracy", "%"))


def held_out_table(summaries) -> str:
    columns = {n: rows for n in METHODS if (rows := [s[n] for s in summaries if isinstance(s.get(n), dict)])}
    rows = [[title, *(plus_minus(*over_seeds(scores, key), unit) for scores in columns.values())]
            for title, key, unit in HELD_OUT]
    over = f"over {len(summaries)} demonstrations" if len(summaries) > 1 else "over the problems"
    caption = f"Held-out problems, no teacher; ± is the standard error {over}"
    return table(caption, ["score", *map(METHODS.get, columns)], rows) if columns else ""


def left_out(runs, summaries) -> str:
    """A demonstration's table holds its own runs; other runs on the page must not seem forgotten."""
    others = [esc(str(r.path)) for r in runs if not str(r.config.get("model")).startswith("the demonstration's base")]
    return f"<p>Not in this table, for want of the same test: {', '.join(others)}.</p>" if summaries and others else ""


def runs_table(runs) -> str:
    rows = []
    for r in runs:
        planned, done, speed = number(r.config, "steps") or 0, len(r.metrics), finite(series([r], "tokens_per_second"))
        rows.append([r.path, method_of(r.config), r.config.get("seed", "–"),
                     f"{done} of {planned:g}: stopped early" if done < planned else done,
                     f"{r.config.get('questions', '–')} × {r.config.get('samples', '–')}", r.config.get("learning_rate", "–"),
                     show(mean_and_se([p.mean for p in speed])[0], "") if speed else "–"])
    heads = ["directory", "method", "seed", "steps", "questions × rollouts a step", "learning rate", "sampled tokens a second"]
    return table("Every run on this page", heads, rows)


def settings(groups) -> str:
    keys = dict.fromkeys(k for g in groups for k in g.runs[0].config if k != "seed")
    rows = [[k, *(g.runs[0].config.get(k, "–") for g in groups)] for k in keys]
    return details(f"All {len(rows)} settings", table("Settings", ["setting", *(g.name for g in groups)], rows))


# Charts.

LEARNED = (  # metric, quantity, unit, what to know
    ("eval_accuracy", "Accuracy on held-out problems", "%",
     "Evaluated while training, greedy, no teacher; by the demonstration on validation problems."),
    ("eval_reflection_rate", "Held-out problems that it looks back on", "%",
     "The same responses: a second boxed answer after the first."),
    ("sampled_accuracy", "Accuracy of the student’s own samples", "%", "On training questions, before any help."),
    ("reflection_rate", "Own samples that reflect", "%", "A second boxed answer after the first, before any help."))
UPDATE = (
    ("reward", "Mean reward", "reward", "After help: what the advantages are made of."),
    ("groups_equal", "Groups skipped", "%", "All rewards of such a group are equal: no advantage, nothing to learn from."),
    ("entropy", "Entropy of the policy", "nats", "Mean over the tokens that were trained on."),
    ("mean_length", "Length of the student’s own samples", "tokens", "Before any help."),
    ("clip_fraction", "Tokens held by PPO’s clip", "%", "Their ratio has left its range around 1, so they have no gradient."),
    ("dual_clip_fraction", "Tokens held by the dual clip", "%", "Of bad rollouts, grown so likely that their loss is bounded."))


def curves(groups, specification) -> str:
    marks = [(step, "teacher leaves") for step in sorted({teacher_left(g) for g in groups} - {None})]
    figures = []
    for key, quantity, unit, note in specification:
        lines = [Line(g.name, g.style, series(g.runs, key, g.every)) for g in groups]
        figures.append(figure(quantity, unit, lines, explain(note, groups, lines), finding, marks))
    return grid(figures)


def teacher_curves(group: Group, several: bool) -> str:
    """Charts of one method's teacher; but for the schedule, over the steps at which it was there."""
    left = teacher_left(group)
    leaving = f"The teacher leaves at step {left}" if left is not None else "The teacher stays to the end"
    charts = (
        ("How often it helps", "%", "p is the share of each group that the schedule asks for; one rollout is the least.",
         lambda lines, unit: leaving, {"p": "fraction", "guided rollouts": "guided_share_of_rollouts"}),
        ("Its replies", "%",
         "In format: opinion, reason and phrase, nothing else. Right: says correct of a right attempt, incorrect of a wrong one.",
         averages, {"in format": share("teacher_parsed", "teacher_asked"),
                    "opinion right": share("teacher_opinion_right", "teacher_parsed")}),
        ("Reward of a rollout", "reward",
         "The helped attempts with the teacher’s words and without, and the rollouts that were left alone.", averages,
         {"with help": share("guided_reward", "guided"), "the same attempts alone": share("guided_original_reward", "guided"),
          "nobody helped": unguided_reward}),
        ("Behaviours in its replies", "%", "By cue words; shares of the replies in format.", averages,
         {name: behaviour_share(name) for name in BEHAVIOURS}),
        ("Its words, seen by the student", "",
         "Means over the teacher’s tokens: π, how likely the student finds them; w, their weight in Advantage-Aware Shaping.",
         finding, {"π": "pi_guided", "w": "w_guided"}))
    figures = []
    for quantity, unit, note, title, values in charts:
        lines = [Line(name, f"t{i}", series(group.runs, value, group.every)) for i, (name, value) in enumerate(values.items())]
        if "p" not in values and left is not None:
            lines = [line._replace(points=[p for p in line.points if p.step < left]) for line in lines]
        figures.append(figure(quantity, unit, lines, explain(note, [group], lines), title,
                              [] if left is None else [(left, "teacher leaves")]))
    return (f"<h3>{esc(group.name)}</h3>" if several else "") + grid(figures)


def teacher_left(group: Group) -> int | None:
    """The first step without help after the last one with it; None: no teacher came, or it stayed."""
    helped = [m["step"] for r in group.runs for m in r.metrics if number(m, "fraction")]
    last = max(helped, default=math.inf)
    return min((m["step"] for r in group.runs for m in r.metrics if m["step"] > last), default=None)


def share(part: str, whole: str):
    def value(metrics):
        a, b = number(metrics, part), number(metrics, whole)
        return None if a is None or not b else a / b
    return value


def behaviour_share(name: str):
    def value(metrics):
        seen, parsed = metrics.get("behaviours"), number(metrics, "teacher_parsed")
        return None if not parsed or not isinstance(seen, dict) else (number(seen, name) or 0.0) / parsed
    return value


def unguided_reward(metrics) -> float | None:
    """The mean reward of the rollouts that nobody helped: what is left of the mean over all without the guided ones."""
    mean, part = number(metrics, "reward"), number(metrics, "guided_share_of_rollouts")
    guided = share("guided_reward", "guided")(metrics)
    return None if mean is None or guided is None or part in (None, 1.0) else (mean - part * guided) / (1 - part)


def explain(note, groups, lines) -> str:
    """What to know about a chart, and what its bands and points are."""
    runs, every = max(len(g.runs) for g in groups), groups[0].every
    if any(p.error for line in lines for p in line.points):
        note += f" The band is ± the standard error over {f'{runs} runs' if runs > 1 else 'the problems'}."
    return note + (f" Each point is a mean over {every} steps." if every > 1 else "")


def grid(figures) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else ""


# Transcripts.

PARTS = {"student": "the student’s attempt", "opinion": "the teacher’s opinion", "reason": "its reason", "phrase": "its phrase"}
SHADES = ((0.5, "below 0.5"), (0.9, "0.5 to 0.9"), (0.99, "0.9 to 0.99"), (1.01, "about 1"), (math.inf, "above 1.01"))
LEGEND = f"""<p>From each method’s first run. The parts:</p>
<ul class="legend">{"".join(f'<li class="{name}"><span class="key">{words}</span></li>' for name, words in PARTS.items())}</ul>
<p>The shading of the teacher’s tokens is w = π/(π + γ), the weight of each in Advantage-Aware Shaping as its update began:</p>
<ul class="legend phrase">{"".join(f'<li><span class="w{i}">{words}</span></li>' for i, (_, words) in enumerate(SHADES))}
<li><span class="wn">none: guard (c), or another shaping</span></li></ul>"""


def transcripts(groups, room: int) -> str:
    """Rollouts of each method's first run at its telling steps, as many as fit into `room` bytes."""
    found = []
    for g in groups:
        lines = g.runs[0].transcripts
        found += [(rank, g.name, step, why, line) for step, why in telling_steps(lines).items()
                  for rank, line in enumerate(line for line in lines if line["step"] == step)]
    kept = defaultdict(list)
    for _, name, step, why, line in sorted(found, key=lambda f: f[0]):  # one of each step first
        text = article(line)
        if len(text.encode()) <= room:
            room -= len(text.encode())
            kept[name, step, why].append(text)
    content = "".join(f"<h3>{esc(name)}, step {step}: {why}</h3>" + grid(kept[name, step, why])
                      for name, step, why in dict.fromkeys(f[1:4] for f in found) if kept[name, step, why])
    if left_out := len(found) - sum(map(len, kept.values())):
        content += f"<p>{left_out} more would not fit on the page; transcripts.jsonl has them.</p>"
    return LEGEND + content if content else ""


def telling_steps(lines) -> dict[int, str]:
    """Steps worth reading and why: the first, the last with a teacher, the one after it, the last."""
    steps = sorted({line["step"] for line in lines})
    guided = [line["step"] for line in lines if line.get("guidance")]
    last = max(guided, default=math.inf)
    after = [s for s in steps if s > last]
    told = {s: "the last step" for s in steps[-1:]} | {s: "the first on its own" for s in after[:1]} \
        | ({last: "the teacher’s last"} if guided else {}) | {s: "the first step" for s in steps[:1]}
    return dict(sorted(told.items()))


def article(line: dict) -> str:
    """One rollout: question, attempt, the teacher's opinion, reason and phrase, reward and advantage."""
    opinion, right = line.get("opinion"), line.get("attempt_right")
    facts = {"Right answer": shorten(line.get("answer")), "Attempt": "–" if right is None else "right" if right else "wrong",
             "Reward": show(number(line, "reward") or 0.0, ""), "Advantage": f"{number(line, 'advantage') or 0.0:+.2f}"}
    body = part("student", "Student", shorten(line.get("student")))
    if opinion:
        judged = "" if right is None else ", and it is" if (opinion == "correct") == right else ", but it is not"
        body += part("opinion", "Teacher’s opinion", shorten(opinion) + judged)
    if line.get("guidance"):
        body += guidance(line)
    elif opinion:
        body += '<p class="note">Its words did not fit after the attempt and were left out.</p>'
    listed = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    return f'<article><p class="question" dir="auto">{shorten(line.get("question"))}</p><dl>{listed}</dl>{body}</article>\n'


def guidance(line) -> str:
    """The teacher's reason and phrase, each token shaded by its weight."""
    recorded = line.get("guidance_tokens") or [[line["guidance"], None, None]]  # runs from before the tokens were recorded
    try:
        tokens = [(str(text), number({"": w}, ""), number({"": pi}, "")) for text, w, pi in recorded]
    except (TypeError, ValueError):
        raise ValueError(f"transcripts.jsonl, step {line['step']}: guidance_tokens is not a list of [text, w, π]; restore it or "
                         "delete the line") from None
    boundary, spoken, words = len(f"\n\n{line.get('reason') or ''}"), 0, {"reason": "", "phrase": ""}
    for text, w, pi in tokens[: LONGEST // 4]:
        words["reason" if line.get("reason") and spoken < boundary else "phrase"] += shaded(text, w, pi)
        spoken += len(text)
    unlikely = sorted((pi, text.strip(), w) for text, w, pi in tokens if pi < 0.5 and text.strip())[:3]
    said = ", ".join(f"“<bdi>{esc(text)}</bdi>” (π {show(pi, '')}, w {show(w, '')})" for pi, text, w in unlikely)
    return "".join(part(name, f"Teacher’s {name}", text) for name, text in words.items() if text) \
        + (f'<p class="note">Least likely for the student: {said}.</p>' if said else "")


def shaded(text, w, pi) -> str:
    """One token with a class for its weight: the darker, the more the student learns from it."""
    shade = next((i for i, (limit, _) in enumerate(SHADES) if w < limit), "n")  # NaN: no weight
    shown = esc(text).replace("\n", "↵\n" if text.strip() else "↵")
    return f'<span class="w{shade}" title="w {show(w, "")}, π {show(pi, "")}">{shown}</span>' if text else ""


def part(name, title, content) -> str:
    return f'<div class="part {name}"><p class="label">{title}</p><p dir="auto">{content}</p></div>'


def shorten(text) -> str:
    text = str(text if text is not None else "–")
    return esc(text) if len(text) <= LONGEST else f"{esc(text[:LONGEST])} … ({len(text) - LONGEST:,} more characters)"
