"""The teacher: who gets help and until when, asking, parsing, augmenting.

The teacher is any language model of the student's size, usually the student's own initial weights,
frozen. It reads the question and the student's attempt, never the gold answer. The same reward
decides about its words as about the student's. Student and teacher exchange text, never ids, so
their tokenizers may differ.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple

from data.exemplars import EXEMPLARS, REQUEST, SYSTEM
from data.prompts import INSTRUCTION
from data.tokenizer import Tokenizer
from model import LM, KVCache
from run.config import Config
from sampler import common_prefix, generate, prefill

if TYPE_CHECKING:  # this file knows nothing of losses
    from grpo import Rollout


class Feedback(NamedTuple):
    opinion: str  # "correct" or "incorrect"
    reason: str  # what was right, or where the logic falls short
    phrase: str  # the thought carried on, to a final answer


# Who gets help, and for how long.


def guidance_fraction(
    step: int,
    total_steps: int,
    shape: str = "linear",
    initial: float = 0.1,  # p_init
    minimum: float = 0.01,  # p_min
    eps: float = 0.05,
) -> float:
    """p_s: the share of a group's finished rollouts to be helped at `step`, which counts from 0.

    It falls from `initial` to `minimum` over the first third of the steps, and is 0.0 once the
    teacher is off. No shape rises while minimum <= initial (Config checks this), so a teacher that
    is off stays off. Raises ValueError for an unknown shape.
    """
    progress = min(1.0, 3 * step / max(1, total_steps))  # x: 1 from the end of the first third
    if shape == "constant":
        p = initial
    elif shape == "linear":
        p = initial + (minimum - initial) * progress  # p_init + (p_min − p_init)·x
    elif shape == "cosine":
        # p_min + (p_init − p_min)·(1 + cos πx) / 2
        p = minimum + (initial - minimum) * (1 + math.cos(math.pi * progress)) / 2
    elif shape == "exp":
        # p_init·(end/p_init)^x, the same factor each step; after the third p_min.
        end = max(eps, minimum)
        p = initial * (end / initial) ** progress if progress < 1 else minimum
    else:
        raise ValueError(f"unknown schedule {shape!r}: constant, linear, cosine or exp")
    is_on = p > eps + 0.01 + 1e-12  # the paper: off when p_s <= eps + 0.01, up to rounding
    return p if is_on else 0.0


def choose(finished: list[bool], group_size: int, fraction: float, rng: random.Random) -> list[int]:
    """Which rollouts to ask about: sorted indices into `finished` (Q * G), question-major.

    Of each question's n finished rollouts k = max(1, ⌊n·p⌋) are drawn without replacement.
    Nobody is chosen where `fraction` is 0.
    """
    chosen: list[int] = []
    if fraction <= 0:
        return chosen
    for start in range(0, len(finished), group_size):
        # n of them. A response that was cut off could not be continued.
        eligible = [i for i in range(start, start + group_size) if finished[i]]
        if eligible:
            # The 1e-9 is for ⌊100·0.29⌋ and its like: the product is rounded to 28.999….
            k = max(1, math.floor(len(eligible) * fraction + 1e-9))
            chosen += rng.sample(eligible, k)
    return sorted(chosen)


def choose_rollouts(
    rollouts: list[Rollout], group_size: int, fraction: float, seed: int, step: int
) -> list[Rollout]:
    """`choose` with random numbers that belong to each question, whoever works on it.

    One process and several therefore choose alike.
    """
    chosen = []
    for start in range(0, len(rollouts), group_size):
        group = rollouts[start : start + group_size]
        # Seeded with a text, because a tuple's hash is another one in each process.
        rng = random.Random(f"choosing {seed} {step} {group[0].question}")
        finished = [rollout.finished for rollout in group]
        chosen += [group[i] for i in choose(finished, group_size, fraction, rng)]
    return chosen


# Asking.


class Teacher:
    """A frozen LM that reads (question, attempt) and answers with feedback, decoded greedily.

    `exemplars` puts the system message and four worked exemplars before each request; the tiny
    model never gets them. `tokenizer` is the teacher's own. The model given is frozen in place.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 1024,
        max_prompt: int = 3072,
        exemplars: bool = True,
        rows: int = 64,
    ) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.max_tokens, self.rows = max_tokens, rows
        self.max_prompt = min(max_prompt, model.config.max_seq_len - max_tokens)
        if self.max_prompt < 1:
            raise ValueError(
                f"the teacher's context of {model.config.max_seq_len} tokens has no room for a "
                f"prompt beside a reply of {max_tokens}; lower --teacher-reply"
            )
        self.is_tiny = tokenizer.family == "wordproblems"
        self.exemplars = EXEMPLARS if exemplars and not self.is_tiny else []
        self.dropped = 0  # requests longer than max_prompt
        self.cut = 0  # replies that ran into max_tokens
        self.prefix_ids: list[int] = []
        self.prefix: KVCache | None = None
        if self.exemplars:
            self.remember_exemplars()

    def remember_exemplars(self) -> None:
        """Keep the exemplars' keys and values, because the weights never change."""
        self.prefix_ids = self.prompt("", "")  # an empty request has what every prompt begins with
        if len(self.prefix_ids) > self.max_prompt:
            raise ValueError(
                f"the teacher's exemplars take {len(self.prefix_ids)} tokens, more than the "
                f"{self.max_prompt} its prompt may have: {self.more_room()}"
            )
        self.prefix, _ = prefill(self.model, [self.prefix_ids])

    def more_room(self) -> str:
        """What makes room for the exemplars. The command `ask` needs no flag: it gives all room."""
        needed, context = len(self.prefix_ids), self.model.config.max_seq_len
        if needed < context - self.max_tokens:
            return f"raise --teacher-prompt well above {needed}"
        longer = "give a teacher with a longer context"
        if needed < context:
            return f"lower --teacher-reply of train well below {context - needed}, or {longer}"
        return longer

    def prompt(self, question: str, attempt: str) -> list[int]:
        """The ids of a request. This is the one place where a teacher's prompt is made."""
        if self.is_tiny:
            question_and_attempt = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": attempt},
            ]
            return self.tokenizer.render(question_and_attempt, reply_as="teacher")
        messages = [{"role": "system", "content": SYSTEM}] if self.exemplars else []
        for shown_question, shown_attempt, feedback in self.exemplars:
            request = REQUEST.format(question=shown_question, response=shown_attempt)
            messages.append({"role": "user", "content": request})
            messages.append({"role": "assistant", "content": feedback})
        asked = f"{question} {INSTRUCTION}"  # as the student was asked
        request = REQUEST.format(question=asked, response=attempt)
        messages.append({"role": "user", "content": request})
        return self.tokenizer.render(messages)

    def ask(self, questions: list[str], attempts: list[str]) -> list[str]:
        """The reply to each attempt as text, without its end token.

        "" where the request was longer than max_prompt or the reply ran into max_tokens; `dropped`
        and `cut` count these.
        """
        # q and o_i are all that it gets: the answer y is not even at hand here.
        prompts = [self.prompt(q, o) for q, o in zip(questions, attempts, strict=True)]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.max_prompt]
        self.dropped += len(prompts) - len(fitting)
        replies = [""] * len(prompts)
        for i, ids in zip(fitting, self.generate([prompts[i] for i in fitting])):
            if ids[-1] in self.tokenizer.stop:
                replies[i] = self.tokenizer.decode(ids[:-1])
            else:
                self.cut += 1
        return replies

    def ask_about(self, rollouts: list[Rollout]) -> list[str]:
        """`ask` about the attempts of these rollouts, and mark that they were asked about."""
        for rollout in rollouts:
            rollout.asked = True
        return self.ask([r.question for r in rollouts], [r.attempt for r in rollouts])

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy replies; what the prompts share with the exemplars is not computed again."""
        if not prompts:
            return []
        # Without its last token, because each prompt must have one left to compute.
        shared = min(common_prefix(self.prefix_ids, prompt[:-1]) for prompt in prompts)
        if self.prefix is not None:
            self.prefix.set_lengths([shared])  # forgets where the empty request went on
        replies: list[list[int]] = generate(
            self.model,
            [prompt[shared:] for prompt in prompts],
            max_tokens=self.max_tokens,
            rows=self.rows,
            stop=self.tokenizer.stop,
            temperature=0,  # greedy
            prefix=self.prefix if shared else None,
        )
        return replies

    def feedback(self, questions: list[str], responses: list[str]) -> list[Feedback | None]:
        """Ask about each response (without its end token); None where no valid reply came."""
        return [parse_feedback(reply) for reply in self.ask(questions, responses)]


def make_teacher(model: LM, tokenizer: Tokenizer, config: Config) -> Teacher:
    """The teacher with a run's settings."""
    return Teacher(
        model,
        tokenizer,
        max_tokens=config.teacher_reply,
        max_prompt=config.teacher_prompt,
        exemplars=config.exemplars,
        rows=config.rows,
    )


