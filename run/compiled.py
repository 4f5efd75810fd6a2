"""The compiled decoding step: PyTorch's own kernels, recorded as a CUDA graph and replayed.

A decoding step reads every weight and computes little, so fusing its operations could save little.
What costs is launching hundreds of kernels a token. A CUDA graph launches all of them at once.
torch.compile(step, backend=RECORDER, fullgraph=True) only traces the step, as one graph of
PyTorch's operations, and hands it to the backend below. That backend runs these operations and
records the kernels that they launch. It generates no code, so Triton has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

RECORDING_DEVICES = ("cuda",)

Again = Callable[[], Any]  # takes a step again
Key = tuple[Any, ...]  # what a recording is valid for: the step's graph, and each of its inputs
Recordings = dict[Key, tuple[Again, Any]]  # what replays it, and its pool of memory


def compile_step(step: Callable[..., Any], args: tuple[Any, ...], recordings: Recordings) -> Again:
    """Take step(*args), and return what takes the same step again.

    `recordings` is an empty dict at first. What is recorded is added to it, and used again when the
    same tensors come back. Their memory is free once it is cleared.
    """
    # Not at the top of the file: the compiler takes longer to load than torch itself.
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.fx.experimental import _config as sizes

    RECORDER.recordings = recordings
    # torch keeps the trace, one for all sizes, from one call to the next.
    compiled = torch.compile(step, backend=RECORDER, fullgraph=True, dynamic=True)
    # Two sizes that are equal once need not be so the next time.
    with sizes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        try:
            compiled(*args)
        except FailOnRecompileLimitHit:
            # Many more models and ways to sample than a training run has: begin anew.
            torch.compiler.reset()
            compiled(*args)
    again, _ = recordings[RECORDER.key]
    return again


class Recorder:
    """The backend of torch.compile. It is called with the step as a graph of PyTorch's operations.

    The first call of that graph runs the operations and then records them over the very tensors it
    was given, weights and caches too, without copying any. A call with the same addresses replays
    the recording, and one with other addresses makes a new one.
    """

    def __init__(self) -> None:
        self.traces = self.count = 0  # steps traced and recordings made since the program began
        self.recordings: Recordings = {}  # those of the batch that is at work
        self.key: Key = ()  # of the recording that was made or looked up last

    def __call__(self, traced: Callable[..., Any], _: Any) -> Callable[..., Any]:
        self.traces += 1
        return partial(self.run, traced)

    def run(self, traced: Callable[..., Any], *inputs: Any) -> Any:
        self.key = (traced, *map(identity, inputs))
        if self.key in self.recordings:
            again, _ = self.recordings[self.key]
            return again()
        outputs = traced(*inputs)  # the libraries set themselves up here, which cannot be recorded
        # All share the first one's pool of memory, because only one runs at a time.
        pool = next((pool for _, pool in self.recordings.values()), None)
        self.recordings[self.key] = record(partial(traced, *inputs), pool)
        self.count += 1
        return outputs


RECORDER = Recorder()


def identity(value: Any) -> Any:
    """What a recording depends on: a number's value, a tensor's address."""
    if not isinstance(value, Tensor):
        return value
    # torch.compile passes a float as a tensor of no dimension.
    return value.data_ptr() if value.dim() else value.item()


def record(step: Again, pool: Any) -> tuple[Again, Any]:
    """Record what `step` launches, without running it: (what runs it, its pool of memory)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = step()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay, graph.pool()
