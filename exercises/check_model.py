"""Checks of the exercises about the model: 2 and 8 the KV cache, 10 the output head in slices."""

from types import SimpleNamespace

import torch
from calling import observe
from comparing import Task, clone, compare, same, unequal

from model import LM, KVCache, ModelConfig
from run.head import HeadLogprobs

# 2. The KV cache.


def cached(q, k, v, keys, values, lengths):
    """The program's cache, holding keys and values (B, K, S, E), and a pass that extends it."""
    B, K, S, E = keys.shape
    config = SimpleNamespace(n_layers=1, n_kv_heads=K, head_dim=E)
    model = SimpleNamespace(config=config, embed=SimpleNamespace(weight=q))
    room = max(S, int(lengths.max()) + 1)
    cache = KVCache(model, B, room)
    cache.k[0, :, :, :S], cache.v[0, :, :, :S] = keys, values
    cache.set_lengths(lengths.tolist())
    return cache, cache.extend(B, 1)


def program_attend(q, k, v, keys, values):
    lengths = torch.full((len(q),), keys.shape[2])
    cache, span = cached(q, k, v, keys, values, lengths)
    return cache.attend(span, 0, q, k, v), cache.k[0], cache.v[0]


def attention(q, keys, values, visible=None, power=-0.5, in_turn=False):
    """Attention of one query a row, (B, H, 1, E), to the positions that are `visible` (B, S)."""
    times = q.shape[1] // keys.shape[1]
    if in_turn:
        keys, values = keys.repeat(1, times, 1, 1), values.repeat(1, times, 1, 1)
    else:
        keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    scores = q @ keys.mT * q.shape[3] ** power
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return scores.softmax(-1) @ values


def attend_by_hand(q, k, v, keys, values, sees="all", kept="grown", **options):
    grown = torch.cat((keys, k), 2), torch.cat((values, v), 2)
    seen = {"all": grown, "old": (keys, values), "first": [x[:, :, :1] for x in grown]}
    first = torch.cat((k, keys), 2), torch.cat((v, values), 2)
    cache = {"grown": grown, "old": (keys, values), "before": first}
    return attention(q, *seen[sees], **options), *cache[kept]


def heads(generator, B, H, K, S, E):
    sizes = ((H, 1), (K, 1), (K, 1), (K, S), (K, S))
    return [torch.randn(B, n, T, E, generator=generator) for n, T in sizes]


ATTEND = Task(
    "attend",
    program_attend,
    attend_by_hand,
    {
        "attends to the cache as it was; the new token sees itself too, so put k and v in first": {
            "sees": "old"
        },
        "returns the cache as it was; the new k and v belong in it, or the next token will not "
        "see this one": {"kept": "old"},
        "puts the new k and v before the others; they go behind them": {"kept": "before"},
        "leaves out the scale: the scores are divided by √E": {"power": 0},
        "divides the scores by E; it is √E": {"power": -1},
        "gives the query heads their key heads in turn (0, 1, 0, 1, …); neighbours share one "
        "(0, 0, 0, 1, 1, 1), as repeat_interleave gives them": {"in_turn": True},
        "sees the first position only. With one query is_causal=True hides all but the first key; "
        "the one query is the newest token and may see everything": {"sees": "first"},
    },
    lambda generator: [heads(generator, 2, 6, 2, S, 8) for S in (5, 1, 0)],
    "q k v keys values",
    "y, keys, values",
)


class StepByStep:
    """In the place of a cache: the model's attention, position by position through a solution."""

    def __init__(self, solution):
        self.solution = solution

    def extend(self, B, T):
        self.positions = torch.arange(T)[None]
        return self

    def attend(self, span, layer, q, k, v):
        keys, values, rows = k[:, :, :0], v[:, :, :0], []
        for t in range(q.shape[2]):
            here = slice(t, t + 1)
            y, keys, values = self.solution(
                q[:, :, here], k[:, :, here], v[:, :, here], keys, values
            )
            rows.append(y)
        return torch.cat(rows, 2)


def check_attend(solution, seed):
    if message := compare(solution, ATTEND, seed):
        return message
    torch.manual_seed(seed)
    lm = LM(ModelConfig(50, 64, 2, 4, 2, 16, 64)).eval()
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        if unequal(lm(tokens, StepByStep(solution)), lm(tokens), 1e-4).any():
            return (
                "is right for 6 query heads, 2 key heads and E = 8, but not in the model, which "
                "has 4, 2 and 16: take sizes from the tensors"
            )
    return None


# 8. A decoding step with ragged rows.


def program_step(q, k, v, keys, values, lengths, turn):
    cache, span = cached(q, k, v, keys, values, lengths)
    y = cache.attend(span, 0, turn(q, span.positions), turn(k, span.positions), v)
    keys[:], values[:] = cache.k[0], cache.v[0]
    return y


def step_by_hand(
    q,
    k,
    v,
    keys,
    values,
    lengths,
    turn,
    at="own",
    position="own",
    shift=0,
    sees="own",
    turned="qk",
    kept=True,
    **options,
):
    """`at`: the new token's place; `position`, `shift`: what it is turned by; `sees`: its mask."""
    longest = lengths.max().expand(len(lengths))
    at = longest if at == "longest" else lengths
    positions = ((longest if position == "longest" else lengths) + shift)[:, None]
    q = turn(q, positions) if "q" in turned else q
    k = turn(k, positions) if "k" in turned else k
    rows, places = torch.arange(len(q)), torch.arange(keys.shape[2])
    now = (keys, values) if kept else (keys.clone(), values.clone())
    now[0][rows, :, at], now[1][rows, :, at] = k[:, :, 0], v[:, :, 0]
    visible = {
        "own": places <= at[:, None],
        "before": places < at[:, None],
        "longest": places <= longest[:, None],
        "all": (places >= 0).expand(len(q), -1),
    }
    return attention(q, *now, visible[sees], **options)


