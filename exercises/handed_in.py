"""What participants might hand in, right and wrong, for the tests of the checks and of the grader.

Written apart from the variants in the checks, and in other ways.
"""

import math
import random
import re

import torch
import torch.nn.functional as F

# Right ones, each complete in itself: test_grade.py writes them into files.


def group_advantages(rewards):
    return torch.stack([(r - r.mean()) / (r.std() + 1e-6) for r in rewards])


def attend(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True), keys, values


def sample(logits, uniform, temperature, top_p):
    tokens, logprobs = [], []
    for z, u in zip(logits / temperature, uniform.tolist()):
        p, order = z.softmax(-1).sort(descending=True)
        kept = 1 + int((p.cumsum(0) < top_p).sum())
        sums = p[:kept].cumsum(0)
        place = min(int((sums < u * sums[-1]).sum()), len(sums) - 1)
        tokens.append(order[place])
        logprobs.append(z.log_softmax(-1)[order[place]])
    return torch.stack(tokens), torch.stack(logprobs)


def clipped_loss(ratio, advantages, clip=0.2, dual_clip=3.0):
    gain = torch.min(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages)
    return torch.where(advantages < 0, torch.min(-gain, -advantages * dual_clip), -gain)


def shaped_ratio(logprobs, advantages):
    pi = logprobs.exp()
    below = pi.detach() + (advantages / 4000).clip(-0.001, 0.001)  # the same straight line
    below = torch.where(below > 1, 0.9999 * pi.detach(), below)
    return pi / torch.where(below < 0, 1.0001 * pi.detach(), below)


def choose(finished, group_size, fraction, rng):
    picked = []
    for start in range(0, len(finished) if fraction else 0, group_size):
        able = [i for i in range(start, start + group_size) if finished[i]]
        rng.shuffle(able)
        picked += able[: max(1, int(len(able) * fraction + 1e-9))]
    return sorted(picked)


def augment(rollout, feedback, tokenizer, max_tokens):
    *attempt, end = rollout.response
    guidance = tokenizer.encode(f"\n\n{feedback.reason}\n\n{feedback.phrase}")
    if len(attempt) + len(guidance) + 1 > max_tokens:
        return False
    rollout.response = [*attempt, *guidance, end]
    rollout.guided_from, rollout.old_logprobs = len(attempt), None
    return True


def draw(weights, uniform):
    cdf = (weights / weights.sum(1, keepdim=True)).cumsum(1)
    cdf[:, -1] = 1
    return (cdf < uniform[:, None]).sum(1)


def decode_step(q, k, v, keys, values, lengths, turn):
    q, k = turn(q, lengths[:, None]), turn(k, lengths[:, None])
    rows = []
    for b, n in enumerate(lengths.tolist()):
        keys[b, :, n], values[b, :, n] = k[b, :, 0], v[b, :, 0]
        seen = keys[b : b + 1, :, : n + 1], values[b : b + 1, :, : n + 1]
        rows.append(F.scaled_dot_product_attention(q[b : b + 1], *seen, enable_gqa=True))
    return torch.cat(rows)


def accumulate(batches, forward):
    total, loss = sum(mask.sum().item() for _, mask in batches), 0.0
    for inputs, mask in batches:
        part = forward(inputs)[mask].sum() / total
        part.backward()
        loss += part.item()
    return loss


def target_logprobs(states, weight, targets, size):
    log_z = torch.full((len(states),), -math.inf)
    for part in weight.split(size):
        log_z = torch.logaddexp(log_z, (states @ part.T).logsumexp(1))
    return (states * weight[targets]).sum(1) - log_z


def parse_feedback(text):
    parts = [f"<{tag}>(?P<{tag}>.*)</{tag}>" for tag in ("opinion", "reason", "phrase")]
    found = re.fullmatch(r"\s*" + r"\s*".join(parts) + r"\s*", text, re.DOTALL)
    if not found or len(re.findall("</?(?:opinion|reason|phrase)>", text)) != 6:
        return None
    words = tuple(word.strip() for word in found.groups())
    return words if words[0] in ("correct", "incorrect") and all(words) else None


