"""Transcripts: the lines of transcripts.jsonl, and how the report's page shows them.

Training writes a few rollouts of each step, with their tokens' weights. Texts in them come from
models and files, so each passes through `esc` on its way into the page.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections import Counter
from operator import itemgetter
from typing import Any

import torch

from data.reward import is_correct
from data.tokenizer import Tokenizer
from data.wordproblems import LINE, NAMES
from grpo import LossSettings, Rollout, guard_c, guided_loss
from show.charts import as_float, esc, format_value, number

NAMED = re.compile(r"look at (\w+)")  # as the built-in problems' reflections name a line
MARKED = """<p>In the attempts, <mark>the line that the reflection names</mark> is marked
and underlined.</p>"""
LONGEST_TEXT = 6_000  # characters on the page
SHADES = (0.5, 0.9, 0.99, 1.01)  # limits of w: the darker, the more the student learns from a token


def transcripts(
    rollouts: list[Rollout], tokenizer: Tokenizer, step: int, settings: LossSettings, most: int = 3
) -> list[dict[str, Any]]:
    """A few of the step's rollouts as text: first some whose feedback was parsed, then others.

    Rollouts with a large |Â| come before others, because they teach most. The others are of
    different questions, as far as there are enough.
    """
    ranked = sorted(rollouts, key=lambda r: -abs(r.advantage))
    shown = [r for r in ranked if r.feedback is not None][: most - 1]
    while len(shown) < min(most, len(rollouts)):
        times = Counter(r.question for r in shown)
        rest = [r for r in ranked if not any(r is other for other in shown)]
        shown.append(min(rest, key=lambda r: times[r.question]))
    return [transcript(r, tokenizer, step, settings) for r in shown]


def transcript(
    rollout: Rollout, tokenizer: Tokenizer, step: int, settings: LossSettings
) -> dict[str, Any]:
    """One line of transcripts.jsonl."""
    start = len(rollout.response) if rollout.guided_from is None else rollout.guided_from
    own = tokenizer.decode(rollout.response[:start])
    opinion, reason, phrase = rollout.feedback or (None, None, None)
    return {
        "step": step,
        "question": rollout.question,
        "answer": rollout.answer,
        "student": own,
        "attempt_right": is_correct(own, rollout.answer),
        "guidance": tokenizer.decode(rollout.response[start:]),
        "opinion": opinion,
        "reason": reason,
        "phrase": phrase,
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "guidance_tokens": guidance_tokens(rollout, tokenizer, settings),
    }


def guidance_tokens(
    rollout: Rollout, tokenizer: Tokenizer, settings: LossSettings
) -> list[list[Any]]:
    """[text, w, π_old] of each of the teacher's tokens; w is None where AAS does not weigh it.

    That is so by guard (c) and with other shapings. The texts add up to the guidance: a character
    spelt by several tokens stands with the last of them.
    """
    if rollout.guided_from is None or rollout.old_logprobs is None:
        return []
    start = rollout.guided_from
    logprobs = torch.tensor([rollout.old_logprobs[start:]])  # (1, T)
    advantage = torch.tensor([[rollout.advantage]])
    _, w = guided_loss(logprobs, advantage, settings)
    pi = logprobs.exp()
    weighed = ~guard_c(advantage, pi, settings.unlikely)
    lines: list[list[Any]] = []
    waiting: list[int] = []
    for i, token in enumerate(rollout.response[start:]):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        is_whole = not text.endswith("\ufffd")  # half a character waits for the rest
        has_weight = w is not None and settings.shaping == "aas" and bool(weighed[0, i])
        weight = round(w[0, i].item(), 4) if has_weight else None
        lines.append([text if is_whole else "", weight, round(pi[0, i].item(), 4)])
        if is_whole:
            waiting = []
    if waiting:
        lines[-1][0] = tokenizer.decode(waiting)  # bytes that never became a character
    return lines


# On the report's page.


def section(groups, room: int) -> str:
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
    if any("<mark>" in texts for texts in articles.values()):
        content += MARKED
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
        last = max(guided)
        alone = [step for step in steps if step > last]
        told |= {step: "the first on its own" for step in alone[:1]}
        told[last] = "the teacher’s last"
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
        "The student alone": "right" if line.get("attempt_right") else "wrong",
        "Reward": format_value(number(line, "reward") or 0.0, ""),
        "Advantage": f"{number(line, 'advantage') or 0.0:+.2f}",
    }
    listed = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    body = labelled("student", "Student", student_words(line))
    if line.get("opinion"):
        body += labelled("opinion", "Teacher’s opinion", shorten(line["opinion"]))
    if line.get("guidance"):
        body += guidance(line)
    elif line.get("opinion"):
        body += '<p class="note">Its words did not fit after the attempt.</p>'
    question = f'<p class="question" dir="auto">{shorten(line.get("question"))}</p>'
    return f"<article>{question}<dl>{listed}</dl>{body}</article>\n"


def student_words(line: dict) -> str:
    """In the built-in problems the attempt's line that the reflection names is marked.

    The reflection is the student's own or the teacher's.
    """
    text, guided = line.get("student"), line.get("guidance")
    if not isinstance(text, str) or len(text) > LONGEST_TEXT or not is_built_in(line):
        return shorten(text)
    attempt, blank_line, own = text.partition("\n\n")
    reflection = f"{own} {line.get('reason') if guided else ''}"
    return marked(attempt, set(NAMED.findall(reflection))) + esc(blank_line + own)


def is_built_in(line: dict) -> bool:
    question = str(line.get("question"))
    name = question.partition(" ")[0]
    return name in NAMES and question.endswith(f" does {name} have now?")


def marked(attempt: str, weekdays: set[str]) -> str:
    shown, end = "", 0
    for found in LINE.finditer(attempt):
        if found[1] in weekdays:
            shown += f"{esc(attempt[end : found.start()])}<mark>{esc(found[0])}</mark>"
            end = found.end()
    return shown + esc(attempt[end:])


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