def ragged(generator):
    def case(B, S, *sizes):
        lengths = 1 + torch.rand(S - 2, generator=generator).argsort()[:B]  # all different
        return [*heads(generator, B, *sizes[:2], S, sizes[2]), lengths]

    return [case(3, 9, 6, 2, 8), case(2, 7, 4, 4, 16)]


STEP = Task(
    "decode_step",
    program_step,
    step_by_hand,
    {
        "puts every row's token at the longest row's place; row b's goes to place lengths[b]": {
            "at": "longest"
        },
        "turns every row by the longest row's position; the position of row b is lengths[b]": {
            "position": "longest"
        },
        "attends to what lies behind a row's end; hide the places above lengths[b]": {
            "sees": "all"
        },
        "hides only what lies behind the longest row; each row has an end of its own": {
            "sees": "longest"
        },
        "hides the new token from itself; it sees the places up to lengths[b], that one too": {
            "sees": "before"
        },
        "turns q and k by a position too many; positions count from 0, so it is lengths[b]": {
            "shift": 1
        },
        "turns q and k by the position of the token before; the new one's is lengths[b]": {
            "shift": -1
        },
        "turns neither q nor k": {"turned": ""},
        "turns q alone; the key needs its position, too": {"turned": "q"},
        "turns k alone; the query needs its position, too": {"turned": "k"},
        "leaves the cache as it was; write the new k and v into it": {"kept": False},
        "leaves out the scale: the scores are divided by √E": {"power": 0},
        "gives the query heads their key heads in turn; neighbours share one": {"in_turn": True},
    },
    ragged,
    "q k v keys values lengths",
    "y, keys, values",
)


# 10. Log-probabilities without the full logits.


def program_logprobs(states, weight, targets, size):
    return HeadLogprobs.apply(states, weight, targets, size, None, 1.0)[0]


def by_slices(
    states,
    weight,
    targets,
    size,
    join="right",
    place="inside",
    tail=True,
    whole=False,
    result="log",
):
    """`join`: how log Σ e^z of the slices is made one; `place`: which z is the target's."""
    N, V = len(states), len(weight)
    log_z, chosen, total = torch.full((N,), -torch.inf), torch.zeros(N), torch.zeros(N)
    if whole:
        states @ weight.T
    for start in range(0, V if tail else V // size * size, size):
        logits = states @ weight[start : start + size].T
        at, R = targets - start, logits.shape[1]
        inside = (at >= 0) & (at < R)
        z = logits.gather(1, at.clamp(0, R - 1)[:, None]).squeeze(1)
        chosen = torch.where(inside, z, chosen) if place == "inside" else chosen + z
        part, total = logits.logsumexp(1), total + logits.exp().sum(1)
        if join == "own":
            log_z = torch.where(inside, part, log_z)
        elif join == "sum":
            log_z = part if start == 0 else log_z + part
        else:
            log_z = part if join == "last" else torch.logaddexp(log_z, part)
    log_p = chosen - (total.log() if join == "exp" else log_z)
    return {"log": log_p, "p": log_p.exp(), "−log": -log_p}[result]


def large_vocabulary(generator):
    def case(V, size, scale):
        shapes = (40, 6), (V, 6)
        states, weight = (torch.randn(shape, generator=generator) for shape in shapes)
        return states * scale, weight, torch.randint(V, (40,), generator=generator), size

    return [case(90, 16, 1.0), case(77, 16, 30.0), case(96, 32, 1.0)]


HEAD = Task(
    "target_logprobs",
    program_logprobs,
    by_slices,
    {
        "makes all (N, V) logits at once; go through the head `size` rows at a time": {
            "whole": True
        },
        "adds the slices' log Σ e^z; log(a + b) is no sum of logs: join them by logaddexp": {
            "join": "sum"
        },
        "normalises over the target's own slice; the sum goes over the whole vocabulary": {
            "join": "own"
        },
        "normalises over the last slice alone; carry log Σ e^z on from slice to slice": {
            "join": "last"
        },
        "overflows where logits are large: e^z is inf above z = 88. Keep log Σ e^z instead "
        "(logsumexp, logaddexp)": {"join": "exp"},
        "adds a z from every slice; the target lies in one of them": {"place": "every"},
        "leaves out the last slice, which is shorter where V is no multiple of size": {
            "tail": False
        },
        "gives probabilities where log-probabilities are asked for": {"result": "p"},
        "gives −log p, the cross-entropy; it should be log p": {"result": "−log"},
    },
    large_vocabulary,
    "states weight targets size",
    "log p, whether all (N, V) logits were made",
    close=1e-4,
    look=lambda solution: lambda *case: as_two(solution(*case)),
)


def as_two(result):
    """Without the gradient, which is optional."""
    return result[:2]


def check_target_logprobs(solution, seed):
    if message := compare(solution, HEAD, seed):
        return message
    case = HEAD.cases(torch.Generator().manual_seed(seed))[0]
    _, _, slope = solution(*clone(case))
    _, _, right = observe(HEAD.name, program_logprobs)(*clone(case))
    if slope is not None and not same((slope,), (right,), HEAD.close):
        return (
            "is right, but has a wrong gradient by the states. A gradient is optional: leave it "
            "out (torch.no_grad) or let it run through every slice"
        )
    return None
