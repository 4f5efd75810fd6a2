"""A pretended device: what a GPU would complain of or wait for, found on a CPU.

Its tensors say that they are on another device, and their numbers lie on the CPU. Every operation
passes through `Device`: one that mixes them with the CPU's own tensors fails, as on a GPU, and one
that must know a number before the program can go on is a synchronisation, written down with the
line that asked. What a real GPU does beyond that, this cannot tell.
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sampler
from grpo import Rollout, update
from model import LM, ModelConfig
from run.batches import SharedPrompts
from sampler import generate, prefill

NAME = torch.device("meta")
HOME = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# They give as many elements as the numbers say, or the numbers themselves.
ASKING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_dim)
ASKING += (aten.is_nonzero, aten._unique2)
MOVING = (aten._to_copy, aten.copy_)  # between the two devices


class Pretended(torch.Tensor):
    """A tensor of the device; `numbers` is the CPU's."""

    @staticmethod
    def __new__(cls, numbers):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=NAME,
            requires_grad=numbers.requires_grad,
        )
        made.numbers = numbers.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, key):
        return super().__getitem__(on_the_device(key))

    def __setitem__(self, key, value):
        super().__setitem__(on_the_device(key), value)

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of the device")


def on_the_device(key):
    """An index whose lists are tensors of the device: torch would make them on the CPU."""
    if type(key) is tuple:
        return tuple(map(on_the_device, key))
    return torch.tensor(key, device=NAME) if type(key) is list else key


def has_a_place(x):
    """Whether it must be on the device: the CPU's numbers without a dimension go with any."""
    return isinstance(x, Pretended) or x.dim() > 0


def tensors_in(x):
    """All tensors in nested lists and tuples (torch's own walk takes most of a test's time)."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [y for part in x for y in tensors_in(part)] if isinstance(x, (list, tuple)) else []


def changed(x, kind, change):
    """The same nested lists and tuples, with `change` made to the tensors of this kind."""
    if isinstance(x, kind):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)(changed(part, kind, change) for part in x)
    return x


class Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = []  # the lines that wait for the device, each with the functions it is in

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet, kwargs = function.overloadpacket, dict(kwargs or {})
        given = tensors_in([*args, *kwargs.values()])
        there = [isinstance(x, Pretended) for x in given if has_a_place(x)]
        to = kwargs.get("device")
        stays = any(there) if to is None else torch.device(to) == NAME  # on the device
        if packet is aten.copy_:
            stays = there[:1] == [True]
        if any(there) and packet not in MOVING and not all(there):
            raise RuntimeError(f"{function} mixes the device with the CPU: {self.line()}")
        if any(there) and (not stays or packet in ASKING or self.indexes_with_bools(packet, args)):
            self.wait(function)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        numbers, values = changed((args, [*kwargs.values()]), Pretended, lambda x: x.numbers)
        found = function(*numbers, **dict(zip(kwargs, values)))
        if function._schema.is_mutable and args and isinstance(found, torch.Tensor):
            return args[0]  # in place
        return changed(found, torch.Tensor, Pretended) if stays else found

    def indexes_with_bools(self, packet, args):
        if packet not in (aten.index, aten.index_put, aten.index_put_):
            return False
        return any(i is not None and i.dtype == torch.bool for i in args[1])

    def wait(self, function):
        callers = {frame.name for frame in traceback.extract_stack()}
        self.waits.append((f"{self.line()} ({function.overloadpacket})", callers))

    def line(self):
        """The innermost line of the program itself."""
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if "site-packages" in path.parts:
                continue  # a library, also where the environment lies in the project's own folder
            if path.is_relative_to(HOME) and not path.name.startswith("test_"):
                return f"{path.relative_to(HOME)}, {frame.line}"
        return "a test"


def moved(model):
    """The model, on the device."""
    for part in model.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                there = Pretended(weight.detach())
                part._parameters[name] = torch.nn.Parameter(there, weight.requires_grad)
    return model


def model_of(**more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=29, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=40)
    return LM(ModelConfig(**{**sizes, **more}))


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setitem(sampler.BLOCK, "meta", 16)
    tensor = torch.tensor  # makes a tensor of another device below what can be pretended
    monkeypatch.setattr(
        torch, "tensor", lambda data, device=None, **more: tensor(data, **more).to(device)
    )
    with Device() as device:
        yield device


def seeded():
    return torch.Generator().manual_seed(2)


def prompts_of(count=4):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(4, 29, (3 + 5 * i,), generator=g).tolist() for i in range(count)]


RESULTS = ["ended.any(1)", "tokens.tolist()", "logprobs.tolist()"]  # once, at the end
LOOK = "if not done.any()"
ENDED = ["kept = int(", "gaps = ", "movers = ", "self.longest = int("]  # where rows have ended


@pytest.mark.parametrize(
    "dtype, rows, behind",
    [  # with 5 rows, rows that end give their place to others
        (torch.float32, None, True),
        (torch.float32, 5, False),
        (torch.float32, 5, True),
        (torch.bfloat16, 5, True),
        (torch.float16, None, False),
    ],
)
def test_sampling_mixes_no_devices_and_waits_for_one_look_a_block(
    device, rows, dtype, behind, monkeypatch
):
    """`behind`: behind a shared prefix, as the teacher's replies are."""
    found = []
    for model in (model_of().to(dtype), moved(model_of().to(dtype))):
        device.waits.clear()
        prefix = prefill(model, [[5, 6, 7, 8]])[0] if behind else None
        blocks = count_calls(monkeypatch, sampler.Batch, "remove_done")
        options = dict(max_tokens=40, stop={3}, samples=3, logprobs=True, rows=rows, prefix=prefix)
        found.append(generate(model, prompts_of(), **options, generator=seeded()))
    (tokens, logs), (tokens_there, logs_there) = found
    assert len({len(row) for row in tokens}) > 2
    if dtype == torch.float32:
        assert tokens_there == tokens
        for ours, theirs in zip(logs, logs_there, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-5)
    else:  # attention rounds elsewhere on another device, and a token may tip over
        assert sum(a[0] == b[0] for a, b in zip(tokens, tokens_there)) >= 11
    assert not [line for line, callers in device.waits if "step" in callers]
    lines = [line for line, _ in device.waits]
    looks = sum(LOOK in line for line in lines)
    # A look for each block of 16 steps, and for each time that rows were filled.
    assert looks == len(blocks) <= (3 if rows is None else 15) + 1
    for part in RESULTS:
        assert sum(part in line for line in lines) == 1
    for part in ENDED:
        assert 0 < sum(part in line for line in lines) <= looks
    known = (LOOK, *RESULTS, *ENDED)
    assert not [line for line in lines if not any(part in line for part in known)]


