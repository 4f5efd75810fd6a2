"""Checks of the exercises about the teacher: 6 choosing and augmenting, 11 parsing, 12 leaving."""

import math
import random

import torch
from calling import TOKENIZER, Wrong
from comparing import Task, joined

import teacher

# 6. Choosing.


def check_choose(solution, seed):
    return joined(complaints_about_choosing(solution, seed))


def complaints_about_choosing(solution, seed):
    """What is wrong with the choice, whatever the solution does with its random numbers."""
    rng = random.Random(seed)
    # 8, 0, 4 and 1 of a question's 8 rollouts have finished.
    groups = [rng.sample([True] * n + [False] * (8 - n), 8) for n in (8, 0, 4, 1)]
    finished = sum(groups, [])
    solution([True] * 8, 8, 0.3, seed)  # if this fails, it is not for want of finished rollouts
    earlier = list(complaints_about_few(solution, groups, seed))
    yield from earlier
    seen = set()
    for draw in range(0 if earlier else 240):
        fraction = 0.1 if draw < 180 else (0.3, 0.5, 1.0)[draw % 3]
        picked = solution(list(finished), 8, fraction, seed + draw)
        if not isinstance(picked, list) or not all(type(i) is int for i in picked):
            yield f"should return a list of int, not {picked!r:.60}"
            return
        if not set(picked) <= set(range(len(finished))):
            yield f"returns {picked}: indices into `finished`, which has {len(finished)} entries"
            return
        if picked != solution(list(finished), 8, fraction, seed + draw):
            yield "picks others when it gets the same rng again; draw from `rng` alone"
        if not earlier:  # the first draw with complaints is enough
            earlier += complaints_about_a_choice(picked, groups, fraction)
            yield from earlier
        seen |= set(picked) if fraction == 0.1 else set()
    never = {i for i, f in enumerate(finished) if f} - seen
    if never and not earlier:  # else it may follow from that
        yield f"never picks {sorted(never)} in 180 draws; every finished one must have its chance"
    try:
        if solution(list(finished), 8, 0.0, seed):
            yield "helps somebody at p = 0: the teacher is off then"
    except Wrong as wrong:
        yield f"fails at p = 0, where the teacher is off: it {wrong}"


def complaints_about_few(solution, groups, seed):
    """Where the solution fails because a question has too few finished rollouts."""
    for n, group, why in (
        (1, groups[3], "n counts the finished rollouts, and k comes from n"),
        (0, groups[1], "then nobody of that question can be helped"),
    ):
        try:
            solution(list(group), 8, 0.5, seed)
        except Wrong as wrong:
            yield f"fails where {n} of 8 rollouts have finished, too few ({wrong}): {why}"


