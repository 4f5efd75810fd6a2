"""The lines of transcripts.jsonl: a few rollouts of each step, with their tokens' weights."""

from __future__ import annotations

from typing import Any

import torch

from data.reward import is_correct
from data.tokenizer import Tokenizer
from grpo import LossSettings, Rollout, shaped_ratio, too_unlikely_to_push_down


def transcripts(
    rollouts: list[Rollout], tokenizer: Tokenizer, step: int, settings: LossSettings, most: int = 3
) -> list[dict[str, Any]]:
    """A few of the step's rollouts as text, those first on which the teacher's reply was parsed."""
    parsed = [r for r in rollouts if r.feedback is not None][: most - 1]
    others = [r for r in rollouts if r not in parsed][: most - len(parsed)]
    return [transcript(r, tokenizer, step, settings) for r in parsed + others]


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
    w = shaped_ratio(
        logprobs,
        advantage,
        settings.guards,
        gamma_min=settings.gamma_min,
        gamma_max=settings.gamma_max,
        published=settings.published_gamma,
    )
    pi = logprobs.exp()
    weighed = ~too_unlikely_to_push_down(advantage, pi, settings.unlikely)
    lines: list[list[Any]] = []
    waiting: list[int] = []
    for i, token in enumerate(rollout.response[start:]):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        is_whole = not text.endswith("\ufffd")  # half a character waits for the rest
        has_weight = settings.shaping == "aas" and bool(weighed[0, i])
        weight = round(w[0, i].item(), 4) if has_weight else None
        lines.append([text if is_whole else "", weight, round(pi[0, i].item(), 4)])
        if is_whole:
            waiting = []
    if waiting:
        lines[-1][0] = tokenizer.decode(waiting)  # bytes that never became a character
    return lines
