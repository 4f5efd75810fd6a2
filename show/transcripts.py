"""A few rollouts of each step as text, with the weight of each of the teacher's tokens: the lines of transcripts.jsonl."""

from __future__ import annotations

import torch

from data.reward import is_correct
from grpo import shaped_ratio


def transcripts(rollouts, asked, tokenizer, step, config, most=3) -> list[dict]:
    """A few of the step's rollouts as text: guided ones first, the student's part and the teacher's apart."""
    picked = [i for i, f, _ in asked if f is not None][: most - 1]
    picked += [i for i in range(len(rollouts)) if i not in picked][: most - len(picked)]
    replies = {i: f for i, f, _ in asked}
    lines = []
    for i in picked:
        r, f = rollouts[i], replies.get(i)
        own = tokenizer.decode(r.response if r.guided_from is None else r.response[: r.guided_from])
        guidance = "" if r.guided_from is None else tokenizer.decode(r.response[r.guided_from :])
        lines.append({"step": step, "question": r.question, "answer": r.answer, "student": own,
                      "attempt_right": is_correct(own, r.answer), "guidance": guidance, "opinion": f and f.opinion,
                      "reason": f and f.reason, "phrase": f and f.phrase, "reward": r.reward, "advantage": r.advantage,
                      "guidance_tokens": guidance_tokens(r, tokenizer, config)})
    return lines


def guidance_tokens(rollout, tokenizer, config) -> list[list]:
    """[text, w, π_old] of each of the teacher's tokens; w is None where AAS does not weigh it: guard (c), other shapings.

    The texts add up to the guidance: a character spelt by several tokens stands with the last of them.
    """
    if rollout.guided_from is None:
        return []
    start, lines, waiting = rollout.guided_from, [], []
    logprobs, advantage = torch.tensor([rollout.old_logprobs[start:]]), torch.tensor([[rollout.advantage]])
    w = shaped_ratio(logprobs, advantage, config.guards, gamma_min=config.gamma_min, gamma_max=config.gamma_max,
                     published="gamma" in config.published_items)
    for token, weight, pi in zip(rollout.response[start:], w[0].tolist(), logprobs[0].exp().tolist()):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd")  # or else half a character: wait for the rest
        weighed = config.shaping == "aas" and not (rollout.advantage < 0 and pi < config.unlikely)
        lines.append([text if whole else "", round(weight, 4) if weighed else None, round(pi, 4)])
        waiting = [] if whole else waiting
    if waiting:
        lines[-1][0] = tokenizer.decode(waiting)  # bytes that never became a character
    return lines
