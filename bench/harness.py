"""Timing done one way everywhere: check the answer, warm up, rotate buffers, report the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Buffers are rotated until a round touches this many bytes: three times the caches of most chips.
_ROTATED_BYTES = 3 * 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile, least, and how many were taken."""

    median: float
    p10: float
    p90: float
    least: float
    samples: int

    def __str__(self) -> str:
        return (
            f"{self.median * 1e6:9.1f} us  (p10 {self.p10 * 1e6:.1f}, p90 {self.p90 * 1e6:.1f}, "
            f"least {self.least * 1e6:.1f}; {self.samples} samples)"
        )


def measure(
    call: Callable[..., object],
    inputs: Sequence[Sequence[Any]],
    *,
    check: Callable[[], None] | None = None,
    samples: int = 30,
    seconds: float = 2.0,
) -> Timing:
    """Time `call(*inputs[i])`, taking turns through the inputs so that none stays in a cache.

    Args:
        call: what to time. On CUDA it must use the current stream; it is timed with events.
        inputs: argument lists, from `rotate`.
        check: compares the call with its reference and raises; it runs first, so that a wrong
            kernel is never timed.
        samples: at least so many.
        seconds: go on sampling for about so long.

    Raises:
        ValueError: there are no inputs or no samples.
    """
    if not inputs or samples < 1:
        raise ValueError(
            f"measure: {len(inputs)} inputs and {samples} samples: there must be one of each"
        )
    if check is not None:
        check()
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in inputs[0])
    once = _time_cuda if on_cuda else _time_cpu
    for index in range(max(3, min(len(inputs), 10))):
        once(call, inputs[index % len(inputs)])
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < samples or time.perf_counter() - start < seconds:
        times.append(once(call, inputs[len(times) % len(inputs)]))
        if len(times) >= 100_000:
            break
    times.sort()
    return Timing(
        median=statistics.median(times),
        p10=times[len(times) // 10],
        p90=times[(len(times) * 9) // 10],
        least=times[0],
        samples=len(times),
    )


def measure_in_graph(
    call: Callable[..., object],
    inputs: Sequence[Sequence[Any]],
    *,
    calls: int = 40,
    samples: int = 15,
) -> Timing:
    """Time CUDA work without the launches: many calls in one CUDA graph, replayed.

    Args:
        call: uses the current stream, and nothing that cannot be captured.
        inputs: argument lists, from `rotate`; they take turns.
        calls: in the graph, at least; every argument list has as many.
        samples: replays that are timed.

    Raises:
        ValueError: there are no inputs.
    """
    if not inputs:
        raise ValueError("measure_in_graph: there are no inputs: there must be one")
    rounds = -(-calls // len(inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in inputs[:3]:
            call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for arguments in inputs:
                call(*arguments)
    for _ in range(3):
        graph.replay()
    times = sorted(_time_cuda(graph.replay, ()) / (rounds * len(inputs)) for _ in range(samples))
    return Timing(
        median=statistics.median(times),
        p10=times[len(times) // 10],
        p90=times[(len(times) * 9) // 10],
        least=times[0],
        samples=len(times),
    )


def rotate(make: Callable[[int], Sequence[Any]], *, most: int = 64) -> list[Sequence[Any]]:
    """Argument lists from `make(index)`, as many as together exceed the caches.

    Args:
        make: returns fresh arguments for an index.
        most: never more than so many.
    """
    inputs = [make(0)]
    size = sum(x.numel() * x.element_size() for x in inputs[0] if isinstance(x, Tensor))
    count = min(most, max(1, -(-_ROTATED_BYTES // max(size, 1))))
    return inputs + [make(index) for index in range(1, count)]


def _time_cpu(call: Callable[..., object], arguments: Sequence[object]) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _time_cuda(call: Callable[..., object], arguments: Sequence[object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
