"""The exercises: unfilled they fail, the program's own functions fill them, and what usually goes wrong is called by its name."""

import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import check_model
import check_training
import checks
import pytest
import torch
import torch.nn.functional as F
from comparing import compare

from teacher import choose

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("[0-9]_*.py"))
GAPS = {
    "1_group_advantages": ["group_advantages"],
    "2_kv_cache": ["attend"],
    "3_top_p": ["sample"],
    "4_ppo_clip": ["clipped_loss"],
    "5_shaped_ratio": ["shaped_ratio"],
    "6_choose_and_augment": ["choose", "augment"],
}


def test_there_are_six_and_each_gap_has_a_check_and_a_solution():
    assert [f.stem for f in FILES] == list(GAPS)
    assert sum(GAPS.values(), []) == list(checks.CHECKS) == list(vars(checks.SOLUTIONS))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_unfilled_file_fails_and_says_what_is_to_be_done(file):
    assert "not filled in yet: your turn" in checks.verdict(checks.load(file))
    module = checks.load(file)
    for name in GAPS[file.stem][:-1]:  # the last gap of a file is missed too
        setattr(module, name, getattr(checks.SOLUTIONS, name))
    assert checks.verdict(module).startswith(GAPS[file.stem][-1] + " not filled in yet")


def filled(file, folder):
    """The exercise's file with every gap replaced by a call of the program's function, under the gap's own parameters."""
    lines = file.read_text().splitlines()
    for name in GAPS[file.stem]:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
        gap = next(i for i in range(at, len(lines)) if "raise NotImplementedError" in lines[i])
        parameters = checks.load(file).__dict__[name].__code__
        arguments = ", ".join(parameters.co_varnames[: parameters.co_argcount])
        lines[gap] = f"    import checks\n    return checks.SOLUTIONS.{name}({arguments})"
    copy = folder / file.name
    copy.write_text("\n".join(lines) + "\n")
    return copy


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_program_fills_every_gap(file, tmp_path):
    assert checks.verdict(checks.load(filled(file, tmp_path))) is None


def test_a_file_run_as_told_says_right_or_what_is_missing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    for file, status, words in (
        (FILES[0], 1, "your turn"),
        (filled(FILES[0], tmp_path), 0, "1_group_advantages.py: right"),
    ):
        done = subprocess.run(
            [sys.executable, file], capture_output=True, text=True, env=environment
        )
        assert (done.returncode, done.stderr) == (status, "") and words in done.stdout


# What students hand in. Written by hand and apart from the slips that checks.py knows.


def population_std(rewards):
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / ((centred**2).mean(1, keepdim=True).sqrt() + 1e-6)


def over_the_batch(rewards):
    return (rewards - torch.mean(rewards)) / (torch.std(rewards) + 1e-6)


def no_epsilon(rewards):
    return torch.stack([(r - r.mean()) / r.std() for r in rewards])


def blind_to_itself(q, k, v, keys, values):
    y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    return y, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)


def causal_with_one_query(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    return (
        F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True),
        keys,
        values,
    )


