"""Batches: no cut into micro-batches is cheaper, and computing prompts once changes no number."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import Tokenizer
from grpo import Rollout, collate, token_logprobs
from model import LM, ModelConfig
from run.batches import SharedPrompts, micro_batches

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "gsm8k" / "train.jsonl"
PROPERTY = settings(max_examples=100, deadline=None)
GROUPS = st.lists(  # the length of each prompt and of each of its responses
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=4)), max_size=5
)


def groups_of(lengths):
    """Rollouts in any order; prompts that share a first part are different prompts."""
    rollouts = []
    for i, (prompt, responses) in enumerate(lengths):
        for response in responses:
            rollouts.append(Rollout([0] * (prompt - 1) + [1 + i], [len(rollouts)] * response, True))
    random.Random(len(rollouts)).shuffle(rollouts)
    return rollouts


def size_of(batch):
    """Tokens of a pass, padding counted: of the different prompts, and of the responses."""
    prompts = {tuple(r.prompt) for r in batch}
    longest = max(len(r.response) for r in batch)
    return len(prompts) * max(map(len, prompts)) + len(batch) * longest


@PROPERTY
@given(GROUPS, st.integers(1, 120))
def test_micro_batches_hold_every_rollout_once_and_no_more_tokens_than_allowed(lengths, size):
    rollouts = groups_of(lengths)
    batches = micro_batches(rollouts, size)
    assert sorted(r.response[0] for batch in batches for r in batch) == list(range(len(rollouts)))
    assert all(batch and (len(batch) == 1 or size_of(batch) <= size) for batch in batches)


@PROPERTY
@given(GROUPS.filter(lambda groups: 1 <= sum(len(r) for _, r in groups) <= 9), st.integers(9, 120))
def test_no_other_cut_into_micro_batches_is_cheaper(lengths, size):
    batches = micro_batches(groups_of(lengths), size)
    rollouts = [r for batch in batches for r in batch]  # in the order that is cut
    prompts = [tuple(r.prompt) for r in rollouts]
    changes = sum(a != b for a, b in zip(prompts, prompts[1:]))
    assert changes == len(set(prompts)) - 1  # a group's stay together
    costs = []
    for chosen in range(1 << (len(rollouts) - 1)):  # every way to cut them
        places = [0, *(i + 1 for i in range(len(rollouts) - 1) if chosen >> i & 1), len(rollouts)]
        cut = [rollouts[a:b] for a, b in zip(places, places[1:])]
        if all(len(batch) == 1 or size_of(batch) <= size for batch in cut):
            costs.append(sum(map(size_of, cut)) + len(cut) * size / 16)
    assert sum(map(size_of, batches)) + len(batches) * size / 16 == pytest.approx(min(costs))


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not here: GSM8K's lengths are needed")
def test_the_layers_read_few_of_gsm8ks_prompts_twice_and_no_padding():
    tokenizer = Tokenizer.builtin()
    lines = [json.loads(line) for line in GSM8K.read_text().splitlines()[:640]]
    prompts, solutions = (
        [tokenizer.encode(line[key]) for line in lines] for key in ("question", "answer")
    )
    model = model_of("llama", vocab_size=tokenizer.vocab_size)
    for start in range(0, 640, 64):  # the published mini-batch, with other questions' solutions
        rollouts = []
        for i in range(start, start + 32):
            rollouts += [Rollout(prompts[i], solutions[(i + 7 * g) % 640], True) for g in range(5)]
        read = 0
        for batch in micro_batches(rollouts, 16384):
            read += SharedPrompts(batch, model).tokens.numel()
        least = sum(len(prompts[i]) for i in range(start, start + 32))
        least += sum(len(r.response) - 1 for r in rollouts)
        assert least <= read < 1.05 * least


KINDS = {
    "llama": {},
    "grouped heads, q/k norm": dict(n_kv_heads=2, qk_norm=True),
    "one head for all, bias, tied": dict(n_kv_heads=1, qkv_bias=True, tie_embeddings=True),
}


def model_of(kind, **more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, dim=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=40)
    return LM(ModelConfig(**{**sizes, **KINDS[kind], **more})).double()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(lengths=GROUPS.filter(bool))
def test_prompts_that_are_computed_once_give_the_same_logprobs_and_gradient(kind, lengths):
    model, rollouts = model_of(kind), groups_of(lengths)
    tokens, mask, *_ = collate(rollouts)
    slope = torch.randn(mask.shape)
    found = []
    for shared in (None, SharedPrompts(rollouts, model)):
        model.zero_grad()
        logprobs, entropy = token_logprobs(model, tokens, mask, entropy=True, shared=shared)
        (logprobs * slope).sum().backward()
        found.append([logprobs, entropy, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_a_prompt_goes_through_the_layers_once():
    model, seen = model_of("llama"), []
    rollouts = [Rollout([1, 2, 3, 4], [5] * n, True) for n in (1, 3, 6)]
    rollouts += [Rollout([1, 2, 3], [6] * 4, True)]
    model.layers[0].gate_up.register_forward_hook(lambda part, given, y: seen.append(y.shape[:2]))
    token_logprobs(model, *collate(rollouts)[:2], shared=SharedPrompts(rollouts, model))
    assert seen == [(1, 4 + 3 + (0 + 2 + 5 + 3))]  # last tokens are not read


def test_the_mask_has_the_dtype_that_is_computed_in(monkeypatch):
    """Several processes hold float32 weights and compute in bfloat16; a GPU refuses another mask."""
    model, rollouts, found = model_of("llama").float(), groups_of([(4, [3, 2])]), []
    shared = SharedPrompts(rollouts, model)
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, mask=None, **more):
        found.extend((q.dtype, x.dtype) for x in (k, v, mask) if x is not None)
        return attention(q, k, v, mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    token_logprobs(model.bfloat16(), *collate(rollouts)[:2], shared=shared)
    assert len(found) > 8 and set(found) == {(torch.bfloat16, torch.bfloat16)}


def test_a_response_of_one_token_and_one_of_none_are_computed():
    model = model_of("llama")
    rollouts = [Rollout([1, 2], [], True), Rollout([1, 2], [3], True)]
    tokens, mask, *_ = collate(rollouts)
    shared = token_logprobs(model, tokens, mask, shared=SharedPrompts(rollouts, model))
    torch.testing.assert_close(shared, token_logprobs(model, tokens, mask))
    nothing = token_logprobs(
        model, *collate(rollouts[:1])[:2], shared=SharedPrompts(rollouts[:1], model)
    )
    assert nothing.tolist() == [[0.0]]
