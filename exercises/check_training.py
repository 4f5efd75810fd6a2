"""Checks of the exercises about training: 1, advantages; 4 and 5, the loss; 6, choosing and augmenting."""

import math
import random

import torch
from comparing import compare

import grpo
import teacher
from data.tokenizer import Tokenizer

# 1. Group advantages.


def check_group_advantages(solution):
    generator = torch.Generator().manual_seed(1)
    cases = [
        (torch.rand(3, 4, generator=generator),),
        (torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),),
    ]
    return compare(
        solution,
        grpo.group_advantages,
        cases,
        {
            "divides by a standard deviation over n; the paper's is that of a sample, over n − 1 (torch's default)": lambda r: (
                (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6)
            ),
            "takes mean and std over all questions together; each row is a group of its own (dim=1, keepdim=True)": lambda r: (
                (r - r.mean()) / (r.std() + 1e-6)
            ),
            "takes mean and std down the columns; a group is a row (dim=1)": lambda r: (
                (r - r.mean(0)) / (r.std(0) + 1e-6)
            ),
            "gives nan where all rewards of a group are equal: 0/0. Add 1e-6 to the std": lambda r: (
                (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True)
            ),
            "subtracts the group's mean and leaves it at that; divide by the group's std as well": lambda r: (
                r - r.mean(1, keepdim=True)
            ),
            "divides by the variance; divide by its root, the std": lambda r: (
                (r - r.mean(1, keepdim=True)) / (r.var(1, keepdim=True) + 1e-6)
            ),
        },
        ["advantages"],
        close=1e-4,
    )


# 4. PPO-clip.


def check_clipped_loss(solution):
    ratio = torch.tensor([[0.1, 0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 1.5, 2.9, 3.1, 5.0]]).repeat(5, 1)
    advantages = torch.tensor([[2.0], [0.5], [0.0], [-0.5], [-2.0]])

    def right(r, a, e, c):
        return grpo.clipped_loss(r, a, e, c)[0]

    def single(r, a, e, c):
        return torch.maximum(-a * r, -a * r.clamp(1 - e, 1 + e))

    def dual(loss, a, c):
        return torch.where(a < 0, torch.minimum(loss, -a * c), loss)

    return compare(
        solution,
        right,
        [(ratio, advantages, 0.2, 3.0), (ratio, advantages.expand(5, 11), 0.1, 2.0)],
        {
            "leaves out the dual clip: where Â < 0 the loss is at most −Â·c": single,
            "bounds every loss by −Â·c; only where Â < 0": lambda r, a, e, c: torch.minimum(
                single(r, a, e, c), -a * c
            ),
            "bounds by c; the bound is −Â·c": lambda r, a, e, c: torch.where(
                a < 0, single(r, a, e, c).clamp(max=c), single(r, a, e, c)
            ),
            "takes the smaller of the two losses; it is the larger one that is pessimistic": lambda r, a, e, c: (
                dual(torch.minimum(-a * r, -a * r.clamp(1 - e, 1 + e)), a, c)
            ),
            "has the wrong sign: this is what a policy maximises; a loss is minimised": lambda *case: (
                -right(*case)
            ),
            "clips ρ always; the larger of the clipped and the plain loss counts, so that a wrong move can be undone": lambda r, a, e, c: (
                dual(-a * r.clamp(1 - e, 1 + e), a, c)
            ),
            "does not clip ρ": lambda r, a, e, c: dual(-a * r, a, c),
        },
        ["losses"],
    )


# 5. Advantage-Aware Shaping.


def with_gradient(weight):
    def both(logprobs, advantages):
        leaf = logprobs.clone().requires_grad_()
        w = weight(leaf, advantages)
        if not torch.is_tensor(w):
            return w
        slope = torch.autograd.grad(w.sum(), leaf)[0] if w.requires_grad else torch.zeros_like(leaf)
        return w.detach(), slope

    return both


def check_shaped_ratio(solution):
    pi = torch.tensor(
        [1e-6, 3e-4, 6e-4, 0.0015, 0.004, 0.01, 0.3, 0.8, 0.99995], dtype=torch.float64
    )
    advantages = torch.tensor(
        [[-7.0], [-3.0], [-1.0], [0.0], [1.0], [3.0], [7.0]], dtype=torch.float64
    )
    case = (pi.log().expand(7, 9), advantages)

    def straight(a):
        return 0.001 - 0.002 * (4 - a) / 8

    def kept(a):
        return straight(a).clamp(-0.001, 0.001)

    def w(logp, a, gamma=kept, guards=True, held=True):
        p = logp.exp()
        denominator = (p.detach() if held else p) + gamma(a)
        if guards:
            denominator = torch.where(denominator > 1, 0.9999 * p.detach(), denominator)
            denominator = torch.where(denominator < 0, 1.0001 * p.detach(), denominator)
        return p / denominator

    slips = {
        "is right, but its gradient runs through the denominator too; there π is sg(π): detach it": lambda p, a: (
            w(p, a, held=False)
        ),
        "is right, but has no gradient; only the denominator is detached": lambda p, a: w(
            p, a
        ).detach(),
        "lets γ grow beyond its ends where |Â| > 4; keep it between −0.001 and 0.001": lambda p, a: (
            w(p, a, straight)
        ),
        "has a γ of −0.001 whatever Â is: clamp with min above max returns max. The published code has this slip": lambda p, a: (
            w(p, a, lambda a: straight(a).clamp(0.001, -0.001))
        ),
        "has γ the wrong way round: good rollouts (Â > 0) have the positive γ": lambda p, a: w(
            p, a, lambda a: kept(-a)
        ),
        "leaves out the guards: see what w is where sg(π) + γ < 0": lambda p, a: w(
            p, a, guards=False
        ),
        "computes with log π where π is meant: exp first": lambda p, a: p / (p.detach() + kept(a)),
    }
    return compare(
        with_gradient(solution),
        with_gradient(grpo.shaped_ratio),
        [case],
        {hint: with_gradient(wrong) for hint, wrong in slips.items()},
        ["w", "the gradient of w by log π"],
        close=1e-8,
    )