def heads_in_turn(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    wide = [torch.cat([x] * (q.shape[1] // x.shape[1]), dim=1) for x in (keys, values)]
    return F.scaled_dot_product_attention(q, *wide), keys, values


def forgets_the_new_token(q, k, v, keys, values):
    y = F.scaled_dot_product_attention(
        q, torch.cat([keys, k], 2), torch.cat([values, v], 2), enable_gqa=True
    )
    return y, keys, values


def unscaled(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True, scale=1.0), keys, values


def top_p_of(
    warm=True,
    strict=False,
    whole=True,
    told_warm=True,
    ranks=False,
    rescale=True,
    random_numbers=None,
):
    """A sampler a token at a time, with one thing wrong."""

    def sample(logits, uniform, temperature, top_p):
        tokens, logprobs = [], []
        for z, u in zip(
            logits, uniform if random_numbers is None else torch.rand(len(uniform)), strict=True
        ):
            p = (z / temperature if warm else z).softmax(-1)
            order, kept, total = p.argsort(descending=True).tolist(), [], 0.0
            for place, token in enumerate(order):
                if total >= top_p or strict and kept and total + p[token] > top_p:
                    break
                kept.append(place if ranks else token)
                total += p[token].item()
            weights = [p[order[place]].item() for place in range(len(kept))]
            below, target, drawn = (
                0.0,
                u.item() * (sum(weights) if rescale else 1),
                len(p) if not rescale else kept[-1],
            )
            for token, weight in zip(kept, weights, strict=True):
                below += weight
                if below >= target - 1e-7:
                    drawn = token
                    break
            tokens.append(drawn)
            distribution = (z / temperature if told_warm else z).log_softmax(-1)
            if not whole:
                distribution = torch.tensor(
                    [
                        weights[kept.index(i)] / sum(weights) if i in kept else 1
                        for i in range(len(z))
                    ]
                ).log()
            logprobs.append(distribution[min(drawn, len(p) - 1)])
        return torch.tensor(tokens), torch.stack(logprobs)

    return sample


def optimist(ratio, advantages, clip=0.2, dual_clip=3.0):
    gain = torch.max(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages)
    return torch.where(advantages < 0, torch.min(-gain, -advantages * dual_clip), -gain)


def no_dual_clip(ratio, advantages, clip=0.2, dual_clip=3.0):
    return -torch.min(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages)


def maximiser(ratio, advantages, clip=0.2, dual_clip=3.0):
    gain = torch.min(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages)
    return torch.where(advantages < 0, torch.max(gain, advantages * dual_clip), gain)


def always_clipped(ratio, advantages, clip=0.2, dual_clip=3.0):
    return -advantages * ratio.clip(1 - clip, 1 + clip)


def weight_of(logprobs, advantages, hold=torch.Tensor.detach, ends=(-0.001, 0.001), guards=True):
    pi = logprobs.exp()
    sg = hold(pi)
    below = sg + (advantages / 4000).clip(*ends)  # the same straight line
    if guards:
        below = torch.where(
            below < 0, 1.0001 * pi.detach(), torch.where(below > 1, 0.9999 * pi.detach(), below)
        )
    return pi / below


def from_everybody(finished, group_size, fraction, rng):
    return sorted(
        i
        for start in range(0, len(finished), group_size)
        for i in rng.sample(range(start, start + group_size), max(1, int(group_size * fraction)))
    )


def floor_alone(finished, group_size, fraction, rng):
    picked = []
    for start in range(0, len(finished), group_size):
        able = [i for i in range(start, start + group_size) if finished[i]]
        picked += rng.sample(able, int(len(able) * fraction))
    return sorted(picked)


def with_replacement(finished, group_size, fraction, rng):
    picked = []
    for start in range(0, len(finished) if fraction else 0, group_size):
        able = [i for i in range(start, start + group_size) if finished[i]]
        picked += rng.choices(able, k=max(1, int(len(able) * fraction + 1e-9))) if able else []
    return sorted(picked)


def the_first_ones(finished, group_size, fraction, rng):
    picked = []
    for start in range(0, len(finished) if fraction else 0, group_size):
        able = [i for i in range(start, start + group_size) if finished[i]]
        picked += able[: max(1, int(len(able) * fraction + 1e-9))]
    return picked


def even_at_zero(finished, group_size, fraction, rng):
    return choose(finished, group_size, max(fraction, 1e-9), rng)


def augment_with(
    attempt=lambda r, t: r.response[:-1],
    end=lambda r: r.response[-1:],
    cut=False,
    offset=0,
    keep=False,
):
    """An `augment` with one thing wrong."""

    def augment(rollout, feedback, tokenizer, max_tokens):
        first = attempt(rollout, tokenizer)
        ids = first + tokenizer.encode(f"\n\n{feedback.reason}\n\n{feedback.phrase}") + end(rollout)
        if len(ids) > max_tokens and not cut:
            return False
        rollout.response, rollout.guided_from = ids[:max_tokens], len(first) + offset
        if not keep:
            rollout.old_logprobs = None
        return True

    return augment


HANDED_IN = [
    ("group_advantages", population_std, "over n − 1"),
    ("group_advantages", over_the_batch, "each row is a group of its own"),
    ("group_advantages", no_epsilon, "0/0"),
    ("group_advantages", lambda rewards: None, "a tensor of shape (3, 4)"),
    ("group_advantages", lambda rewards: rewards.mean(1), "shape (3,); it should be (3, 4)"),
    ("attend", blind_to_itself, "the new token sees itself too"),
    ("attend", causal_with_one_query, "is_causal=True hides all but the first key"),
    ("attend", heads_in_turn, "neighbours share one"),
    ("attend", forgets_the_new_token, "the next token will not see this one"),
    ("attend", unscaled, "divided by √E"),
    ("sample", top_p_of(strict=True), "drops the token that crosses top_p"),
    ("sample", top_p_of(warm=False, told_warm=False), "takes no notice of the temperature"),
    ("sample", top_p_of(whole=False), "log-probabilities of what is left after the cut"),
    ("sample", top_p_of(told_warm=False), "log-probabilities at temperature 1"),
    ("sample", top_p_of(ranks=True), "places in the sorted order"),
    ("sample", top_p_of(rescale=False), "must sum to 1 again"),
    ("sample", top_p_of(random_numbers="own"), "take the randomness from `uniform`"),
    ("clipped_loss", optimist, "the larger one that is pessimistic"),
    ("clipped_loss", no_dual_clip, "leaves out the dual clip"),
    ("clipped_loss", maximiser, "wrong sign"),
    ("clipped_loss", always_clipped, "clips ρ always"),
    ("shaped_ratio", lambda logp, a: weight_of(logp, a, hold=lambda pi: pi), "detach it"),
    ("shaped_ratio", lambda logp, a: weight_of(logp.detach(), a), "has no gradient"),
    ("shaped_ratio", lambda logp, a: weight_of(logp, a, ends=(-1, 1)), "keep it between"),
    (
        "shaped_ratio",
        lambda logp, a: weight_of(logp, a, ends=(0.001, -0.001)),
        "The published code has this slip",
    ),
    ("shaped_ratio", lambda logp, a: weight_of(logp, a, guards=False), "leaves out the guards"),
    ("shaped_ratio", lambda logp, a: weight_of(logp, -a), "the wrong way round"),
    ("choose", from_everybody, "which is not finished"),
    ("choose", floor_alone, "k is at least 1"),
    ("choose", with_replacement, "picks a rollout twice"),
    ("choose", the_first_ones, "every finished one must have its chance"),
    ("choose", lambda *a: choose(*a[:3], random.Random()), "draw from `rng` alone"),
    ("choose", even_at_zero, "the teacher is off then"),
    ("augment", augment_with(attempt=lambda r, t: r.response), "end token in the middle"),
    ("augment", augment_with(end=lambda r: []), "without its end token"),
    (
        "augment",
        augment_with(attempt=lambda r, t: t.encode(t.decode(r.response[:-1]))),
        "other ids than those that were sampled",
    ),
    ("augment", augment_with(cut=True), "cuts a response"),
    ("augment", augment_with(offset=1), "guided_from"),
    ("augment", augment_with(keep=True), "log π_old of the whole"),
]


@pytest.mark.parametrize(
    "name, solution, hint", HANDED_IN, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(HANDED_IN)]
)
def test_a_usual_slip_is_told_by_its_name(name, solution, hint):
    message = checks.verdict(SimpleNamespace(**{name: solution}))
    assert message and message.startswith(name) and hint in message


def test_every_slip_that_is_known_is_told_from_the_others(monkeypatch):
    calls = []
    for module in (check_model, check_training):
        monkeypatch.setattr(
            module, "compare", lambda *args, **options: calls.append((args, options))
        )
    for name, check in checks.CHECKS.items():
        check(getattr(checks.SOLUTIONS, name))
    assert len(calls) == 5
    for (_, right, cases, slips, parts), options in calls:
        for hint, wrong in slips.items():
            assert compare(wrong, right, cases, slips, parts, **options) == hint


@pytest.mark.parametrize(
    "name, solution",
    [
        (
            "group_advantages",
            lambda rewards: torch.stack([(r - r.mean()) / (r.std() + 1e-6) for r in rewards]),
        ),
        ("sample", top_p_of()),
        ("shaped_ratio", weight_of),
        ("augment", augment_with()),
    ],
)
def test_another_way_to_write_it_is_right_too(name, solution):
    assert checks.verdict(SimpleNamespace(**{name: solution})) is None


def test_what_nobody_foresaw_is_shown_with_its_case():
    message = checks.verdict(SimpleNamespace(group_advantages=lambda rewards: rewards * 7))
    assert "right is (3, 4) [" in message and "the case was (3, 4) [" in message


def test_an_error_in_a_solution_is_told_with_its_line():
    def crashes(rewards):
        return rewards / "std"

    message = checks.verdict(SimpleNamespace(group_advantages=crashes))
    assert "TypeError" in message and f"line {crashes.__code__.co_firstlineno + 1}" in message


def test_sizes_taken_for_given_are_found_in_the_model():
    def fixed(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        return (
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True, scale=8**-0.5),
            keys,
            values,
        )

    assert "take sizes from the tensors" in checks.verdict(SimpleNamespace(attend=fixed))