def guidance_fraction(step, total_steps, initial=0.1, minimum=0.01, eps=0.05):
    third = total_steps / 3
    p = minimum if step >= third else initial - (initial - minimum) * step / third
    return 0.0 if p <= eps + 0.01 + 1e-9 else p


RIGHT = [
    group_advantages,
    attend,
    sample,
    clipped_loss,
    shaped_ratio,
    choose,
    augment,
    draw,
    decode_step,
    accumulate,
    target_logprobs,
    parse_feedback,
    guidance_fraction,
]

# Wrong ones.


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


def sample_with(
    warm=True, strict=False, whole=True, told_warm=True, ranks=False, rescale=True, own=False
):
    """A sampler in the order of the ranks, with one thing wrong."""

    def sample(logits, uniform, temperature, top_p):
        V = logits.shape[1]
        p, order = (logits / temperature if warm else logits).softmax(1).sort(1, descending=True)
        kept = p.cumsum(1) <= top_p if strict else p.cumsum(1) - p < top_p
        kept[:, 0] = True
        cdf = (p * kept).cumsum(1)
        u = torch.rand(len(p)) if own else uniform
        target = u[:, None] * (cdf[:, -1:] if rescale else 1) - 1e-7
        place = (cdf < target).sum(1)  # V where there is none
        token = order.gather(1, place.clamp(max=V - 1)[:, None])
        told = (logits / temperature if told_warm else logits).log_softmax(1).gather(1, token)
        if not whole:
            told = (p / cdf[:, -1:]).log().gather(1, place.clamp(max=V - 1)[:, None])
        return place if ranks else torch.where(place < V, token[:, 0], V), told[:, 0]

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


def weight_of(
    logprobs,
    advantages,
    hold=torch.Tensor.detach,
    guard=torch.Tensor.detach,
    ends=(-0.001, 0.001),
    guards=True,
):
    pi = logprobs.exp()
    sg = hold(pi)
    below = sg + (advantages / 4000).clip(*ends)  # the same straight line
    if guards:
        below = torch.where(
            below < 0, 1.0001 * guard(pi), torch.where(below > 1, 0.9999 * guard(pi), below)
        )
    return pi / below


def from_everybody(finished, group_size, fraction, rng):  # and helps at p = 0
    return sorted(
        i
        for start in range(0, len(finished), group_size)
        for i in rng.sample(range(start, start + group_size), max(1, int(group_size * fraction)))
    )


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


def leave_one_out(rewards):
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def dual_clip_from_below(ratio, advantages, clip=0.2, dual_clip=3.0):
    loss = no_dual_clip(ratio, advantages, clip)
    return torch.where(advantages < 0, torch.max(loss, -advantages * dual_clip), loss)


def constant_where_guarded(logprobs, advantages):
    pi, gamma = logprobs.exp(), (advantages / 4000).clip(-0.001, 0.001)
    w = pi / (pi.detach() + gamma)
    w = torch.where(pi + gamma < 0, torch.tensor(1 / 1.0001), w)
    return torch.where(pi + gamma > 1, torch.tensor(1 / 0.9999), w)


def nothing_detached(logprobs, advantages):
    return weight_of(logprobs, advantages, hold=lambda pi: pi, guard=lambda pi: pi)


def somebody_of_nobody(finished, group_size, fraction, rng):
    picked = []
    for start in range(0, len(finished) if fraction else 0, group_size):
        able = [i for i in range(start, start + group_size) if finished[i]]
        picked += rng.sample(able, max(1, int(len(able) * fraction + 1e-9)))
    return sorted(picked)


def choose_k(count):
    def choose(finished, group_size, fraction, rng):
        picked = []
        for start in range(0, len(finished) if fraction else 0, group_size):
            able = [i for i in range(start, start + group_size) if finished[i]]
            picked += rng.sample(able, count(len(able), group_size, fraction)) if able else []
        return sorted(picked)

    return choose


