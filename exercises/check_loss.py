"""Checks of the exercises about the loss: 1 advantages, 4 clipping, 5 shaping, 9 the token mean."""

import torch
from comparing import Task

import grpo

# 1. Group advantages.


def z_scores(rewards, dim=1, others=False, correction=1, power=1, eps=1e-6):
    """`others`: the mean leaves r_i out; `power`: of the std that divides."""
    centred = rewards - rewards.mean(dim, keepdim=True)
    if others:
        G = rewards.shape[1]
        centred = centred * G / (G - 1)
    return centred / (rewards.std(dim, correction=correction, keepdim=True) ** power + eps)


def groups(generator):
    rewards = torch.rand(3, 5, generator=generator)
    right = torch.rand(4, generator=generator).argsort()  # 1, or more, in a random order
    return [(rewards,), (torch.stack((right.eq(0), right.lt(4), right.gt(4), right.lt(3))) * 1.0,)]


ADVANTAGES = Task(
    "group_advantages",
    grpo.group_advantages,
    z_scores,
    {
        "divides by a standard deviation over n; the paper's is that of a sample, over n − 1 "
        "(torch's default)": {"correction": 0},
        "takes mean and std over all questions together; each row is a group of its own (dim=1, "
        "keepdim=True)": {"dim": None},
        "takes mean and std down the columns; a group is a row (dim=1)": {"dim": 0},
        "gives nan where all rewards of a group are equal: 0/0. Add 1e-6 to the std": {"eps": 0},
        "subtracts the group's mean and leaves it at that, as Dr. GRPO does; divide by the group's "
        "std as well": {"power": 0},
        "divides by the variance; divide by its root, the std": {"power": 2},
        "subtracts the mean of the other rollouts and divides by no std: this is RLOO, the "
        "leave-one-out baseline. It is another estimator: its baseline does not contain r_i, and "
        "no std scales it. GRPO subtracts the mean of all G rewards, r_i among them, and divides "
        "by their std": {"others": True, "power": 0},
        "leaves r_i out of the mean (leave-one-out, as RLOO does); GRPO's mean is of all G": {
            "others": True
        },
    },
    groups,
    "rewards",
    "advantages",
    close=1e-4,
)


# 4. PPO-clip.


def clipped(
    ratio,
    advantages,
    clip=0.2,
    dual_clip=3.0,
    larger=torch.maximum,
    terms="both",
    bound="of −Â",
    where="bad",
    side=torch.minimum,
    sign=1,
):
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = {"both": larger(unclipped, limited), "ρ": unclipped, "clip": limited}[terms]
    most = -advantages * dual_clip if bound == "of −Â" else torch.tensor(dual_clip)
    here = {"bad": advantages < 0, "all": advantages < torch.inf, "none": advantages > torch.inf}
    return sign * torch.where(here[where], side(loss, most), loss)


def ratios(generator):
    def near(numbers):
        numbers = torch.tensor(numbers)
        return numbers * (1 + 0.01 * torch.rand(numbers.shape, generator=generator))

    ratio = near([[0.1, 0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 1.5, 2.9, 3.1, 5.0]] * 5)
    advantages = near([[2.0], [0.5], [0.0], [-0.5], [-2.0]])
    return [(ratio, advantages, 0.2, 3.0), (ratio, advantages.expand(5, 11), 0.1, 2.0)]


CLIPPED = Task(
    "clipped_loss",
    lambda *arguments: grpo.clipped_loss(*arguments)[0],
    clipped,
    {
        "leaves out the dual clip: where Â < 0 the loss is at most −Â·c": {"where": "none"},
        "takes the larger of ℓ and −Â·c where Â < 0. The dual clip bounds a loss from above: take "
        "the smaller one": {"side": torch.maximum},
        "bounds every loss by −Â·c; only where Â < 0": {"where": "all"},
        "bounds by c; the bound is −Â·c": {"bound": "c"},
        "takes the smaller of the two losses; it is the larger one that is pessimistic": {
            "larger": torch.minimum
        },
        "has the wrong sign: this is what a policy maximises; a loss is minimised": {"sign": -1},
        "clips ρ always; the larger of the clipped and the plain loss counts, so that a wrong "
        "move can be undone": {"terms": "clip"},
        "does not clip ρ": {"terms": "ρ"},
    },
    ratios,
    "ratio advantages clip dual_clip",
    "losses",
    elementwise=True,
)


# 5. Advantage-Aware Shaping.


def weight(logprobs, advantages, held="all", guards="right", ends="kept", sign=1, log=False):
    """`held`: which π of the denominator are sg(π)."""
    gamma = 0.001 - 0.002 * (4 - sign * advantages) / 8
    if ends != "free":
        gamma = gamma.clamp(*{"kept": (-0.001, 0.001), "swapped": (0.001, -0.001)}[ends])
    pi = logprobs if log else logprobs.exp()
    sg = pi.detach()
    denominator = (sg if held in ("all", "w") else pi) + gamma
    guarded = sg if held in ("all", "guards", "w") else pi
    below, above = denominator < 0, denominator > 1
    if guards == "bare":
        denominator = torch.where(below, 1.0001, torch.where(above, 0.9999, denominator))
    elif guards == "right":
        denominator = torch.where(below, 1.0001 * guarded, denominator)
        denominator = torch.where(above, 0.9999 * guarded, denominator)
    w = pi / denominator
    if guards == "constant":
        w = torch.where(below, 1 / 1.0001, torch.where(above, 1 / 0.9999, w))
    return w.detach() if held == "w" else w


