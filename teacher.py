"""The teacher: who gets help, asking, parsing, augmenting, and the schedule that sends the teacher home.

The teacher is any language model of the student's size, usually the student's own initial weights, frozen. It reads
the question and the student's attempt, never the gold answer, and its words take their chances in the same reward.
Student and teacher exchange text, never ids: their tokenizers may differ.
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
from run.world import World
from sampler import common_prefix, generate, prefill

if TYPE_CHECKING:  # of the losses this file knows nothing
    from grpo import Rollout


class Feedback(NamedTuple):
    opinion: str  # "correct" or "incorrect"
    reason: str
    phrase: str


Asked = tuple[int, Feedback | None, str]  # which rollout, what came of it, the attempt that was read


def guidance_fraction(step: int, total_steps: int, shape: str = "linear", initial: float = 0.1, minimum: float = 0.01,
                      eps: float = 0.05) -> float:
    """p_s, the share of each group that is guided at `step` (from 0): METHOD section 5. 0.0 once the teacher is off.

    Decays from `initial` to `minimum` over the first third; every shape only falls, so off stays off.
    """
    progress = min(1.0, 3 * step / max(1, total_steps))
    if shape == "constant":
        p = initial
    elif shape == "linear":
        p = initial + (minimum - initial) * progress
    elif shape == "cosine":
        p = minimum + (initial - minimum) * (1 + math.cos(math.pi * progress)) / 2
    elif shape == "exp":
        p = initial * (max(eps, minimum) / initial) ** progress if progress < 1 else minimum
    else:
        raise ValueError(f"unknown schedule {shape!r}: constant, linear, cosine or exp")
    return p if p > eps + 0.01 + 1e-12 else 0.0


def choose(finished: list[bool], group_size: int, fraction: float, rng: random.Random) -> list[int]:
    """Of each question's n finished rollouts pick k = max(1, floor(n p)) without replacement; sorted indices."""
    chosen = []
    for start in range(0, len(finished) if fraction > 0 else 0, group_size):
        eligible = [i for i in range(start, start + group_size) if finished[i]]
        if eligible:
            k = max(1, math.floor(len(eligible) * fraction + 1e-9))
            chosen += rng.sample(eligible, min(k, len(eligible)))
    return sorted(chosen)


def parse_feedback(text: str) -> Feedback | None:
    """The teacher's whole reply, without its end token, or None where it is anything but the three tagged parts.

    Each tag must stand exactly once, so nothing a student wrote can open or close a part of the teacher's.
    """
    parts, rest = [], text
    for tag in ("opinion", "reason", "phrase"):
        if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
            return None
        before, _, rest = rest.partition(f"<{tag}>")
        content, closed, rest = rest.partition(f"</{tag}>")
        if before.strip() or not closed:
            return None
        parts.append(content.strip())
    if rest.strip() or parts[0] not in ("correct", "incorrect") or not parts[1] or not parts[2]:
        return None
    return Feedback(*parts)


