"""What a real model's teacher reads before a request: the system message and one worked exemplar of
each reflection behaviour.

The exemplars were written for this program. `behaviour` recognises the four behaviours by their cue
words."""

from __future__ import annotations

# behaviour: words that mark it, in the exemplars below and in the built-in problems' wording
CUES = {
    "self-conflict": ("Wait, that does not fit",),
    "self-critique": ("I was too quick",),
    "self-agreement": ("Yes, I think that is right",),
    "self-consultation": ("would ask if I am sure",),
}


def behaviour(text: str) -> str | None:
    """Which of the four behaviours a text shows first, by its cue words; None if none."""
    found = [(text.find(cue), name) for name, cues in CUES.items() for cue in cues if cue in text]
    return min(found)[1] if found else None


REQUEST = "Question:\n{question}\n\nResponse:\n{response}"
SYSTEM = """You read a question and a response to it, and you continue the response's own train \
of thought. \
You are given no answer key: judge by working it out.

Reply with exactly three parts and nothing around them:
<opinion>correct or incorrect, your judgement of the response's final answer</opinion>
<reason>In the first person, as if you had written the response: what in it holds, or where its \
logic falls short.</reason>
<phrase>Still in the first person: carry the thought on to the solution, step by step, and end \
with the final answer \
in \\boxed{}.</phrase>

How you look back may vary: notice a conflict with the question, agree after checking, imagine \
what a mentor would ask, \
or criticise your own checking."""
# (question, attempt, feedback), one a behaviour: self-conflict, -agreement, -consultation,
# -critique
EXEMPLARS = [
    (
        "A baker fills 6 trays with 12 rolls each. She burns 9 rolls and sells the rest for $2 "
        "apiece. "
        "How many dollars does she take in?",
        "There are 6 * 12 = 72 rolls. At $2 apiece that is 72 * 2 = 144 dollars. The answer is "
        "\\boxed{144}.",
        "<opinion>incorrect</opinion>\n<reason>Wait, that does not fit the question: I sold all "
        "72 rolls, but 9 of them "
        "were burnt and only the rest were sold.</reason>\n<phrase>Let me redo it from the number "
        "of rolls. 72 were baked "
        "and 9 burnt, so 72 - 9 = 63 were sold. At $2 each that is 63 * 2 = 126. So the answer is "
        "\\boxed{126}.</phrase>",
    ),
    (
        "Lena reads 15 pages on each weekday and 40 pages on each day of the weekend. "
        "How many pages does she read in two weeks?",
        "Five weekdays give 5 * 15 = 75 pages and the weekend 2 * 40 = 80, so a week has 155 "
        "pages and two weeks have 310. "
        "The answer is \\boxed{310}.",
        "<opinion>correct</opinion>\n<reason>Yes, I think that is right: weekdays and weekend "
        "were counted apart, and the "
        "week was doubled at the end.</reason>\n<phrase>Let me walk through it again. Weekdays: 5 "
        "* 15 = 75. Weekend: "
        "2 * 40 = 80. One week: 75 + 80 = 155. Two weeks: 2 * 155 = 310. So the answer is "
        "\\boxed{310}.</phrase>",
    ),
    (
        "A tank holds 240 litres. A pump empties 18 litres a minute while a hose adds 6 litres a "
        "minute. "
        "Starting full, after how many minutes is it empty?",
        "The pump takes 18 litres a minute out, so it needs 240 / 18 = 13.3 minutes. The answer "
        "is \\boxed{13.3}.",
        "<opinion>incorrect</opinion>\n<reason>A mentor reading this would ask if I am sure that "
        "the tank loses 18 litres "
        "each minute. I am not: the hose was running all the while, and I left it "
        "out.</reason>\n<phrase>So what would I "
        "tell them? Each minute 18 litres leave and 6 arrive, a loss of 18 - 6 = 12. From 240 "
        "litres that takes "
        "240 / 12 = 20 minutes. So the answer is \\boxed{20}.</phrase>",
    ),
    (
        "Three friends share a bill of $84. Ola pays twice as much as Per, and Per pays the same "
        "as Siv. "
        "How many dollars does Ola pay?",
        "Splitting 84 by 3 gives 28, and twice that is 56. Quick check: 56 is less than 84, fine. "
        "The answer is \\boxed{56}.",
        "<opinion>incorrect</opinion>\n<reason>I was too quick with that check: being less than "
        "84 proves nothing. With 56 "
        "for Ola the others pay 28 each, and 56 + 28 + 28 = 112, which is not the "
        "bill.</reason>\n<phrase>Let me slow down "
        "and verify properly this time. Call Per's share p; then Siv pays p and Ola 2p, so 4p = "
        "84 and p = 21. Ola pays "
        "2 * 21 = 42, and 42 + 21 + 21 = 84 as it should. So the answer is \\boxed{42}.</phrase>",
    ),
]
