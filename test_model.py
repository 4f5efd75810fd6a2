"""Tests of model.py and weights.py: against the same model without its cache, plain Python, and transformers."""

import errno
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

import sampler
from data import weights
from model import LM, KVCache, ModelConfig
from sampler import generate, prefill, sample
from tools.hostile import model

PROPERTY = settings(max_examples=40, deadline=None)
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # with theta 100: of 8 frequencies 2 are kept, 2 blended, 4 divided
SMALL = ModelConfig(vocab_size=61, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, norm_eps=0.03,
                    rope_theta=100.0, max_seq_len=64)
CONFIGS = {
    "llama": SMALL,
    "llama tied, scaled rope": replace(SMALL, tie_embeddings=True, rope_scaling=LLAMA3_ROPE),
    "qwen2": replace(SMALL, qkv_bias=True),
    "qwen3 tied": replace(SMALL, qk_norm=True, tie_embeddings=True),
}


def liven(module, seed=0):
    """Weights so large that attention decides: at std 0.02 a tied model repeats its last token, right or wrong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name))
    return module.eval()


MODEL = liven(LM(CONFIGS["llama tied, scaled rope"]))
STOP = range(0, 61, 7)  # 9 of 61 tokens: some responses finish at once, some never


def random_tokens(*shape, seed=0):
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def prompts_of(*lengths, seed=0):
    return [random_tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


@torch.no_grad()
def uncached(ids, model=MODEL):
    """The reference: logits (T, V) of one unpadded sequence."""
    return model(torch.tensor([ids]))[0]


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# ------------------------------------------------------------------ the cache


@PROPERTY
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.lists(st.integers(1, 4), min_size=1, max_size=5),
       st.sampled_from([0, 1, 7]), st.sampled_from(list(CONFIGS)), st.integers(0, 2**32))
def test_cached_logits_are_the_uncached_ones_at_every_position(lengths, chunks, shared, name, seed):
    """Ragged prompts behind a shared prefix (or none), then continued one to four tokens at a time."""
    model = liven(LM(CONFIGS[name]))
    rows = random_tokens(len(lengths), 12 + sum(chunks), seed=seed)
    prompts = [row[:n].tolist() for row, n in zip(rows, lengths)]
    head = random_tokens(shared, seed=seed + 1)
    expected = torch.stack([uncached(head.tolist() + row.tolist(), model)[shared:] for row in rows])  # (B, T, V)
    prefix = prefill(model, [head.tolist()])[0] if shared else None

    filled, logits = prefill(model, prompts, prefix)
    here = torch.tensor(lengths)
    each = torch.arange(len(lengths))
    assert_close(logits, expected[each, here - 1])
    cache = KVCache(model, len(lengths), max(lengths) + sum(chunks), prefix)
    cache.fill(0, filled, range(len(lengths)))
    for n in chunks:
        columns = here[:, None] + torch.arange(n)
        with torch.no_grad():
            logits = model(rows[each[:, None], columns], cache)
        assert_close(logits, expected[each[:, None], columns])
        here = here + n


def no_rotation(model, patch):
    patch.setattr("model.rotate", lambda x, rope: x)


def next_position_off_by_one(model, patch):
    reserve = KVCache.reserve
    patch.setattr(KVCache, "reserve", lambda self, B, T: (lambda at, mask: (at + (T == 1), mask))(*reserve(self, B, T)))


def no_mask(model, patch):
    attention = torch.nn.functional.scaled_dot_product_attention
    patch.setattr("torch.nn.functional.scaled_dot_product_attention",
                  lambda q, k, v, mask=None, is_causal=False, **more: attention(q, k, v, **more))


def no_epsilon(model, patch):
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            patch.setattr(module, "eps", 0.0)


def no_bias(model, patch):
    for layer in model.layers:
        patch.setattr(layer.attention.qkv, "bias", None)


@pytest.mark.parametrize("fault", (None, no_rotation, next_position_off_by_one, no_mask, no_epsilon, no_bias))
def test_these_weights_show_every_fault(fault):
    """The other tests compare to 1e-4: here what they compare moves by a hundred times that, so no such fault can hide."""
    model = liven(LM(replace(SMALL, qkv_bias=True)))
    ids = random_tokens(12).tolist()
    expected = uncached(ids, model)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if fault:
            fault(model, patch)
        cache = KVCache(model, 1, 12)
        found = torch.cat([model(torch.tensor([ids[:8]]), cache), *(model(torch.tensor([[t]]), cache) for t in ids[8:])], 1)[0]
    difference = (found - expected).abs().max()
    assert difference > 1e-2 if fault else difference < 1e-4


def test_padding_inside_a_prefilled_batch_changes_no_position():
    prompts = prompts_of(3, 9, 1)
    cache = KVCache(MODEL, 3, 9)
    with torch.no_grad():
        logits = MODEL(torch.tensor([p + [0] * (9 - len(p)) for p in prompts]), cache)
    for row, prompt in zip(logits, prompts):
        assert_close(row[: len(prompt)], uncached(prompt))


def test_rows_that_stay_keep_their_own_keys_and_lengths():
    prompts = prompts_of(5, 2, 8, 3, 6)
    filled, _ = prefill(MODEL, prompts)
    cache = KVCache(MODEL, 5, 9)
    cache.fill(0, filled, range(5))
    kept = cache.drop(torch.tensor([True, False, True, False, False])).tolist()
    assert sorted(kept) == [1, 3, 4]
    with torch.no_grad():
        logits = MODEL(torch.full((3, 1), 7), cache)[:, 0]
    assert_close(logits, torch.stack([uncached(prompts[i] + [7])[-1] for i in kept]))


def test_a_full_cache_is_refused():
    cache, _ = prefill(MODEL, prompts_of(4))
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
        MODEL(torch.tensor([[1]]), cache)


# ------------------------------------------------------------------ generate


def argmax_loop(prompt, max_tokens, model=MODEL):
    response = []
    while len(response) < max_tokens and not (response and response[-1] in STOP):
        response.append(uncached(prompt + response, model)[-1].argmax().item())
    return response


@pytest.mark.parametrize("seed", range(3))
def test_greedy_generation_is_argmax_token_by_token_without_a_cache(seed):
    prompts = prompts_of(4, 1, 11, 6, 2, seed=10 * seed)
    expected = [argmax_loop(p, 12) for p in prompts]
    assert len(set(map(len, expected))) > 1  # rows leave at different steps
    assert generate(MODEL, prompts, max_tokens=12, stop=STOP, temperature=0) == expected


def test_a_prefix_in_the_cache_is_a_prefix_of_every_prompt():
    head, prompts = prompts_of(6)[0], prompts_of(3, 8, 1, seed=5)
    options = dict(max_tokens=10, stop=STOP, samples=4)
    cached = generate(MODEL, prompts, prefix=prefill(MODEL, [head])[0], generator=torch.Generator().manual_seed(0), **options)
    assert cached == generate(MODEL, [head + p for p in prompts], generator=torch.Generator().manual_seed(0), **options)


def record_shapes(monkeypatch):
    shapes, hidden = [], LM.hidden

    def recorded(self, tokens, cache=None):
        shapes.append(tuple(tokens.shape))
        return hidden(self, tokens, cache)

    monkeypatch.setattr(LM, "hidden", recorded)
    return shapes


@pytest.mark.parametrize("n_heads, n_kv_heads", ((2, 2), (6, 2), (4, 1)))
@pytest.mark.parametrize("shared", (0, 40))
def test_greedy_generation_in_groups_of_every_size_with_and_without_a_prefix(n_heads, n_kv_heads, shared, monkeypatch):
    model = liven(LM(replace(SMALL, n_heads=n_heads, n_kv_heads=n_kv_heads)))
    head, tails = random_tokens(shared, seed=7).tolist(), prompts_of(3, 8, 1, 5)
    expected = [argmax_loop(head + tail, 10, model) for tail in tails]
    monkeypatch.setattr(sampler, "PREFILL", 16)  # two passes
    assert generate(model, [head + tail for tail in tails], max_tokens=10, stop=STOP, temperature=0, rows=3) == expected


def test_a_prompt_is_computed_once_for_all_samples_and_finished_rows_leave_the_batch(monkeypatch):
    shapes = record_shapes(monkeypatch)
    responses = generate(MODEL, prompts_of(3, 9), max_tokens=12, stop=STOP, samples=8, generator=torch.Generator().manual_seed(0))
    running = [sum(len(r) > t for r in responses) for t in range(1, 12)]  # samples that need a token t
    assert len(set(running)) > 2  # rows leave at different steps
    assert shapes == [(2, 9)] + [(n, 1) for n in running if n]


@pytest.mark.parametrize("block", (0, 1, 5))
@pytest.mark.parametrize("rows", (1, 2, 5, 11, 100))
def test_results_do_not_depend_on_how_many_rows_there_are_nor_on_which_one_a_response_takes(rows, block, monkeypatch):
    prompts = prompts_of(3, 9, 1, 6)
    options = dict(max_tokens=12, stop=STOP, samples=6, logprobs=True)
    expected, expected_logs = generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options)
    assert {1, 12} <= set(map(len, expected))
    monkeypatch.setitem(sampler.BLOCK, "cpu", block)
    monkeypatch.setattr(sampler, "WINDOW", 8)
    shapes = record_shapes(monkeypatch)
    found, logs = generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), rows=rows, **options)
    assert found == expected
    for a, b in zip(logs, expected_logs, strict=True):
        assert_close(torch.tensor(a), torch.tensor(b))
    assert max(B for B, T in shapes if T == 1) <= rows
    assert sum(B for B, T in shapes if T > 1) in (3, 4)  # a prompt once for all its samples; the one of 1 token may pass alone


def test_prompts_are_computed_in_passes_of_bounded_size(monkeypatch):
    prompts, options = prompts_of(3, 9, 4, 6, 10, 2), dict(max_tokens=12, stop=STOP, samples=2)
    expected = generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options)
    shapes = record_shapes(monkeypatch)
    for size, passes in ((20, [(2, 9), (2, 6), (2, 10)]), (5, [(1, n) for n in (3, 9, 4, 6, 10, 2)])):  # one that is too long: alone
        monkeypatch.setattr(sampler, "PREFILL", size)
        shapes.clear()
        assert generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options) == expected
        assert [shape for shape in shapes if shape[1] > 1] == passes


def test_a_long_prompt_makes_no_pass_smaller_but_its_own_and_a_pass_is_forgotten_when_it_has_entered(monkeypatch):
    prompts, kept = prompts_of(2, 2, 2, 2, 2, 9), []
    monkeypatch.setattr(sampler, "PREFILL", 10)
    shapes = record_shapes(monkeypatch)
    compute = sampler.Waiting.compute
    monkeypatch.setattr(sampler.Waiting, "compute", lambda self, *given: (kept.append(self.computed), compute(self, *given)))
    generate(MODEL, prompts, max_tokens=3, stop=(), samples=3, rows=7, generator=torch.Generator().manual_seed(0))
    assert [shape for shape in shapes if shape[1] > 1] == [(3, 2), (2, 2), (1, 9)]  # 7 rows ask for 3 prompts at first
    assert kept == [None] * 3


@pytest.fixture
def recorded(monkeypatch):
    """The compiled path without a GPU: what records does not run the step, and a replay runs it. A list of replays a recording."""
    replays = []

    def record(step, pool):
        number = len(replays)
        replays.append(0)
        assert pool == ("a pool" if sampler.RECORDER.recordings else None)  # all recordings share the first one's

        def replay():
            replays[number] += 1
            return step()

        return replay, "a pool"

    monkeypatch.setattr(sampler, "record", record)
    monkeypatch.setattr(sampler, "RECORDS", ("cpu",))
    monkeypatch.setitem(sampler.BLOCK, "cpu", 4)
    monkeypatch.setattr(sampler, "WINDOW", 16)
    torch.compiler.reset()
    return replays


@pytest.mark.parametrize("name", ("llama tied, scaled rope", pytest.param("qwen2", marks=pytest.mark.slow),
                                  pytest.param("qwen3 tied", marks=pytest.mark.slow)))
def test_a_compiled_step_equals_the_plain_one_bit_for_bit(name, recorded):
    model, traces = liven(LM(CONFIGS[name])), sampler.RECORDER.traces
    # Ragged prompts; rows that are refilled; stops in the middle of a block; other sizes the second time.
    for prompts, options in ((prompts_of(3, 9, 4), dict(max_tokens=40, samples=8, rows=16)),
                             (prompts_of(1, 12, 5, 2), dict(max_tokens=21, samples=6, rows=20))):
        found, expected = (generate(model, prompts, stop=STOP, logprobs=True, generator=torch.Generator().manual_seed(0), **options)
                           for model.compiled in (True, False))
        assert found == expected
        assert len({len(r) % 4 for r in found[0]}) == 4
    assert sampler.RECORDER.traces == traces + 1  # one for all sizes
    assert 6 <= len(recorded) <= 12 and sum(recorded) > 3 * len(recorded)  # 16 and 8 rows, 20 and 10; windows 16 to 56
    assert not sampler.RECORDER.recordings and sampler.RECORDER.pool is None  # no memory is kept


@pytest.mark.slow
def test_more_ways_to_sample_than_torch_keeps_traces_of_are_no_error(recorded):
    options = dict(max_tokens=12, stop=STOP, samples=8, logprobs=True)
    traces = sampler.RECORDER.traces
    with torch._dynamo.config.patch(recompile_limit=1):
        for temperature in (0, 1, 0.7, 1):
            found, expected = (generate(MODEL, prompts_of(3, 9), temperature=temperature, **options,
                                        generator=torch.Generator().manual_seed(0)) for sampler.RECORDS in (("cpu",), ()))
            assert found == expected
    assert sampler.RECORDER.traces == traces + 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", ("llama tied, scaled rope", "qwen3 tied"))
@pytest.mark.parametrize("options", (dict(temperature=0), dict(samples=8, rows=16)))
def test_a_gpu_gives_the_cpus_responses_compiled_or_not(name, options):
    model = liven(LM(CONFIGS[name]))
    options = dict(max_tokens=40, stop=STOP, logprobs=True, **options)
    expected = generate(model, prompts_of(3, 9, 4), generator=torch.Generator().manual_seed(0), **options)
    model, count = model.to("cuda"), sampler.RECORDER.count
    compiled, plain = (generate(model, prompts_of(3, 9, 4), generator=torch.Generator().manual_seed(0), **options)
                       for model.compiled in (True, False))
    assert sampler.RECORDER.count > count and compiled == plain
    assert plain[0] == expected[0]
    for a, b in zip(plain[1], expected[1], strict=True):
        assert_close(torch.tensor(a), torch.tensor(b))


def test_a_recording_is_replayed_for_the_same_addresses_and_numbers_only(monkeypatch):
    made = []
    monkeypatch.setattr(sampler, "record", lambda step, pool: (made.append(step) or step, pool))
    recorder, x, y = sampler.Recorder(), torch.zeros(3), torch.zeros(3)
    add = recorder(lambda tensor, number, scale: tensor.add_(number * scale.item()), [])
    for tensor, number, scale, count in ((x, 1, 2.0, 1), (x, 1, 2.0, 1), (y, 1, 2.0, 2), (x, 1, 3.0, 3), (x, 2, 2.0, 4), (y, 1, 2.0, 4)):
        before = tensor.clone()
        add(tensor, number, torch.tensor(scale))
        assert torch.equal(tensor, before + number * scale)  # once, also where it is recorded
        assert recorder.count == len(made) == count
    recorder.again()
    assert torch.equal(y, torch.full((3,), 6.0))
    recorder.forget()
    add(x, 1, torch.tensor(2.0))
    assert recorder.count == 5


def test_a_place_that_becomes_free_is_taken(monkeypatch):
    shapes = record_shapes(monkeypatch)
    responses = generate(MODEL, prompts_of(3), max_tokens=12, stop=STOP, samples=40, rows=4, generator=torch.Generator().manual_seed(0))
    steps = [B for B, T in shapes if T == 1]
    assert sum(steps) == sum(len(r) - 1 for r in responses)  # no row runs that is not asked for
    last_entry = max(i for i, B in enumerate(steps) if B == 4)
    assert all(B == 4 for B in steps[:last_entry])  # all are in use until none is waiting


def test_what_all_prompts_begin_with_is_computed_once(monkeypatch):
    head, tails = prompts_of(40)[0], prompts_of(3, 8, 1, seed=5)
    prompts, options = [head + tail for tail in tails], dict(max_tokens=10, stop=STOP, samples=4)
    expected = [argmax_loop(p, 10) for p in prompts]
    shapes = record_shapes(monkeypatch)
    assert generate(MODEL, prompts, temperature=0, max_tokens=10, stop=STOP) == expected
    assert shapes[:2] == [(1, 40), (3, 8)]
    monkeypatch.setattr("sampler.SHARE_FROM", 99)
    apart = generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options)
    monkeypatch.setattr("sampler.SHARE_FROM", 1)
    assert generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options) == apart


@pytest.mark.parametrize("prompts, shared", [([[1, 2, 3]], 0), ([[1, 2, 3], [1, 2, 4], [1, 2]], 1), ([[1, 2, 3]] * 2, 2),
                                             ([[1, 2], [2, 2]], 0), ([[1], [1, 2]], 0), ([[5, 6, 7, 1], [5, 6, 7, 9], [5, 6, 8]], 2)])
def test_the_common_prefix_leaves_every_prompt_a_token(prompts, shared):
    assert sampler.shared_prefix(prompts) == shared


@pytest.mark.parametrize("groups", (1, 3))
def test_attention_to_a_shared_prefix_and_to_a_rows_own_is_attention_to_both(groups):
    B, K, E, P, S = 3, 2, 8, 7, 5
    q, (prefix_k, prefix_v) = torch.randn(B, K, groups, E), torch.randn(2, K, P, E)
    k, v = torch.randn(2, B, K, S, E)
    visible = torch.arange(S) < torch.tensor([[1], [5], [3]])  # (B, S)
    found = model.attend_to_both(q, prefix_k, prefix_v, k, v, torch.zeros(B, 1, 1, S).masked_fill(~visible[:, None, None], -torch.inf))
    for b in range(B):
        n = visible[b].sum()
        keys, values = torch.cat((prefix_k, k[b, :, :n]), 1), torch.cat((prefix_v, v[b, :, :n]), 1)
        scores = (q[b].double() @ keys.double().transpose(1, 2) / math.sqrt(E)).softmax(-1)
        assert_close(found[b], (scores @ values.double()).float())


def test_generation_ends_with_its_last_row(monkeypatch):
    shapes = record_shapes(monkeypatch)
    responses = generate(MODEL, prompts_of(5), max_tokens=50, stop=range(61), samples=3)
    assert [len(r) for r in responses] == [1, 1, 1]
    assert shapes == [(1, 5)]


def test_a_finished_response_holds_one_stop_token_at_its_end():
    responses = generate(MODEL, prompts_of(4, 7), max_tokens=10, stop=STOP, samples=20, generator=torch.Generator().manual_seed(0))
    finished = [r for r in responses if r[-1] in STOP]
    cut = [r for r in responses if r[-1] not in STOP]
    assert finished and cut and len(responses) == 40
    assert all(sum(t in STOP for t in r) == 1 for r in finished)
    assert all(len(r) == 10 and not any(t in STOP for t in r) for r in cut)


def test_a_stop_id_that_the_model_cannot_emit_is_ignored(tmp_path):
    """As transformers does with the eos_token_id of a file that was written for a larger model."""
    theirs = liven(transformers.AutoModelForCausalLM.from_config(PEERS["llama"]))
    theirs.save_pretrained(tmp_path)
    ours, prompt = LM.load(tmp_path), prompts_of(5)[0]

    def greedy(stop):
        tokens = torch.tensor([prompt])
        return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20,
                               eos_token_id=stop, pad_token_id=0)[0, len(prompt):].tolist()

    fifth = greedy(None)[4]
    for stop in ([128001, 128009], [fifth, 128009, 61], [fifth, -1]):
        known = [i for i in stop if i >= 0]  # transformers warns of the others
        assert generate(ours, [prompt], max_tokens=20, stop=stop, temperature=0) == [greedy(known)]


def test_responses_come_question_by_question():
    prompts = prompts_of(2, 5, 9)
    expected = [argmax_loop(p, 6) for p in prompts for _ in range(3)]
    assert generate(MODEL, prompts, max_tokens=6, stop=STOP, samples=3, temperature=0) == expected


def test_the_generator_decides_everything_and_nothing_else_is_drawn_from():
    def run(seed):
        return generate(MODEL, prompts_of(3, 6), max_tokens=10, stop=STOP, samples=4, generator=torch.Generator().manual_seed(seed))

    first, state = run(0), torch.get_rng_state()
    torch.rand(7)
    assert run(0) == first != run(1)
    torch.set_rng_state(state)
    run(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("place", range(4))
def test_a_response_does_not_depend_on_its_neighbours(place):
    def response(neighbour_seed):
        prompts = prompts_of(2, 9, 4, 6, seed=neighbour_seed)
        prompts[place] = prompts_of(5, seed=99)[0]
        responses = generate(MODEL, prompts, max_tokens=12, stop=STOP, generator=torch.Generator().manual_seed(3 + place))
        return responses.pop(place), responses

    (a, neighbours), *others = [response(seed) for seed in (10, 20, 30)]
    assert all(a == b and neighbours != n for b, n in others)


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.8), (1.5, 0.8)])
def test_sampled_log_probs_are_those_of_the_sampled_policy_before_top_p_and_greedy_ones_the_models_own(temperature, top_p):
    prompts = prompts_of(3, 8)
    responses, logs = generate(MODEL, prompts, max_tokens=10, stop=STOP, samples=4, temperature=temperature, top_p=top_p,
                               generator=torch.Generator().manual_seed(0), logprobs=True)
    for prompt, response, log in zip([p for p in prompts for _ in range(4)], responses, logs, strict=True):
        logits = uncached(prompt + response)[len(prompt) - 1 : -1].double()  # (len(response), V)
        expected = (logits / (temperature or 1)).log_softmax(-1)
        assert_close(torch.tensor(log), expected[torch.arange(len(response)), response].float())


def test_a_temperature_next_to_0_is_greedy_and_overflows_nowhere():
    logits, uniform = torch.randn(50, 9) * 30, 1 - torch.rand(50)
    tokens, logprobs = sample(logits, uniform, 1e-38, 1.0)
    assert torch.equal(tokens, logits.argmax(-1)) and (logprobs == 0).all()


def test_every_step_is_seen_while_it_happens():
    seen = [[] for _ in range(6)]

    def on_step(rows, tokens):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            seen[row].append(token)

    assert generate(MODEL, prompts_of(3, 5), max_tokens=10, stop=STOP, samples=3, on_step=on_step) == seen


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="1 to 60 tokens"):
        generate(MODEL, [[1, 2], []], max_tokens=4, stop=STOP)


def test_a_prompt_may_fill_the_context_and_no_more():
    head, full = prefill(MODEL, prompts_of(10))[0], prompts_of(64 - 4 - 10)
    generate(MODEL, full, max_tokens=4, stop=(), prefix=head)
    with pytest.raises(ValueError, match="context is 64"):
        generate(MODEL, [full[0] + [1]], max_tokens=4, stop=(), prefix=head)


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}])
def test_sampling_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        generate(MODEL, prompts_of(3), max_tokens=4, stop=STOP, **options)


def test_no_prompts_give_no_responses():
    assert generate(MODEL, [], max_tokens=4, stop=STOP) == []
    assert generate(MODEL, [], max_tokens=4, stop=STOP, logprobs=True) == ([], [])


# ------------------------------------------------------------------ sample


def naive_distribution(logits, temperature, top_p):
    """Plain Python, float64: {token: probability} of the fewest likeliest tokens that together reach top_p."""
    weight = {token: math.exp(x / temperature) for token, x in enumerate(logits)}
    total, nucleus = sum(weight.values()), {}
    for token in sorted(weight, key=weight.get, reverse=True):
        if sum(nucleus.values()) < top_p * total:
            nucleus[token] = weight[token]
    return {token: w / sum(nucleus.values()) for token, w in nucleus.items()}


@PROPERTY
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=9, unique_by=lambda x: round(x, 2)), st.sampled_from([0.3, 1.0, 2.5]),
       st.sampled_from([1.0, 0.95, 0.6, 0.1]))
def test_an_even_grid_of_uniforms_draws_each_token_its_naive_share(logits, temperature, top_p):
    n = 10_000
    uniform = (torch.arange(n) + 0.5) / n
    tokens, _ = sample(torch.tensor(logits).expand(n, -1), uniform, temperature, top_p)
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    expected = naive_distribution(logits, temperature, top_p)
    assert all(abs(count - n * expected.get(token, 0)) <= 2 for token, count in enumerate(counts))
    assert sum(counts[token] for token in expected) == n  # nothing at all from outside the nucleus


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    uniform = torch.tensor([2**-24, 0.2, 0.9, 1.0])  # the smallest, two of the middle, the largest
    tokens, _ = sample(logits.expand(4, -1), uniform, 1.0, 1.0)
    assert tokens.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_no_random_number_draws_from_outside_the_nucleus(extreme, monkeypatch):
    monkeypatch.setattr("torch.rand", lambda *shape, **_: torch.full(shape, extreme))
    (response,) = generate(MODEL, prompts_of(3), max_tokens=5, stop=(), top_p=1e-6)
    (greedy,) = generate(MODEL, prompts_of(3), max_tokens=5, stop=(), temperature=0)
    assert response == greedy and 0 not in greedy


def test_generated_tokens_are_distributed_like_the_models_probabilities():
    prompt, n = prompts_of(5)[0], 4000
    responses = generate(MODEL, [prompt], max_tokens=1, stop=STOP, samples=n, temperature=1.5, generator=torch.Generator().manual_seed(0))
    expected = n * (uncached(prompt)[-1] / 1.5).softmax(-1)
    counts = torch.bincount(torch.tensor(responses).flatten(), minlength=61).float()
    rare = expected < 5  # one cell together
    observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    cells = len(observed)
    assert cells > 10
    assert ((observed - expected) ** 2 / expected).sum() < cells + 4 * math.sqrt(2 * cells)


# ------------------------------------------------------------------ transformers is the reference

ROPE = {"rope_type": "default", "rope_theta": 100.0}
SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, rms_norm_eps=0.03, pad_token_id=None, bos_token_id=None, eos_token_id=0)
PEERS = {
    "llama": transformers.LlamaConfig(**SIZES, rope_parameters=ROPE),
    "llama tied, scaled rope, head_dim": transformers.LlamaConfig(
        **SIZES, head_dim=16, rope_parameters={**LLAMA3_ROPE, "rope_theta": 100.0}, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES, rope_parameters=ROPE, use_sliding_window=False, sliding_window=4, max_window_layers=1),
    "qwen2 tied": transformers.Qwen2Config(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=ROPE),
    "qwen3 tied": transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=ROPE, tie_word_embeddings=True),
}


@pytest.fixture(params=PEERS)
def peer(request, tmp_path):
    """A transformers model and the directory it wrote."""
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS[request.param]))
    model.save_pretrained(tmp_path / "peer")
    return model, tmp_path / "peer"


TOKENS = random_tokens(3, 50)


@torch.no_grad()
def peer_logits(model):
    return model(TOKENS).logits


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


def test_a_directory_written_by_transformers_gives_its_logits(peer):
    model, directory = peer
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), peer_logits(model))


def test_the_older_spelling_of_rope_and_dtype_means_the_same(peer):
    model, directory = peer
    rope = dict(model.config.rope_parameters)
    edit(directory / "config.json", rope_parameters=None, rope_theta=rope.pop("rope_theta"), torch_dtype="float32", dtype=None,
         rope_scaling=rope if rope["rope_type"] == "llama3" else None)
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), peer_logits(model))


def test_rope_theta_counts_beside_rope_parameters_too(peer):
    model, directory = peer
    rope = dict(model.config.rope_parameters)
    edit(directory / "config.json", rope_theta=rope.pop("rope_theta"), rope_parameters=rope)
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), peer_logits(model))


def test_a_loaded_trained_and_saved_directory_gives_transformers_the_new_logits(peer, tmp_path):
    ours = liven(LM.load(peer[1]), seed=1)
    ours.save(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs) is type(peer[0])
    with torch.no_grad():
        assert_close(ours(TOKENS), peer_logits(theirs))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_made_here_is_saved_so_that_transformers_gives_its_logits(name, tmp_path):
    ours = liven(LM(CONFIGS[name]))
    ours.save(tmp_path / "ours")
    with torch.no_grad():
        assert_close(ours(TOKENS), peer_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")))


def test_a_tied_head_that_is_written_out_as_well_is_read(tmp_path):
    MODEL.save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    model = LM.load(tmp_path / "model")
    assert model.head.weight is model.embed.weight
    assert_same_bits(model, MODEL)


def test_a_tied_model_whose_file_holds_only_the_head_is_read(tmp_path):
    """safetensors' save_model writes of two names for one tensor the first."""
    theirs = liven(transformers.AutoModelForCausalLM.from_config(PEERS["llama tied, scaled rope, head_dim"]))
    theirs.save_pretrained(tmp_path)
    save_model(theirs, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = LM.load(tmp_path)
    assert ours.head.weight is ours.embed.weight
    with torch.no_grad():
        assert_close(ours(TOKENS), peer_logits(theirs))
        assert_close(ours(TOKENS), peer_logits(again))


def test_an_untied_model_whose_file_holds_only_the_head_is_refused(directory):
    change_tensors(directory, lambda t: t.pop("model.embed_tokens.weight"))
    assert "lacks tensors for its config.json: model.embed_tokens.weight" in refusal(directory)


# Written by other tools than transformers' newest; what each means is what transformers makes of it


def reread(directory):
    """Logits of a directory as transformers reads it."""
    return peer_logits(transformers.AutoModelForCausalLM.from_pretrained(directory))


@pytest.mark.parametrize("sharded", [False, True])
def test_rotary_frequencies_in_the_file_are_left_alone(sharded, tmp_path):
    theirs = liven(transformers.AutoModelForCausalLM.from_config(PEERS["llama"]))
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 2)}
    tensors = {**theirs.state_dict(), **frequencies, "model.rotary_emb.inv_freq": torch.ones(4)}
    theirs.save_pretrained(tmp_path, state_dict=tensors, max_shard_size="20KB" if sharded else "1GB")
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert (len(files) > 1) == sharded
    assert sum("inv_freq" in name for file in files for name in file) == 3
    with torch.no_grad():
        assert_close(LM.load(tmp_path)(TOKENS), reread(tmp_path))


