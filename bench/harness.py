"""Timing done one way everywhere: warm up, rotate buffers, take turns, report the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Buffers are rotated until a round touches this many bytes: three times the caches of most chips.
_ROTATED_BYTES = 3 * 64 * 2**20
#: Seconds that a burst of calls takes, about; what counts as a short call; rounds at most.
_BURST, _SHORT, _MOST_ROUNDS = 2e-3, 2e-2, 200


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile, least, and how many were taken."""

    median: float
    p10: float
    p90: float
    least: float
    samples: int

    @property
    def spread(self) -> float:
        """Between the 10th and the 90th percentile, as a share of the median."""
        return (self.p90 - self.p10) / self.median

    def __str__(self) -> str:
        return (
            f"{self.median * 1e6:9.1f} us  (p10 {self.p10 * 1e6:.1f}, p90 {self.p90 * 1e6:.1f}, "
            f"least {self.least * 1e6:.1f}; {self.samples} samples)"
        )


def race(
    contestants: Mapping[str, Callable[[int], object]], *, seconds: float, rounds: int = 5
) -> dict[str, Timing]:
    """Time contestants by turns (A B C A B C ...), so that whatever disturbs the machine hits all.

    A sample is a burst of calls. One that is not counted goes before short ones, because the first
    call finds the threads asleep and the caches full of another contestant's data.

    Args:
        contestants: name -> `call(index)`; the index counts up, for choosing buffers that have left
            the caches.
        seconds: that all rounds together should take.
        rounds: at least so many.

    Raises:
        ValueError: `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"race: rounds is {rounds}: it must be at least 1")
    turn = dict.fromkeys(contestants, 0)

    def burst(name: str, calls: int, warm_up: bool) -> float:
        call, index = contestants[name], turn[name]
        turn[name] += calls + warm_up
        if warm_up:
            call(index)
        start = time.perf_counter()
        for offset in range(warm_up, warm_up + calls):
            call(index + offset)
        return (time.perf_counter() - start) / calls

    once = {name: min(burst(name, 1, False) for _ in range(2)) for name in contestants}
    calls = {name: max(1, min(50, int(_BURST / max(once[name], 1e-7)))) for name in contestants}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or (time.perf_counter() < end and done < _MOST_ROUNDS):
        for name in contestants:
            samples[name].append(burst(name, calls[name], once[name] < _SHORT))
        done += 1
    return {name: timing(times) for name, times in samples.items()}


def timing(times: Iterable[float]) -> Timing:
    """The summary of some samples, at least one."""
    ordered = sorted(times)
    return Timing(
        median=statistics.median(ordered),
        p10=ordered[len(ordered) // 10],
        p90=ordered[(len(ordered) * 9) // 10],
        least=ordered[0],
        samples=len(ordered),
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
    return timing(_time_cuda(graph.replay, ()) / (rounds * len(inputs)) for _ in range(samples))


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


def _time_cuda(call: Callable[..., object], arguments: Sequence[object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