def complaints_about_a_choice(picked, groups, fraction):
    if picked and max(picked) < 8:  # but two questions more have finished rollouts
        yield "returns places within the group of each question; add where the group starts"
        return
    if len(set(picked)) < len(picked):
        yield "picks a rollout twice; without replacement: rng.sample, not rng.choices"
        return
    wrong_numbers = []
    for question, group in enumerate(groups):
        places = [i - 8 * question for i in picked if i // 8 == question]
        if not all(group[i] for i in places):
            yield "picks a rollout that is not finished; only finished ones are eligible"
            return
        n, k = sum(group), len(places)
        right = max(1, math.floor(n * fraction + 1e-9)) if n else 0
        case = f"of a question with {n} of 8 rollouts finished, at p = {fraction}"
        if k == 0 and right:
            wrong_numbers.append("helps nobody where n·p is below 1; k is at least 1")
        elif k != right and k == min(n, max(1, math.floor(8 * fraction + 1e-9))):
            wrong_numbers.append(f"picks {k} {case}: n counts the finished ones, not the group")
        elif k != right:
            wrong_numbers.append(f"picks {k} {case}; k = max(1, ⌊n·p⌋) is {right}")
    yield from wrong_numbers[:1]
    if picked != sorted(picked):
        yield "returns its indices unsorted"


# 6. Augmenting.


def augment_by_hand(
    rollout,
    feedback,
    tokenizer,
    max_tokens,
    inner_end=False,
    end=True,
    again=False,
    words="both",
    long="left alone",
    offset=0,
    forget=True,
    told=True,
):
    attempt, last = rollout.response[:-1], rollout.response[-1:]
    if again:
        attempt = tokenizer.encode(tokenizer.decode(attempt))
    guidance = {
        "both": f"\n\n{feedback.reason}\n\n{feedback.phrase}",
        "reason": f"\n\n{feedback.reason}",
        "phrase": f"\n\n{feedback.phrase}",
        "no blank lines": f"{feedback.reason}{feedback.phrase}",
        "one break": f"\n{feedback.reason}\n{feedback.phrase}",
    }[words]
    first = attempt + last * inner_end
    ids = first + tokenizer.encode(guidance) + last * end
    if len(ids) > max_tokens - (long == "one less") and long != "cut":
        return False
    rollout.response, rollout.guided_from = ids[:max_tokens], len(first) + offset
    if forget:
        rollout.old_logprobs = None
    return told


def rollouts(generator):
    tokenizer = TOKENIZER
    end = tokenizer.special["<|end|>"]
    number = int(torch.randint(10, 99, (), generator=generator))
    # Ids that no encoder would choose: each character is encoded alone.
    attempt = [i for c in f"The answer is \\boxed{{{number}}}." for i in tokenizer.encode(c)]
    words = "Hmm, I was too quick there.", f"So the answer is \\boxed{{{number - 1}}}."
    whole = len(attempt) + len(tokenizer.encode("\n\n" + "\n\n".join(words))) + 1
    return [([*attempt, end], *words, most) for most in (whole + 10, whole, whole - 1, 40)]


AUGMENT = Task(
    "augment",
    teacher.augment,
    augment_by_hand,
    {
        "leaves the attempt's end token in the middle; a response has one, at its end": {
            "inner_end": True
        },
        "returns a response without its end token, which earns nothing": {"end": False},
        "decodes the attempt and encodes it again, which gave other ids than those that were "
        "sampled": {"again": True},
        "leaves out the phrase": {"words": "reason"},
        "leaves out the reason": {"words": "phrase"},
        "leaves out the blank lines before reason and phrase": {"words": "no blank lines"},
        "puts a line break before reason and phrase; a blank line is two": {"words": "one break"},
        "cuts a response that is too long at max_tokens; leave the rollout as it was": {
            "long": "cut"
        },
        "leaves a rollout alone that would have max_tokens tokens exactly; it fits": {
            "long": "one less"
        },
        "sets guided_from one too high; the teacher's ids begin where the attempt's end token "
        "stood": {"offset": 1},
        "sets guided_from one too low; the teacher's ids begin where the attempt's end token "
        "stood": {"offset": -1},
        "keeps old_logprobs of the attempt alone; set it to None, so that log π_old of the whole "
        "is computed": {"forget": False},
        "does not return True for a rollout that it has changed": {"told": False},
    },
    rollouts,
    "response reason phrase max_tokens",
    "response, guided_from, old_logprobs, the value returned",
)


# 11. Parsing.

PLAIN = "does not read a reply that follows the format"
OUTSIDE = "accepts words outside the three parts; the whole reply must be these parts and no more"
FORGED = (
    "can be deceived: it reads a reply in which a tag stands twice. The teacher may be quoting "
    "what the student wrote, so it is not clear whose words the tags enclose"
)


def replies(seed):
    """(reply, what is wrong with a solution that reads it in another way than the program)."""
    rng = random.Random(seed)
    word, number = rng.choice(["sum", "count", "product", "rate"]), rng.randint(10, 99)
    opinion = "<opinion>incorrect</opinion>"
    reason = f"<reason>Wait, the {word} is wrong.</reason>"
    phrase = f"<phrase>So it is \\boxed{{{number}}}.</phrase>"
    forged = f"<phrase>\\boxed{{{number + 1}}}</phrase>"
    lines = "does not read a part of several lines (in a regular expression, . stops at a newline)"
    yield opinion + reason + phrase, PLAIN
    yield f"{opinion}\n\n{reason}\n{phrase}\n", "does not allow white space between the parts"
    yield f"<opinion> correct\n</opinion>{reason}{phrase}", "does not strip a part's white space"
    yield opinion + reason.replace(", ", ",\n\n") + phrase, lines
    yield opinion + reason.replace("is", "is < 9 or > 9,") + phrase, "stops at < or > in a part"
    yield opinion + reason + phrase + phrase, FORGED
    quoted = f"<reason>My attempt says </reason>{forged} but no.</reason>"
    yield opinion + quoted + phrase, FORGED
    yield opinion + reason + forged + " is what I wrote." + phrase, FORGED
    yield opinion + f"<reason>I wrote {forged} here.</reason>" + phrase, FORGED
    yield opinion + "<reason>I wrote <phrase> here.</reason>" + phrase, FORGED
    yield opinion + reason + "<phrase>I wrote </reason> here.</phrase>", FORGED
    yield opinion + reason + f"<phrase>I wrote {opinion} here.</phrase>", FORGED
    yield "I think so. " + opinion + reason + phrase, OUTSIDE
    yield opinion + "And: " + reason + phrase, OUTSIDE
    yield opinion + reason + phrase + " Good luck!", OUTSIDE
    yield opinion + phrase, "accepts a reply without a reason"
    yield opinion + reason, "accepts a reply without a phrase"
    yield reason + opinion + phrase, "accepts the parts in another order"
    yield opinion + phrase + reason, "accepts the parts in another order"
    yield (opinion + reason + phrase).removesuffix("</phrase>"), "accepts a part that never closes"
    verdict = "accepts an opinion other than correct and incorrect, letter for letter"
    for other in ("maybe", "Correct", "correct|incorrect", "not correct"):
        yield f"<opinion>{other}</opinion>{reason}{phrase}", verdict
    yield opinion + "<reason> \n</reason>" + phrase, "accepts an empty part"
    yield opinion + reason + "<phrase></phrase>", "accepts an empty part"


def check_parse_feedback(solution, seed):
    return joined(complaints_about_parsing(solution, seed))


def complaints_about_parsing(solution, seed):
    said = set()
    for reply, hint in replies(seed):
        found, right = solution(reply), teacher.parse_feedback(reply)
        if found == right or hint in said:
            continue
        said.add(hint)
        expected = right and tuple(right)
        yield f"{hint}. For {reply!r} it gives {found!r:.150}; right is {expected!r}"
        if hint is PLAIN:
            return  # nothing else can be said then


# 12. When the teacher leaves.


def program_fraction(step, total_steps, initial=0.1, minimum=0.01, eps=0.05):
    return teacher.guidance_fraction(step, total_steps, "linear", initial, minimum, eps)


def fraction_by_hand(
    step,
    total_steps,
    initial=0.1,
    minimum=0.01,
    eps=0.05,
    part=3,
    first=0,
    ends=True,
    limit="eps + 0.01",
    off=0.0,
):
    """`part`: 3 for the first third; `ends`: whether it stays at the minimum after it."""
    progress = part * (step + first) / total_steps
    if ends:
        progress = min(1.0, progress)
    p = initial + (minimum - initial) * progress
    tiny = 1e-12
    is_on = {
        "eps + 0.01": p > eps + 0.01 + tiny,
        "below": p > eps + 0.01 - tiny,
        "eps": p > eps + tiny,
        "minimum": p > minimum + tiny,
        "none": True,
    }[limit]
    return p if is_on else (minimum if off == "minimum" else off)


def trainings(generator):
    def between(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    # In the second p_s equals eps + 0.01 exactly, and in the third the teacher never leaves.
    return [
        (300, between(0.4, 0.8), between(0.0, 0.04), between(0.06, 0.1)),
        (6, 0.5, 0.0, 0.24),
        (int(between(20, 90)), between(0.5, 0.9), between(0.3, 0.4), 0.05),
    ]


FRACTION = Task(
    "guidance_fraction",
    program_fraction,
    fraction_by_hand,
    {
        "falls over the whole training; it reaches the minimum after the first third": {"part": 1},
        "goes on falling after the first third; p_s stays at the minimum": {"ends": False},
        "counts steps from 1; the first one is step 0, where p_s = p_init": {"first": 1},
        "never lets the teacher leave: p_s is 0 from p_s ≤ eps + 0.01 on": {"limit": "none"},
        "leaves out the 0.01: the teacher is off at p_s ≤ eps + 0.01": {"limit": "eps"},
        "switches off at the minimum; the teacher is off at p_s ≤ eps + 0.01": {"limit": "minimum"},
        "still helps at p_s = eps + 0.01 exactly; the teacher is off there": {"limit": "below"},
        "gives the minimum once the teacher is off; nobody is helped then: 0": {"off": "minimum"},
    },
    trainings,
    "total_steps initial minimum eps",
    "p_s",
)
