"""Tests of the compiled decoding step: against the plain one, bit for bit, without a GPU and on one."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch

import sampler
from data.tokenizer import Tokenizer
from model import LM
from run import compiled
from run.compiled import RECORDER, compile_step
from run.loading import load_model
from sampler import generate
from test_model import CONFIGS, SMALL, assert_close, liven, prompts_of, random_tokens
from test_sampler import STOP


@pytest.fixture
def recorded(monkeypatch):
    """The compiled path without a GPU: what records does not run the step, and a replay runs it. A list of replays a recording."""
    replays, kept = [], []

    def record(step, pool):
        number = len(replays)
        replays.append(0)
        assert pool == (
            "a pool" if RECORDER.recordings else None
        )  # all recordings share the first one's

        def replay():
            replays[number] += 1
            return step()

        kept.append(weakref.ref(replay))
        return replay, "a pool"

    monkeypatch.setattr(compiled, "record", record)
    monkeypatch.setitem(sampler.BLOCK, "cpu", 4)
    monkeypatch.setattr(sampler, "WINDOW", 16)
    torch.compiler.reset()
    yield replays
    assert kept and not any(replay() for replay in kept)  # or their memory would be, after a call


@pytest.mark.parametrize(
    "name",
    (
        "llama tied, scaled rope",
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("qwen3 tied", marks=pytest.mark.slow),
    ),
)
def test_a_compiled_step_equals_the_plain_one_bit_for_bit(name, recorded):
    model, traces = liven(LM(CONFIGS[name])), RECORDER.traces
    # Ragged prompts; rows that are refilled; stops in the middle of a block; other sizes the second time.
    for prompts, options in (
        (prompts_of(3, 9, 4), dict(max_tokens=40, samples=8, rows=16)),
        (prompts_of(1, 12, 5, 2), dict(max_tokens=21, samples=6, rows=20)),
    ):
        found, expected = (
            generate(
                model,
                prompts,
                stop=STOP,
                logprobs=True,
                generator=torch.Generator().manual_seed(0),
                **options,
            )
            for model.compile_step in (compile_step, None)
        )
        assert found == expected
        assert len({len(r) % 4 for r in found[0]}) == 4
    assert RECORDER.traces == traces + 1  # one for all sizes
    assert 6 <= len(recorded) <= 12 and sum(recorded) > 3 * len(
        recorded
    )  # 16 and 8 rows, 20 and 10; windows 16 to 56


def test_a_compiled_step_reads_the_shared_prefix_as_the_plain_one_does(recorded):
    model = liven(LM(replace(SMALL, n_layers=1)))
    head = random_tokens(sampler.SHARE_FROM, seed=7).tolist()
    prompts = [head + tail for tail in prompts_of(3, 8, 5)]
    found, expected = (
        generate(
            model,
            prompts,
            max_tokens=20,
            stop=STOP,
            samples=4,
            logprobs=True,
            generator=torch.Generator().manual_seed(0),
        )
        for model.compile_step in (compile_step, None)
    )
    assert found == expected and recorded


@pytest.mark.slow
def test_more_ways_to_sample_than_torch_keeps_traces_of_are_no_error(recorded):
    options = dict(max_tokens=12, stop=STOP, samples=8, logprobs=True)
    model, traces = liven(LM(CONFIGS["llama tied, scaled rope"])), RECORDER.traces
    with torch._dynamo.config.patch(recompile_limit=1):
        for temperature in (0, 1, 0.7, 1):
            found, expected = (
                generate(
                    model,
                    prompts_of(3, 9),
                    temperature=temperature,
                    **options,
                    generator=torch.Generator().manual_seed(0),
                )
                for model.compile_step in (compile_step, None)
            )
            assert found == expected
    assert RECORDER.traces == traces + 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", ("llama tied, scaled rope", "qwen3 tied"))
@pytest.mark.parametrize("options", (dict(temperature=0), dict(samples=8, rows=16)))
def test_a_gpu_gives_the_cpus_responses_compiled_or_not(name, options):
    model = liven(LM(CONFIGS[name]))
    options = dict(max_tokens=40, stop=STOP, logprobs=True, **options)
    expected = generate(
        model, prompts_of(3, 9, 4), generator=torch.Generator().manual_seed(0), **options
    )
    model, count = model.to("cuda"), RECORDER.count
    fast, plain = (
        generate(model, prompts_of(3, 9, 4), generator=torch.Generator().manual_seed(0), **options)
        for model.compile_step in (compile_step, None)
    )
    assert RECORDER.count > count and fast == plain
    assert plain[0] == expected[0]
    for a, b in zip(plain[1], expected[1], strict=True):
        assert_close(torch.tensor(a), torch.tensor(b))


def test_a_recording_is_replayed_for_the_same_addresses_and_numbers_only(monkeypatch):
    made = []
    monkeypatch.setattr(compiled, "record", lambda step, pool: (made.append(step) or step, pool))
    recorder, x, y = compiled.Recorder(), torch.zeros(3), torch.zeros(3)
    add = recorder(lambda tensor, number, scale: tensor.add_(number * scale.item()), [])
    for tensor, number, scale, count in (
        (x, 1, 2.0, 1),
        (x, 1, 2.0, 1),
        (y, 1, 2.0, 2),
        (x, 1, 3.0, 3),
        (x, 2, 2.0, 4),
        (y, 1, 2.0, 4),
    ):
        before = tensor.clone()
        add(tensor, number, torch.tensor(scale))
        assert torch.equal(tensor, before + number * scale)  # once, also where it is recorded
        assert recorder.count == len(made) == count
    again, _ = recorder.recordings[recorder.key]
    again()
    assert torch.equal(y, torch.full((3,), 6.0))
    recorder.recordings.clear()
    add(x, 1, torch.tensor(2.0))
    assert recorder.count == 5


@pytest.mark.parametrize("compiling", ("auto", "off"))
@pytest.mark.parametrize("devices", (("cpu",), ("cuda",)))
def test_a_model_is_compiled_where_its_device_records_unless_it_is_told_not_to(
    compiling, devices, tmp_path, monkeypatch
):
    tokenizer = Tokenizer.builtin()
    LM(replace(SMALL, vocab_size=tokenizer.vocab_size)).save(tmp_path / "model", tokenizer)
    monkeypatch.setattr("run.loading.RECORDING_DEVICES", devices)
    model, _ = load_model(str(tmp_path / "model"), "cpu", torch.float32, compiling)
    expected = compile_step if (compiling, devices) == ("auto", ("cpu",)) else None
    assert model.compile_step is expected
    assert copy.deepcopy(model).compile_step is expected
    model.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