k_of_the_group = choose_k(lambda n, G, p: max(1, int(G * p + 1e-9)))
floor_alone = choose_k(lambda n, G, p: int(n * p + 1e-9))
as_many_as_there_are = choose_k(lambda n, G, p: min(n, max(1, int(G * p + 1e-9))))
rounded_up = choose_k(lambda n, G, p: math.ceil(n * p - 1e-9))


def multinomial(weights, uniform):
    return torch.multinomial(weights, 1).squeeze(1)


def draw_with(scale=True, right=False, shift=0):
    def draw(weights, uniform):
        cdf = weights.cumsum(1)
        return (
            torch.searchsorted(cdf, uniform[:, None] * (cdf[:, -1:] if scale else 1), right=right)[
                :, 0
            ]
            + shift
        )

    return draw


def step_with(place=lambda n: n, position=lambda n: n, seen=lambda n, S: n + 1, key=True):
    """A decoding step a row at a time, with one thing wrong; n is the row's length."""

    def decode_step(q, k, v, keys, values, lengths, turn):
        at = position(lengths)[:, None]
        q, k = turn(q, at), turn(k, at) if key else k
        rows = []
        for b, n in enumerate(place(lengths).tolist()):
            keys[b, :, n], values[b, :, n] = k[b, :, 0], v[b, :, 0]
        for b, n in enumerate(place(lengths).tolist()):
            most = seen(n, keys.shape[2])
            part = keys[b : b + 1, :, :most], values[b : b + 1, :, :most]
            rows.append(F.scaled_dot_product_attention(q[b : b + 1], *part, enable_gqa=True))
        return torch.cat(rows)

    return decode_step


def mean_of_means(batches, forward):
    loss = 0.0
    for inputs, mask in batches:
        part = forward(inputs)[mask].mean() / len(batches)
        part.backward()
        loss += part.item()
    return loss


def one_backward(batches, forward):
    loss = torch.cat([forward(inputs)[mask] for inputs, mask in batches]).mean()
    loss.backward()
    return loss


def mean_of_rollouts(batches, forward):
    rows, loss = sum(len(mask) for _, mask in batches), 0.0
    for inputs, mask in batches:
        part = ((forward(inputs) * mask).sum(1) / mask.sum(1)).sum() / rows
        part.backward()
        loss += part.item()
    return loss


def with_padding(batches, forward):
    count, loss = sum(mask.numel() for _, mask in batches), 0.0
    for inputs, _ in batches:
        part = forward(inputs).sum() / count
        part.backward()
        loss += part.item()
    return loss


def all_logits(states, weight, targets, size):
    return -F.cross_entropy(states @ weight.T, targets, reduction="none")


def plain_exponentials(states, weight, targets, size):
    total = sum((states @ part.T).exp().sum(1) for part in weight.split(size))
    return (states * weight[targets]).sum(1) - total.log()


def detached_sum(states, weight, targets, size):
    right = target_logprobs(states.detach(), weight, targets, size)
    z = (states * weight[targets]).sum(1)
    return right + z - z.detach()


def first_match(text):
    found = re.search(
        r"<opinion>(.*?)</opinion>.*?<reason>(.*?)</reason>.*?<phrase>(.*?)</phrase>", text, re.S
    )
    return tuple(part.strip() for part in found.groups()) if found else None


def whole_but_forged(text):
    parts = r"\s*<opinion>(.*?)</opinion>\s*<reason>(.*?)</reason>\s*<phrase>(.*)</phrase>\s*"
    found = re.fullmatch(parts, text, re.S)
    words = tuple(part.strip() for part in found.groups()) if found else ("",)
    return words if words[0] in ("correct", "incorrect") and all(words) else None


def parts_in_any_order(text):
    parts = re.split("(?<=</opinion>)|(?<=</reason>)|(?<=</phrase>)", text)
    return parse_feedback("".join(sorted(parts, key=lambda part: "orp".find(part.strip()[1:2]))))


