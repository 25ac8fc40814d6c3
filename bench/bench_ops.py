"""Time the GEMMs of 4-bit layers against torch's own, on this machine's processor.

    python bench/bench_ops.py [--quick] [--model NAME] [--tokens N ...] [--resume] [--dry-run]

For every layer shape and number of tokens: the products of packed weights, the transform with its
quantizer in front of them, and torch's products in float32, bfloat16 and int8. They take turns, and
their weights rotate through more memory than the last-level cache holds. "of ceiling" is the time
that the measured rate of the processor's byte products, or its read bandwidth for codes, scales and
inputs, allows at best, as a share of the time taken. Processor timings are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ceiling import Ceiling, available_memory, measure_ceiling, past_caches
from harness import Timing, race
from record import append, rows_on_record
from shapes import LINEARS, QUICK, Linear, tokens_for
from torch import Tensor

from flatquant.transforms.split import kronecker_split
from flatquant_cuda import backend, ops, reference

TOPIC = "op-speed"
GROUP = 128  # columns that share a scale in gemm_w4a16, or 64 where 128 does not divide
#: Products in float32 are left out from so many operations on: they take seconds.
MOST_FLOAT32 = {"quick": 4e10, "full": 2.5e11}
#: What ours are compared with.
PEERS = ("torch float32", "torch bfloat16", "torch int8")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something to time.

    Attributes:
        name: its column.
        weights: what rotates: argument lists of equal shapes.
        inputs: makes its other arguments for a number of tokens.
        call: takes `inputs` and `weights` arguments.
        reference: the same on the first rows of the weights, for checking; None for torch's own.
        least: tokens it needs.
        ceiling: whether the ceilings for bytes are its own.
    """

    name: str
    weights: list[tuple[Tensor, ...]]
    inputs: Callable[[int], tuple[Any, ...]]
    call: Callable[..., Any]
    reference: Callable[..., Tensor] | None = None
    least: int = 1
    ceiling: bool = True

    @property
    def weight_bytes(self) -> int:
        """Bytes of one set of weights."""
        return sum(tensor.nbytes for tensor in self.weights[0])

    def calls(self, tokens: int) -> Callable[[int], Any]:
        """What a race calls with a running index."""
        given = self.inputs(tokens)
        return lambda index: self.call(*given, *self.weights[index % len(self.weights)])

    def check(self, tokens: int) -> None:
        """Compare the first output columns with the reference."""
        if self.reference is None:
            return
        given, weights = self.inputs(tokens), self.weights[-1]
        few = tuple(tensor[:32].contiguous() for tensor in weights)
        want = self.reference(*given, *few).float()
        got = self.call(*given, *weights)[..., : want.shape[-1]].float()
        # integer sums are exact; those of gemm_w4a16 are float32 sums of bfloat16 factors
        close = 2e-2 if self.name == "gemm_w4a16" else 1e-2
        torch.testing.assert_close(got, want, rtol=close, atol=close * want.abs().max().item())