# Parsing and augmenting.


def parse_feedback(text: str) -> Feedback | None:
    """A whole reply without its end token -> its three tagged parts; None if it is not these alone.

    Each tag must stand exactly once, so nothing that a student wrote, and the teacher quotes, can
    open or close a part.
    """
    parts, rest = [], text
    for tag in ("opinion", "reason", "phrase"):
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return None
        before, _, rest = rest.partition(opening)
        content, closed, rest = rest.partition(closing)
        if before.strip() or not closed:  # words between the parts, or tags out of order
            return None
        parts.append(content.strip())
    opinion, reason, phrase = parts
    if rest.strip() or opinion not in ("correct", "incorrect") or not reason or not phrase:
        return None
    return Feedback(opinion, reason, phrase)


def augment(rollout: Rollout, feedback: Feedback, tokenizer: Tokenizer, max_tokens: int) -> bool:
    """Put ô_i in the place of o_i: o_i, a blank line, the reason, a blank line, the phrase.

    `tokenizer` is the student's. The ids that it sampled are kept, and the text becomes what all
    the ids spell, because the reward must read what is trained. Nothing changes, and False comes
    back, where ô_i is longer than max_tokens, or where the guidance holds a stop token: the
    response would end there.
    """
    own, end = rollout.response[:-1], rollout.response[-1:]  # o_i without its end token; that token
    guidance = f"\n\n{feedback.reason}\n\n{feedback.phrase}"
    added = tokenizer.encode(guidance)
    augmented = own + added + end  # ô_i
    if len(augmented) > max_tokens or not tokenizer.stop.isdisjoint(added):
        return False
    rollout.response, rollout.guided_from = augmented, len(own)  # the end token is guided too
    rollout.old_logprobs = None  # π_old of the teacher's words is not known yet
    rollout.text = tokenizer.decode(augmented[:-1])
    return True