@pytest.mark.parametrize("absent", [None, []])
def test_the_model_type_says_what_architectures_does_not(peer, absent):
    model, directory = peer
    edit(directory / "config.json", architectures=absent)
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), reread(directory))


@pytest.mark.parametrize("name, changes", [
    ("llama", {"hidden_act": "swish"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3, "layer_types": None}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": None}),  # from layer 28
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0,
               "layer_types": ["full_attention"] * 3}),
])
def test_other_spellings_of_what_the_model_does(name, changes, tmp_path):
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS[name]))
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with torch.no_grad():
        assert_close(LM.load(tmp_path)(TOKENS), reread(tmp_path))


def test_without_a_window_no_layer_slides(tmp_path):
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS["qwen2"]))
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", use_sliding_window=True, max_window_layers=0, layer_types=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    with torch.no_grad():
        assert_close(LM.load(tmp_path)(TOKENS), reread(tmp_path))


def test_a_window_that_some_layer_has_changes_what_transformers_computes(tmp_path):
    """Which is why it is refused."""
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS["qwen2"]))
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", use_sliding_window=True, sliding_window=4, max_window_layers=2, layer_types=None)
    assert (reread(tmp_path) - peer_logits(model)).abs().max() > 0.1
    assert "layers from 2 on" in refusal(tmp_path)