def contestants(linear: Linear, memory: int) -> Iterator[Contestant]:
    """Everything that is timed for a layer shape; weights of each fill `memory` bytes."""
    n, k = linear.out_features, linear.in_features
    generator = torch.Generator().manual_seed(0)

    def spread_out(*first: Tensor) -> list[tuple[Tensor, ...]]:
        """Copies of a set of weights in memory of their own that no cache holds."""
        count = max(1, -(-memory // sum(tensor.nbytes for tensor in first)))
        copies = [tensor.expand(count, *tensor.shape).clone().unbind(0) for tensor in first]
        return list(zip(*copies, strict=True))

    def floats(tokens: int) -> Tensor:
        return torch.randn(tokens, k, generator=generator)

    nibbles = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, generator=generator) + 0.5
    group = GROUP if k % GROUP == 0 else GROUP // 2
    groups = torch.rand(n, k // group, generator=generator) + 0.5

    def codes(tokens: int, bits: int) -> tuple[Tensor, Tensor]:
        stored, scales, _ = reference.quantize_activation(floats(tokens), bits=bits)
        return stored, scales

    def rounded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: function(*arguments, out_dtype=torch.bfloat16)

    for name, bits in (("gemm_w4a4", 4), ("gemm_w4a8", 8)):
        yield Contestant(
            name=name,
            weights=spread_out(nibbles, scale),
            inputs=lambda tokens, bits=bits: codes(tokens, bits),  # type: ignore[misc]
            call=rounded(getattr(ops, name)),
            reference=rounded(getattr(reference, name)),
        )
    yield Contestant(
        name="gemm_w4a16",
        weights=spread_out(nibbles, groups),
        inputs=lambda tokens: (floats(tokens).bfloat16(),),
        call=ops.gemm_w4a16,
        reference=reference.gemm_w4a16,
    )
    for dtype in (torch.float32, torch.bfloat16):
        yield Contestant(
            name=f"torch {str(dtype).removeprefix('torch.')}",
            weights=spread_out(torch.randn(n, k, generator=generator).to(dtype)),
            inputs=lambda tokens, dtype=dtype: (floats(tokens).to(dtype),),  # type: ignore[misc]
            call=torch.nn.functional.linear,
            ceiling=False,
        )
    square = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    yield Contestant(
        name="torch int8",
        weights=spread_out(square),
        inputs=lambda tokens: (floats(tokens).mul(30).clamp(-128, 127).to(torch.int8),),
        call=lambda x, w: torch._int_mm(x, w.t()),
        least=17,  # it refuses fewer rows
    )
    n1, n2 = kronecker_split(k)
    left, right = torch.randn(n1, n1) / n1**0.5, torch.randn(n2, n2) / n2**0.5
    yield Contestant(
        name="kronecker_quantize",
        weights=[(left, right)],
        inputs=lambda tokens: (floats(tokens).bfloat16(),),
        call=ops.kronecker_quantize,
        ceiling=False,
    )


def lines(
    linear: Linear, tokens: int, entries: list[Contestant], timings: dict[str, Timing], top: Ceiling
) -> dict[str, tuple[float, str]]:
    """The figures of one race, printed: name -> (value, unit)."""
    operations = 2.0 * tokens * linear.in_features * linear.out_features
    figures: dict[str, tuple[float, str]] = {}
    for entry in entries:
        timing = timings[entry.name]
        text = f"  {entry.name:<20}{timing.median * 1e6:11.1f} us ±{timing.spread / 2:4.0%}"
        figures[entry.name] = (round(timing.median * 1e6, 1), "us")
        if entry.name != "kronecker_quantize":
            text += f"{operations / timing.median / 1e9:9.0f} GOP/s"
        if entry.ceiling:
            activations = tokens * linear.in_features * (2 if entry.name == "gemm_w4a16" else 1)
            share = top.share(
                timing.median,
                operations=operations,
                bytes_read=entry.weight_bytes + activations,
            )
            text += f"{share:7.0%} of ceiling"
            figures[f"{entry.name} of ceiling"] = (round(100 * share, 1), "%")
        if entry.name.startswith("gemm"):
            for peer in PEERS:
                if peer in timings:
                    text += f"  {timings[peer].median / timing.median:5.2f}x {peer[6:]}"
        print(text, flush=True)
    share = timings["kronecker_quantize"].median / timings["gemm_w4a4"].median
    print(f"  transform and quantizer take {share:.0%} of gemm_w4a4's time")
    figures["spread"] = (round(50 * max(t.spread for t in timings.values()), 1), "%")
    return figures


def keep_memory() -> None:
    """Keep freed memory in the process: large results otherwise cost a page fault every 4 KiB."""
    if sys.platform == "linux":
        library, most_maps, trim = ctypes.CDLL(None), -4, -1
        if hasattr(library, "mallopt"):
            library.mallopt(most_maps, 0)
            library.mallopt(trim, 2**31 - 1)


def time_shape(linear: Linear, memory: int, top: Ceiling, options: argparse.Namespace) -> None:
    """Time, print and record one layer shape."""
    done = rows_on_record(TOPIC) if options.resume else set()
    numbers = [
        tokens
        for tokens in options.tokens or tokens_for(linear, options.quick)
        if f"{linear}/{tokens} tokens" not in done
    ]
    if not numbers:
        return
    everyone = list(contestants(linear, memory))
    print(f"\n{linear}: at most {top}")
    for entry in everyone:
        entry.check(2)
    for tokens in numbers:
        operations = 2.0 * tokens * linear.in_features * linear.out_features
        entries = [entry for entry in everyone if tokens >= entry.least]
        if operations > MOST_FLOAT32[options.mode]:
            entries = [entry for entry in entries if entry.name != "torch float32"]
        out = [entry.name for entry in everyone if entry not in entries]
        print(f"{linear}, {tokens} tokens" + (f" (left out: {', '.join(out)})" if out else ""))
        calls = {entry.name: entry.calls(tokens) for entry in entries}
        timings = race(calls, seconds=options.seconds, rounds=3)
        figures = lines(linear, tokens, entries, timings, top)
        if options.dry_run or backend("gemm_w4a4") != "native":
            continue
        for name, (value, unit) in figures.items():
            append(TOPIC, f"{linear}/{tokens} tokens/{name}", value, unit, quiet=True)


def main() -> None:
    """Time all cases and record the medians."""
    options = _options()
    keep_memory()
    started = time.monotonic()
    rotate = past_caches()
    top = measure_ceiling(2.0)
    print(
        f"weights rotate through {rotate / 2**20:.0f} MiB of each kind; "
        f"{available_memory() / 2**30:.0f} GiB of memory are free"
    )
    for linear in LINEARS:
        if options.model not in (None, linear.model):
            continue
        if options.quick and not str(linear).startswith(QUICK):
            continue
        top = top.raised(measure_ceiling(0.5))
        time_shape(linear, rotate, top, options)
    print(
        "\nleft out: torch int8 below 17 tokens, which torch._int_mm refuses; torch float32 "
        f"above {MOST_FLOAT32[options.mode]:.0e} operations, which takes seconds"
        + ("; the other shapes and numbers of tokens, for --quick" if options.quick else "")
    )
    print(f"{time.monotonic() - started:.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a few shapes, a minute or two")
    parser.add_argument("--model", choices=sorted({linear.model for linear in LINEARS}))
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--seconds", type=float, help="of sampling for each shape and number")
    parser.add_argument("--resume", action="store_true", help="not what this commit has recorded")
    parser.add_argument("--dry-run", action="store_true", help="print only, record nothing")
    options = parser.parse_args()
    options.mode = "quick" if options.quick else "full"
    if options.seconds is None:
        options.seconds = 0.8 if options.quick else 1.5
    return options


if __name__ == "__main__":
    main()