def schedule_with(part=1 / 3, first=0, off=lambda p, eps: p <= eps + 0.01 + 1e-9):
    def guidance_fraction(step, total_steps, initial=0.1, minimum=0.01, eps=0.05):
        x = min(1.0, (step + first) / (part * total_steps))
        p = (1 - x) * initial + x * minimum
        return 0.0 if off(p, eps) else p

    return guidance_fraction


HANDED_IN = [
    ("group_advantages", population_std, "over n − 1"),
    ("group_advantages", over_the_batch, "each row is a group of its own"),
    ("group_advantages", no_epsilon, "0/0"),
    ("group_advantages", lambda rewards: None, "a tensor of shape (3, 5)"),
    ("group_advantages", lambda rewards: rewards.mean(1), "shape (3,); it should be (3, 5)"),
    ("group_advantages", leave_one_out, "this is RLOO"),
    ("attend", blind_to_itself, "the new token sees itself too"),
    ("attend", causal_with_one_query, "is_causal=True hides all but the first key"),
    ("attend", heads_in_turn, "neighbours share one"),
    ("attend", forgets_the_new_token, "the next token will not see this one"),
    ("attend", unscaled, "divided by √E"),
    ("sample", sample_with(strict=True), "drops the token that crosses top_p"),
    ("sample", sample_with(warm=False, told_warm=False), "takes no notice of the temperature"),
    ("sample", sample_with(whole=False), "log-probabilities of what is left after the cut"),
    ("sample", sample_with(told_warm=False), "log-probabilities at temperature 1"),
    ("sample", sample_with(ranks=True), "places in the sorted order"),
    ("sample", sample_with(rescale=False), "must sum to 1 again"),
    ("sample", sample_with(own=True), "take the randomness from `uniform`"),
    ("sample", lambda *a: sample(*a)[0], "should return two tensors"),
    ("sample", lambda *a: (sample(*a)[0].float(), sample(*a)[1]), "as torch.float32"),
    ("sample", lambda *a: (sample(*a)[0], None), "where log-probabilities should be"),
    ("clipped_loss", optimist, "the larger one that is pessimistic"),
    ("clipped_loss", no_dual_clip, "leaves out the dual clip"),
    ("clipped_loss", maximiser, "wrong sign"),
    ("clipped_loss", always_clipped, "clips ρ always"),
    ("clipped_loss", dual_clip_from_below, "The dual clip bounds a loss from above"),
    ("shaped_ratio", lambda logp, a: weight_of(logp, a, hold=lambda pi: pi), "detach it"),
    ("shaped_ratio", nothing_detached, "detaches nothing"),
    ("shaped_ratio", constant_where_guarded, "a constant where a guard holds"),
    ("shaped_ratio", lambda logp, a: weight_of(logp.detach(), a), "has no gradient"),
    ("shaped_ratio", lambda logp, a: weight_of(logp, a, ends=(-1, 1)), "keep it between"),
    (
        "shaped_ratio",
        lambda logp, a: weight_of(logp, a, ends=(0.001, -0.001)),
        "The published code has this slip",
    ),
    ("shaped_ratio", lambda logp, a: weight_of(logp, a, guards=False), "leaves out the guards"),
    ("shaped_ratio", lambda logp, a: weight_of(logp, -a), "the wrong way round"),
    ("choose", from_everybody, "First, it picks a rollout that is not finished"),
    ("choose", k_of_the_group, "where 1 of 8 rollouts have finished, too few"),
    ("choose", somebody_of_nobody, "where 0 of 8 rollouts have finished, too few"),
    ("choose", lambda *a: tuple(choose(*a)), "should return a list of int"),
    ("choose", lambda *a: [i + 9 for i in choose(*a)], "indices into `finished`"),
    ("choose", lambda *a: [i % 8 for i in choose(*a)], "places within the group"),
    ("choose", lambda *a: choose(*a)[::-1], "unsorted"),
    ("choose", as_many_as_there_are, "n counts the finished ones, not the group"),
    ("choose", rounded_up, "k = max(1, ⌊n·p⌋) is 2"),
    ("choose", lambda f, g, p, rng: choose(f, g, 1 / p and p, rng), "fails at p = 0"),
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
    ("draw", multinomial, "take the randomness from `uniform`"),
    ("draw", lambda weights, uniform: weights.argmax(1), "the likeliest token whatever u is"),
    ("draw", draw_with(scale=False), "takes the weights to sum to 1"),
    ("draw", draw_with(right=True), "the first that is at least u"),
    ("draw", draw_with(shift=1), "the token behind the right one"),
    ("draw", lambda weights, uniform: draw(weights, 1 - uniform), "the other end (1 − u)"),
    (
        "draw",
        lambda weights, uniform: draw(weights, uniform).float(),
        "as torch.float32; it should be torch.int64",
    ),
    ("draw", lambda weights, uniform: draw(weights, uniform)[:, None], "of shape (B, 1)"),
    (
        "decode_step",
        step_with(place=lambda n: n.max().expand(len(n))),
        "at the longest row's place",
    ),
    ("decode_step", step_with(seen=lambda n, S: S), "what lies behind a row's end"),
    ("decode_step", step_with(seen=lambda n, S: n), "hides the new token from itself"),
    ("decode_step", step_with(position=lambda n: n + 1), "a position too many"),
    ("decode_step", step_with(position=lambda n: n - 1), "the position of the token before"),
    ("decode_step", step_with(key=False), "turns q alone"),
    ("accumulate", mean_of_means, "a token of a small micro-batch weighs more"),
    ("accumulate", mean_of_rollouts, "weighs more; in a token mean"),
    ("accumulate", one_backward, "calls backward() once, at the end"),
    ("accumulate", with_padding, "First, it divides by the padding, too"),
    ("accumulate", lambda batches, forward: 0.5, "gives the gradient[0] = 0; right is"),
    ("target_logprobs", all_logits, "makes all (N, V) logits at once"),
    ("target_logprobs", plain_exponentials, "overflows where logits are large"),
    ("target_logprobs", detached_sum, "has a wrong gradient"),
    ("target_logprobs", lambda *a: -target_logprobs(*a), "gives −log p"),
    ("parse_feedback", first_match, "First, it can be deceived"),
    ("parse_feedback", whole_but_forged, "can be deceived"),
    *(
        (
            "parse_feedback",
            lambda text, stops=stops: None if re.search(stops, text) else parse_feedback(text),
            hint,
        )
        for stops, hint in (
            (r">\s+<[a-z]", "does not allow white space between"),
            (r"<opinion>\s", "does not strip a part's white space"),
            (r",\n", "does not read a part of several lines"),
            ("< 9", "stops at < or > in a part"),
        )
    ),
    *(
        ("parse_feedback", lambda text, mend=mend: parse_feedback(mend(text)), hint)
        for mend, hint in (
            (lambda t: t[t.find("<") :], "accepts words outside the three parts"),
            (
                lambda t: t if "<reason" in t else t.replace("<ph", "<reason>x</reason><ph"),
                "without a reason",
            ),
            (lambda t: t if "<phrase" in t else t + "<phrase>x</phrase>", "without a phrase"),
            (lambda t: t if "</phrase" in t else t + "</phrase>", "a part that never closes"),
            (lambda t: t.replace("Correct", "correct"), "other than correct and incorrect"),
            (lambda t: t.replace("<phrase></", "<phrase>x</"), "accepts an empty part"),
        )
    ),
    ("parse_feedback", parts_in_any_order, "accepts the parts in another order"),
    ("parse_feedback", lambda text: None, "does not read a reply that follows the format"),
    ("guidance_fraction", schedule_with(part=1), "falls over the whole training"),
    ("guidance_fraction", schedule_with(first=1), "counts steps from 1"),
    ("guidance_fraction", schedule_with(off=lambda p, eps: False), "never lets the teacher leave"),
    ("guidance_fraction", schedule_with(off=lambda p, eps: p <= eps + 1e-9), "leaves out the 0.01"),
    ("guidance_fraction", lambda *a: None, "returns [None"),
]