# ------------------------------------------------------------------ save and load


def assert_same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)  # dtype and shape too


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_to_the_bit(name, tmp_path):
    model = liven(LM(CONFIGS[name]))
    model.save(tmp_path / "a" / "new" / "model")
    back = LM.load(tmp_path / "a" / "new" / "model")
    assert back.config == model.config
    assert_same_bits(back, model)


def test_bfloat16_is_read_and_written_as_such(tmp_path):
    MODEL.save(tmp_path / "float32")
    half = LM.load(tmp_path / "float32", dtype=torch.bfloat16)
    assert_same_bits(half, liven(LM(MODEL.config)).to(torch.bfloat16))
    half.save(tmp_path / "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} == {torch.bfloat16}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    assert_same_bits(LM.load(tmp_path / "bfloat16"), half.to(torch.float32))


def test_a_stale_dtype_in_the_config_is_replaced(tmp_path):
    MODEL.save(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    LM.load(tmp_path / "model").save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {config.get("dtype", "float32"), config.get("torch_dtype", "float32")} == {"float32"}


def test_rope_frequencies_stay_exact_in_bfloat16():
    model = liven(LM(MODEL.config))
    exact = model.inv_freq.clone()
    model.to(torch.bfloat16)(TOKENS)
    torch.testing.assert_close(model.inv_freq, exact, rtol=0, atol=0)


def test_saving_over_a_model_leaves_only_the_new_one(tmp_path):
    LM(SMALL).save(tmp_path / "model")
    MODEL.save(tmp_path / "model")
    assert_same_bits(LM.load(tmp_path / "model"), MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_scaled_rope_needs_no_rope_type_to_come_back(tmp_path):
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}
    model = LM(replace(SMALL, rope_scaling=scaling))
    model.save(tmp_path / "model")
    assert torch.equal(LM.load(tmp_path / "model").inv_freq, model.inv_freq)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def raiser(error):
    def fail(*_, **__):
        raise error
    return fail


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [DISK_FULL,
                                   SafetensorError("No space left on device")], ids=["OSError", "SafetensorError"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_what_was_there_and_says_what_it_was_writing(exists, error, tmp_path, monkeypatch):
    if exists:
        LM(SMALL).save(tmp_path / "model")
    before = contents(tmp_path)
    monkeypatch.setattr("weights.save_file", raiser(error))
    with pytest.raises(OSError) as caught:
        MODEL.save(tmp_path / "model")
    assert contents(tmp_path) == before
    assert f"{tmp_path / 'model'}" in str(caught.value) and "No space left" in str(caught.value)


class BrokenTokenizer:
    def __init__(self, error):
        self.save = raiser(error)


@pytest.mark.parametrize("error", [DISK_FULL, KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_save_that_is_cut_off_after_the_weights_leaves_what_was_there(error, tmp_path):
    LM(SMALL).save(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        MODEL.save(tmp_path / "model", BrokenTokenizer(error))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_new_directory_that_cannot_take_the_old_ones_place_leaves_the_old(failing, tmp_path, monkeypatch):
    LM(SMALL).save(tmp_path / "model")
    before = contents(tmp_path)
    calls, rename = itertools.count(1), os.rename
    monkeypatch.setattr("os.rename", lambda *paths: raiser(DISK_FULL)() if next(calls) == failing else rename(*paths))
    with pytest.raises(OSError):
        MODEL.save(tmp_path / "model")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("thesis", ["mine", "mine/thesis.txt"])
def test_what_is_no_model_directory_is_not_overwritten(thesis, tmp_path):
    (tmp_path / thesis).parent.mkdir(exist_ok=True)
    (tmp_path / thesis).write_text("my thesis")
    before = contents(tmp_path)
    with pytest.raises((OSError, ValueError), match="mine"):
        MODEL.save(tmp_path / "mine")
    assert contents(tmp_path) == before


# ------------------------------------------------------------------ directories that are no good


@pytest.fixture
def directory(tmp_path):
    """A good one, for a test to spoil."""
    liven(LM(replace(SMALL, n_layers=1, qkv_bias=True))).save(tmp_path / "model")
    return tmp_path / "model"


def refusal(directory, error=ValueError):
    with pytest.raises(error) as caught:
        LM.load(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_missing_directory_or_file_is_named(directory):
    assert "nowhere/config.json is missing" in refusal(directory / "nowhere", FileNotFoundError)
    (directory / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(directory, FileNotFoundError)
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal(directory, FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b'{"vocab_size": 61,', b"\xff\xfe\x00", b"[1, 2]", b"[" * 100_000,
                                     b'{"n": %s}' % (b"9" * 5000)])
def test_a_config_that_is_no_json_object_is_refused(directory, content):
    (directory / "config.json").write_bytes(content)
    assert "model/config.json" in refusal(directory)


@pytest.mark.parametrize("changes, words", [
    ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    ({"architectures": [], "model_type": None}, ["LlamaForCausalLM"]),
    ({"architectures": None, "model_type": "mistral"}, ["mistral", "LlamaForCausalLM"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope", "yarn"]),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope", "linear"]),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope", "dynamic"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["llama3", "low_freq_factor"]),
    ({"rope_scaling": "llama3"}, ["rope"]),
    ({"rope_scaling": {**LLAMA3_ROPE, "factor": "4"}}, ["factor"]),
    ({"rope_theta": "big"}, ["rope_theta"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
    ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, ["use_sliding_window", "layers from 0 on"]),
    ({"use_sliding_window": True, "max_window_layers": "1"}, ["use_sliding_window", "'1'"]),
    ({"layer_types": ["chunked_attention"]}, ["layer_types", "chunked_attention"]),
    ({"layer_types": ["sliding_attention"], "sliding_window": 4}, ["sliding"]),
    ({"attention_bias": True}, ["attention_bias"]),
    ({"mlp_bias": True}, ["mlp_bias"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    ({"hidden_size": None}, ["hidden_size"]),
    ({"num_hidden_layers": 0}, ["n_layers"]),
    ({"num_attention_heads": 0}, ["n_heads"]),
    ({"vocab_size": "61"}, ["vocab_size"]),
    ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
    ({"head_dim": 15}, ["head_dim"]),
])
def test_what_the_model_does_not_do_is_refused_by_name(directory, changes, words):
    edit(directory / "config.json", **changes)
    message = refusal(directory)
    assert all(word in message for word in ["config.json", *words])


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_missing_tensor_is_named(directory):
    change_tensors(directory, lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"))
    assert "model.layers.0.self_attn.k_proj.bias" in refusal(directory)


def test_an_unknown_tensor_is_named(directory):
    change_tensors(directory, lambda t: t.update({"model.layers.1.surprise": torch.zeros(2)}))
    assert "model.layers.1.surprise" in refusal(directory)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(directory):
    change_tensors(directory, lambda t: t.update({"model.norm.weight": torch.zeros(31)}))
    message = refusal(directory)
    assert all(word in message for word in ("model.norm.weight", "31", "32"))


def test_of_a_hundred_unknown_tensors_four_are_named_and_the_rest_counted(directory):
    change_tensors(directory, lambda t: t.update({f"surprise.{i:03}": torch.zeros(1) for i in range(108)}))
    assert "surprise.000, surprise.001, surprise.002, surprise.003 and 104 more" in refusal(directory)


def test_a_tied_model_whose_file_has_another_head_is_refused(directory):
    edit(directory / "config.json", tie_word_embeddings=True)  # transformers would quietly not tie these
    assert "lm_head.weight" in refusal(directory)


@pytest.mark.parametrize("length", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_refused(directory, length):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "model.safetensors" in refusal(directory)


def test_nothing_is_unpickled(directory):
    torch.save({"x": 1}, directory / "model.safetensors")
    assert "model.safetensors" in refusal(directory)


# Shards, and the files that travel with a model


def test_shards_written_by_transformers_are_read_and_ours_are_read_by_it(tmp_path):
    torch.manual_seed(0)
    theirs = liven(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    ours = LM.load(tmp_path / "theirs")
    weights.write_directory(tmp_path / "ours", ours.source, ours.disk_tensors(), ours.companions, shard_bytes=20_000)
    shards = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(s.stat().st_size < 24_000 for s in shards)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        assert (again(tokens).logits - theirs(tokens).logits).abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(LM.load(tmp_path / "ours").parameters(), ours.parameters(), strict=True))


@pytest.fixture
def sharded(tmp_path):
    model = liven(LM(SMALL))
    weights.write_directory(tmp_path / "model", weights.config_to_json(SMALL), model.disk_tensors(), {}, shard_bytes=20_000)
    return tmp_path / "model"


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", "weights.bin", ""])
def test_an_index_cannot_reach_out_of_its_directory(sharded, shard):
    (sharded.parent / "outside.safetensors").write_bytes(next(sharded.glob("model-*")).read_bytes())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json" in refusal(sharded)


def test_a_missing_shard_and_a_lying_index_are_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    moved = next(name for name, shard in index["weight_map"].items() if shard == first)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"] | {moved: last}}))
    assert moved in refusal(sharded) and "where it is not" in refusal(sharded)
    (sharded / last).unlink()
    assert last in refusal(sharded, FileNotFoundError)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "weight_map" in refusal(sharded)


def test_what_came_with_a_model_leaves_with_it_to_the_byte(directory, tmp_path):
    carried = {"tokenizer.json": b"{ }", "generation_config.json": b'{"eos_token_id": [1, 2]}\n', "LICENSE": b"terms\r\n"}
    for name, content in carried.items():
        (directory / name).write_bytes(content)
    (directory / "pytorch_model.bin").write_bytes(b"\x80 a pickle")
    (directory / "old.safetensors").write_bytes(b"stale")
    LM.load(directory).save(tmp_path / "copy")
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in carried} == carried
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted([*carried, "config.json", "model.safetensors"])


@pytest.mark.slow
def test_loading_needs_the_model_and_its_largest_tensor_and_no_more(tmp_path):
    config = ModelConfig(vocab_size=16_000, dim=1024, n_layers=17, n_heads=16, n_kv_heads=8, head_dim=64, ffn_dim=3584)
    LM(config).save(tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    script = ("import sys; from model import LM; import torch; torch.ones(99, 99) @ torch.ones(99, 99)\n"
              "def kib(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])\n"
              "before = kib('VmRSS'); model = LM.load(sys.argv[1]); print((kib('VmHWM') - before) * 1024)")
    growth = int(subprocess.run([sys.executable, "-c", script, tmp_path / "big"], check=True, capture_output=True, text=True).stdout)
    assert size > 1e9 and growth < 1.15 * size, (size, growth)


# ------------------------------------------------------------------ the README's table


WIDE = dict(vocab_size=2000, hidden_size=448, intermediate_size=1200, num_hidden_layers=4, num_attention_heads=7,
            num_key_value_heads=1, max_position_embeddings=131072)
LLAMA31_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}
PUBLISHED_SHAPES = {  # fewer layers and a smaller width than the published ones; head size, rotation, biases, norms and ties are theirs
    "Llama 3 8B": transformers.LlamaConfig(
        **WIDE, head_dim=128, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "Llama 3.1 8B": transformers.LlamaConfig(**WIDE, head_dim=128, rms_norm_eps=1e-5, rope_parameters=LLAMA31_ROPE),
    "Llama 3.2 1B": transformers.LlamaConfig(
        **WIDE, head_dim=64, rms_norm_eps=1e-5, rope_parameters={**LLAMA31_ROPE, "factor": 32.0}, tie_word_embeddings=True),
    "Qwen2.5 0.5B": transformers.Qwen2Config(
        **WIDE, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True),
    "Qwen2.5 7B": transformers.Qwen2Config(**WIDE, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "Qwen3 0.6B": transformers.Qwen3Config(
        **WIDE, head_dim=128, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True),
    "Qwen3 8B": transformers.Qwen3Config(
        **WIDE, head_dim=128, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_SHAPES)
def test_parity_over_a_thousand_positions(name, tmp_path):
    """Shown by `python -m pytest -q -s -m slow -k parity`."""
    theirs = liven(transformers.AutoModelForCausalLM.from_config(PUBLISHED_SHAPES[name]))
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, 1200) * 32
    with torch.no_grad():
        expected, ours = theirs(tokens).logits, LM.load(tmp_path)(tokens)
        rounding = (theirs.double()(tokens).logits - expected).abs().max().item()
    worst = (ours - expected).abs().max().item()
    print(f"\n{name}: worst difference {worst:.1e} in fp32 logits of standard deviation {expected.std():.2f}; transformers "
          f"{transformers.__version__} in fp32 is {rounding:.1e} from itself in float64")
    assert worst < rounding