def rare_and_likely(generator):
    def near(numbers, by):
        numbers = torch.tensor(numbers, dtype=torch.float64)
        return numbers * (1 - by * torch.rand(numbers.shape, generator=generator))

    pi = near([1e-6, 3e-4, 6e-4, 0.0015, 0.004, 0.01, 0.3, 0.8], 0.05)
    pi = torch.cat((pi, near([0.99998], 1e-5)))
    advantages = near([[-7.0], [-3.0], [-1.0], [0.0], [1.0], [3.0], [7.0]], 0.05)
    return [(pi.log().repeat(7, 1), advantages)]


SHAPED = Task(
    "shaped_ratio",
    lambda logprobs, advantages: grpo.shaped_ratio(logprobs, advantages),
    weight,
    {
        "detaches nothing. The denominator has sg(π_θ): π without its gradient, "
        "logprobs.detach().exp()": {"held": "none"},
        "lets the gradient run through sg(π) + γ, too; there π is sg(π): detach it": {
            "held": "guards"
        },
        "has no gradient: only the denominator is detached": {"held": "w"},
        "makes w a constant where a guard holds, so it has no gradient there. The guards change "
        "the denominator alone: π_θ/(1.0001·sg(π)), π_θ/(0.9999·sg(π))": {"guards": "constant"},
        "makes the guarded denominator 1.0001 or 0.9999 itself; it is that times sg(π)": {
            "guards": "bare"
        },
        "lets γ grow beyond its ends where |Â| > 4; keep it between −0.001 and 0.001": {
            "ends": "free"
        },
        "has a γ of −0.001 whatever Â is: clamp with min above max returns max. The published "
        "code has this slip": {"ends": "swapped"},
        "has γ the wrong way round: good rollouts (Â > 0) have the positive γ": {"sign": -1},
        "leaves out the guards: see what w is where sg(π) + γ < 0": {"guards": "none"},
        "computes with log π where π is meant: exp first": {"log": True},
    },
    rare_and_likely,
    "logprobs advantages",
    "w, the gradient of w by log π",
    close=1e-6,
    elementwise=True,
)


# 9. The token mean under gradient accumulation.


def program_mean(batches, forward):
    """As grpo.update does it; in the program, token_losses has set ℓ to 0 outside the mask."""
    tokens = sum(int(mask.sum()) for _, mask in batches)
    rollouts, loss = sum(len(mask) for _, mask in batches), 0.0
    for inputs, mask in batches:
        part = grpo.mean_loss(forward(inputs) * mask, mask, tokens, rollouts, grpo.LossSettings())
        part.backward()
        loss += part.item()
    return loss


def token_mean(batches, forward, unit="tokens", padding=False, backward="each", told="sum"):
    """`unit`: what has the same weight in the mean."""
    total = sum(mask.sum() for _, mask in batches)
    rows, places = sum(len(mask) for _, mask in batches), sum(mask.numel() for _, mask in batches)
    parts = []
    for inputs, mask in batches:
        losses = forward(inputs) * (1 if padding else mask)
        divisor = {
            "tokens": total,
            "batches": len(batches) * mask.sum(),
            "one each": mask.sum(),
            "rows": rows * mask.sum(1, keepdim=True),
            "places": places,
            "none": 1,
        }[unit]
        parts.append((losses / divisor).sum())
        if backward == "each":
            parts[-1].backward()
    if backward == "once":
        sum(parts).backward()
    return parts[-1].item() if told == "last" else sum(part.item() for part in parts)


def micro_batches(generator):
    def batch(B, T, width=4):
        mask = torch.rand(B, T, generator=generator) < 0.7
        mask[:, 0], mask[0, -1] = True, False
        features = torch.randn(B, T, width, generator=generator, dtype=torch.float64)
        return features, mask

    weights = torch.randn(4, generator=generator, dtype=torch.float64)
    return [(weights, [batch(2, 3), batch(3, 7), batch(1, 5)]), (weights, [batch(2, 4)])]


TOKEN_MEAN = Task(
    "accumulate",
    program_mean,
    token_mean,
    {
        "takes the mean of the micro-batches' means, so a token of a small micro-batch weighs "
        "more; divide each sum by the tokens of all micro-batches": {"unit": "batches"},
        "adds the micro-batches' means up; divide each sum by the tokens of all micro-batches": {
            "unit": "one each"
        },
        "gives each rollout the same weight, as DeepSeekMath's GRPO does, so a token of a short "
        "one weighs more; in a token mean each token weighs the same": {"unit": "rows"},
        "divides by the padding, too; count the tokens where mask is True": {"unit": "places"},
        "gives the sum; divide by the number of tokens": {"unit": "none"},
        "adds the losses of padding; only those where mask is True count": {"padding": True},
        "calls backward() once, at the end: until then every micro-batch's pass is kept, and no "
        "memory is saved. Call it in each micro-batch": {"backward": "once"},
        "calls no backward(), so there is no gradient": {"backward": "never"},
        "returns the last micro-batch's part; the loss is the sum of all parts": {"told": "last"},
    },
    micro_batches,
    "weights batches",
    "the gradient, the loss, the number of passes kept at once",
    close=1e-8,
)