class Teacher:
    """A frozen LM that reads (question, attempt) and answers with feedback, decoded greedily.

    `style` "exemplars" puts the system message and four worked exemplars before each request; "tag" is the request
    alone, for the tiny model, which has read the format in pretraining. The exemplars are the same for every request
    and the weights never change, so their keys and values are computed once. The model given is frozen in place.
    `tokenizer` is the teacher's own: it makes the prompts and reads the replies, and the student's ids never meet it.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, *, max_tokens: int = 1024, max_prompt: int = 3072, instruction: str = "",
                 published: frozenset[str] = frozenset(), style: str | None = None, rows: int = 64) -> None:
        self.model, self.tokenizer, self.max_tokens, self.rows = model.eval().requires_grad_(False), tokenizer, max_tokens, rows
        self.max_prompt = min(max_prompt, model.config.max_seq_len - max_tokens)
        if self.max_prompt < 1:
            raise ValueError(f"the teacher's context of {model.config.max_seq_len} tokens has no room for a prompt beside a "
                             f"reply of {max_tokens}; lower --teacher-reply")
        self.instruction, self.published = instruction, published
        self.style = style or ("tag" if tokenizer.family == "wordproblems" else "exemplars")
        self.prefix_ids: list[int] = []
        self.prefix: KVCache | None = None
        self.dropped = self.cut = 0  # requests too long for max_prompt, replies that ran into max_tokens
        if self.style == "exemplars":
            self.prefix_ids = self.prompt("", "")
            if len(self.prefix_ids) > self.max_prompt:
                raise ValueError(f"the teacher's exemplars take {len(self.prefix_ids)} tokens, more than the "
                                 f"{self.max_prompt} its prompt may have: {self.more_room()}")
            self.prefix, _ = prefill(model, [self.prefix_ids])

    def more_room(self) -> str:
        """What to do so that the exemplars fit; `ask` has the last of these three alone."""
        needed, context = len(self.prefix_ids), self.model.config.max_seq_len
        if needed < context - self.max_tokens:
            return f"raise --teacher-prompt well above {needed}"
        longer = "give a teacher with a longer context"
        if needed < context:
            return f"lower --teacher-reply of train well below {context - needed}, or {longer}"
        return longer

    def prompt(self, question: str, response: str) -> list[int]:
        """The one place where a teacher's prompt is made."""
        if self.style == "tag":
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            return self.tokenizer.render(messages, reply_as="teacher")
        question = f"{question} {self.instruction}".strip()  # as the student was asked
        if "instruction" in self.published:  # the published prompt adds it again
            question = f"{question} {self.instruction}"
        messages = [{"role": "system", "content": SYSTEM}]
        for shown_question, attempt, feedback in EXEMPLARS:
            messages += [{"role": "user", "content": REQUEST.format(question=shown_question, response=attempt)},
                         {"role": "assistant", "content": feedback}]
        messages.append({"role": "user", "content": REQUEST.format(question=question, response=response)})
        return self.tokenizer.render(messages)

    def feedback(self, questions: list[str], responses: list[str]) -> list[Feedback | None]:
        """Ask about each attempt (a response without its end token); None where no valid feedback came back."""
        prompts = [self.prompt(q, r) for q, r in zip(questions, responses, strict=True)]
        replies: list[Feedback | None] = [None] * len(prompts)
        fitting = [i for i, p in enumerate(prompts) if len(p) <= self.max_prompt]
        self.dropped += len(prompts) - len(fitting)
        if not fitting:
            return replies
        shared = min(common_prefix(self.prefix_ids, prompts[i][:-1]) for i in fitting)
        prefix = self.prefix if shared else None
        if prefix is not None:
            prefix.set_lengths([shared])
        texts = generate(self.model, [prompts[i][shared:] for i in fitting], max_tokens=self.max_tokens, rows=self.rows,
                         stop=self.tokenizer.stop, temperature=0, prefix=prefix)
        for i, ids in zip(fitting, texts):
            replies[i] = self.parse(ids)
        return replies

    def parse(self, ids: list[int]) -> Feedback | None:
        if "reencode" in self.published:  # the published code cuts at 512 tokens before it looks for tags
            return parse_feedback(self.tokenizer.decode([t for t in ids if t not in self.tokenizer.stop][:512]))
        if ids[-1] not in self.tokenizer.stop:
            self.cut += 1
            return None
        return parse_feedback(self.tokenizer.decode(ids[:-1]))

    def guide(self, rollouts: list[Rollout], student: Tokenizer, group_size: int, fraction: float, rng: random.Random,
              max_tokens: int, world: World = World()) -> list[Asked]:
        """Augment the chosen rollouts in place; returns [(index, feedback or None, the attempt)] of those asked about.

        `student`: the tokenizer of the rollouts, which decodes the attempts and encodes the guidance.
        """
        chosen = choose([r.finished for r in rollouts], group_size, fraction, rng)
        attempts = [student.decode(rollouts[i].response[:-1]) for i in chosen]
        questions = [rollouts[i].question for i in chosen]
        replies = world.gather(self.feedback(world.share(questions), world.share(attempts)))
        for i, feedback in zip(chosen, replies):
            if feedback is not None:
                augment(rollouts[i], feedback, student, max_tokens, self.published)
        return list(zip(chosen, replies, attempts))


def augment(rollout: Rollout, feedback: Feedback, tokenizer: Tokenizer, max_tokens: int,
            published: frozenset[str] = frozenset()) -> bool:
    """o_i without its end token ⊕ "\\n\\n" + reason + "\\n\\n" + phrase + end token, in place of o_i. METHOD step 5.

    `tokenizer` is the student's. Its own ids are kept; the text is what all ids spell, because the reward must read
    what is trained. Longer than max_tokens: nothing changes and False comes back (the published code cuts it off
    there, and with the end token goes the reward). Likewise if the guidance holds a stop token, which some models
    have in their ordinary vocabulary: the response would end there.
    """
    attempt, end = rollout.response[:-1], rollout.response[-1:]
    guidance = f"\n\n{feedback.reason}\n\n{feedback.phrase}"
    added = tokenizer.encode(guidance)
    if not tokenizer.stop.isdisjoint(added):
        return False
    if "reencode" in published:  # ids rebuilt from text are not always the ids that were sampled
        attempt = tokenizer.encode(tokenizer.decode(attempt))
    augmented = attempt + added + end
    if len(augmented) > max_tokens:
        if "cut" not in published:
            return False
        augmented = augmented[:max_tokens]
        rollout.finished = False
    rollout.response, rollout.guided_from, rollout.old_logprobs = augmented, min(len(attempt), len(augmented)), None
    rollout.text = tokenizer.decode([t for t in augmented if t not in tokenizer.stop])
    return True


def make_teacher(model: LM, tokenizer: Tokenizer, config: Config) -> Teacher:
    return Teacher(model, tokenizer, max_tokens=config.teacher_reply, max_prompt=config.teacher_prompt, rows=config.rows,
                   instruction=INSTRUCTION, published=config.published_items)