def count_calls(monkeypatch, owner, name):
    """A list that grows with each call."""
    calls, function = [], getattr(owner, name)

    def counted(*args):
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


def rollouts_of():
    rollouts = []
    for prompt in prompts_of():
        rollouts += [Rollout(prompt, [7, 8, 9][:n], True) for n in (1, 2, 3)]
    for i, rollout in enumerate(rollouts):
        rollout.advantage = 1.0 - i % 2 * 2
        rollout.guided_from = 1 if i % 3 == 2 else None
    return rollouts


def test_an_update_mixes_no_devices_and_gives_the_cpus_weights(device, monkeypatch):
    found = []
    for model in (model_of(tie_embeddings=True), moved(model_of(tie_embeddings=True))):
        passes = count_calls(monkeypatch, SharedPrompts, "__init__")
        model.head.weight = model.embed.weight
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        metrics = update(model, optimizer, rollouts_of(), micro_batch=60)
        weights = [p.detach().cpu() for p in model.parameters()]
        found.append((weights, metrics))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)
    # The loss and the size of the gradient once; of a pass its places, and two numbers a metric; and of a pass
    # for log π_old its results and where they are.
    most = {"norm = float(": 1, "[float(loss)]": 1, "at = where.flatten()": len(passes)}
    most |= {
        "sums.append(": 2 * len(metrics) * len(passes),
        "logprobs.cpu(), mask": 2 * len(passes),
    }
    lines = [line for line, _ in device.waits if not line.startswith("a test")]
    assert not [line for line in lines if not any(part in line for part in most)]
    for part, count in most.items():
        assert 0 < sum(part in line for line in lines) <= count
    assert len(passes) >= 4


def test_what_would_fail_on_a_gpu_fails_here_and_what_would_wait_is_counted(device):
    x, here = moved(model_of()).embed.weight, torch.ones(29, 32)
    for mixed in (lambda: x + here, lambda: here @ x.T, lambda: torch.cat((x, here))):
        with pytest.raises(RuntimeError, match="mixes the device"):
            mixed()
    assert not device.waits
    assert (x + 1.0).device == x.device and not device.waits
    for asks in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(), lambda: bool(x[0, 0])):
        before = len(device.waits)
        asks()
        assert len(device.waits) == before + 1