# 6. Choosing and augmenting.


def check_choose(solution):
    finished = [True] * 8 + [False] * 8 + [True, False] * 4 + [False] * 7 + [True]
    sizes = [8, 0, 4, 1]  # finished rollouts of each question
    seen = set()
    for seed in range(200):
        fraction = (0.1, 0.3, 0.5, 1.0)[seed % 4]
        picked = solution(list(finished), 8, fraction, random.Random(seed))
        if not isinstance(picked, list) or not all(type(i) is int for i in picked):
            return f"should return a list of int, not {picked!r:.60}"
        if len(set(picked)) < len(picked):
            return "picks a rollout twice; without replacement: rng.sample, not rng.choices"
        if not set(picked) <= set(range(len(finished))):
            return f"returns {picked}: indices into `finished`, which has {len(finished)} entries"
        per_question = [sum(i // 8 == q for i in picked) for q in range(4)]
        if seed == 0 and per_question[0] > 1 and sum(per_question[1:]) == 0:
            return "returns each question's places within its group; add where the group starts in the list"
        if stray := [i for i in picked if not finished[i]]:
            return (
                f"picks rollout {stray[0]}, which is not finished; only finished ones are eligible"
            )
        for n, k in zip(sizes, per_question, strict=True):
            right = max(1, math.floor(n * fraction + 1e-9)) if n else 0
            if k == 0 and right:
                return f"helps nobody of a question with {n} finished rollouts at p = {fraction}: k is at least 1"
            if k != right:
                return (
                    f"picks {k} of a question with {n} of 8 rollouts finished at p = {fraction}; n counts the finished ones, "
                    f"and k = max(1, ⌊n·p⌋) = {right}"
                )
        if picked != sorted(picked):
            return "returns its indices unsorted"
        if picked != solution(list(finished), 8, fraction, random.Random(seed)):
            return "picks others when it gets the same rng again; draw from `rng` alone"
        seen |= set(picked) if fraction == 0.1 else set()
    if never := set(range(len(finished))) - seen - {i for i, f in enumerate(finished) if not f}:
        return f"never picks rollouts {sorted(never)} in 50 draws; every finished one must have its chance"
    if solution(list(finished), 8, 0.0, random.Random(0)):
        return "helps somebody at p = 0: the teacher is off then"
    return None


def check_augment(solution):
    tokenizer = Tokenizer.builtin()
    end = tokenizer.special["<|end|>"]
    attempt = [
        i for c in "The answer is \\boxed{9}." for i in tokenizer.encode(c)
    ]  # ids that no encoder would choose
    feedback = teacher.Feedback(
        "incorrect", "Hmm, I was too quick there.", "So the answer is \\boxed{8}."
    )
    guidance = tokenizer.encode(f"\n\n{feedback.reason}\n\n{feedback.phrase}")
    again = tokenizer.encode(tokenizer.decode(attempt))
    slips = {
        "leaves the attempt's end token in the middle; a response has one, at its end": [
            *attempt,
            end,
            *guidance,
            end,
        ],
        "returns a response without its end token, which earns nothing": attempt + guidance,
        "decodes the attempt and encodes it again, which gave other ids than those that were sampled": [
            *again,
            *guidance,
            end,
        ],
        "leaves out the phrase": [*attempt, *tokenizer.encode(f"\n\n{feedback.reason}"), end],
        "leaves out the reason": [*attempt, *tokenizer.encode(f"\n\n{feedback.phrase}"), end],
    }

    def run(function, most):
        rollout = grpo.Rollout(
            [1, 2], [*attempt, end], True, old_logprobs=[-0.5] * (len(attempt) + 1)
        )
        return function(rollout, feedback, tokenizer, most), rollout

    whole = len(attempt) + len(guidance) + 1
    for most in (whole + 10, whole, whole - 1):
        (changed, found), (expected, right) = run(solution, most), run(teacher.augment, most)
        if found.response != right.response:
            if most < whole and found.response == [*attempt, *guidance, end][:most]:
                return f"cuts a response of {whole} tokens at max_tokens = {most}; leave the rollout as it was"
            for hint, response in slips.items():
                if found.response == response:
                    return hint
            if found.response == [*attempt, end]:
                return f"does not change a rollout that would have {whole} tokens, with max_tokens = {most}"
            texts = [tokenizer.decode(r.response) for r in (found, right)]
            return (
                f"gives the response {texts[0]!r}; right is {texts[1]!r}"
                + ", but of other ids" * (texts[0] == texts[1])
            )
        if found.guided_from != right.guided_from:
            return (
                f"sets guided_from to {found.guided_from}; right is {right.guided_from}, where the first of the teacher's "
                "ids stands once the attempt's end token is gone"
            )
        if found.old_logprobs != right.old_logprobs:
            return (
                "keeps old_logprobs of the attempt alone; set it to None, so that log π_old of the whole is computed"
                if right.old_logprobs is None
                else "forgets old_logprobs of a rollout that stays as it was"
            )
        if bool(changed) != expected:
            return f"returns {changed!r} for a rollout that was {'changed' if expected else 'left alone'}"
    return None
