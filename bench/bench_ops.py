"""Time the ops of a linear layer against torch's own matrix products, on this machine's processor.

    python bench/bench_ops.py [--model NAME] [--tokens N ...] [--seconds S] [--dry-run]

For every layer shape: the online transform with its quantizer, the integer GEMMs, and as baselines
torch's float32 and bfloat16 products and its int8 product. Each op is compared with the reference
before it is timed. Processor timings are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import Timing, measure, rotate
from record import append
from shapes import LINEARS, TOKENS, Linear

from flatquant.transforms.split import kronecker_split
from flatquant_cuda import backend, ops, reference

TOPIC = "op-speed"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time: `make(index)` gives fresh arguments for `call`."""

    name: str
    call: Any
    make: Any
    reference: Any = None
    operations: float = 0.0


def cases(linear: Linear, tokens: int) -> Iterator[Case]:
    """What is timed for one layer shape and number of tokens."""
    n, k = linear.out_features, linear.in_features
    n1, n2 = kronecker_split(k)
    left, right = torch.randn(n1, n1) / n1**0.5, torch.randn(n2, n2) / n2**0.5

    def floats(index: int, dtype: torch.dtype = torch.float32) -> list[Any]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(tokens, k, generator=generator)
        w = torch.randn(n, k, generator=generator)
        return [x.to(dtype), w.to(dtype)]

    def bytes_(index: int, bits: int) -> list[Any]:
        x, w = floats(index)
        a, a_scale, _ = reference.quantize_activation(x, bits=bits)
        codes, w_scale, _ = reference.quantize_activation(w)
        return [a, a_scale, codes, w_scale]

    product = 2.0 * tokens * n * k
    yield Case(
        name="kronecker_quantize",
        call=ops.kronecker_quantize,
        make=lambda index: [floats(index)[0], left, right],
        reference=reference.kronecker_quantize,
        operations=2.0 * tokens * k * (n1 + n2),
    )
    for name, bits in (("gemm_w4a4", 4), ("gemm_w4a8", 8)):
        yield Case(
            name=name,
            call=getattr(ops, name),
            make=functools.partial(bytes_, bits=bits),
            reference=getattr(reference, name),
            operations=product,
        )
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(
            name=f"torch {str(dtype).removeprefix('torch.')}",
            call=torch.nn.functional.linear,
            make=functools.partial(floats, dtype=dtype),
            operations=product,
        )
    if tokens > 16:  # torch's int8 product refuses fewer rows
        yield Case(
            name="torch int8",
            call=torch._int_mm,
            make=lambda index: [
                torch.randint(-128, 128, (tokens, k), dtype=torch.int8),
                torch.randint(-128, 128, (n, k), dtype=torch.int8).t(),
            ],
            operations=product,
        )


def time_case(case: Case, seconds: float) -> Timing:
    """Compare with the reference, then time."""
    inputs = rotate(case.make, most=8)

    def check() -> None:
        if case.reference is None:
            return
        got, want = case.call(*inputs[0]), case.reference(*inputs[0])
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        else:  # codes may differ by one where a value lies next to a rounding boundary
            torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)

    return measure(case.call, inputs, check=check, samples=10, seconds=seconds)


def main() -> None:
    """Time all cases and record the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=sorted({linear.model for linear in LINEARS}))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of sampling for each case")
    parser.add_argument("--dry-run", action="store_true", help="print only, record nothing")
    options = parser.parse_args()
    for linear in LINEARS:
        if options.model not in (None, linear.model):
            continue
        for tokens in options.tokens:
            shape = f"{linear.model} {linear.place} {linear.in_features}->{linear.out_features}"
            print(f"\n{shape}, {tokens} tokens")
            for case in cases(linear, tokens):
                timing = time_case(case, options.seconds)
                rate = case.operations / timing.median / 1e9
                print(f"  {case.name:<20}{timing}{rate:9.1f} GOP/s")
                native = case.reference is None or backend(case.name) == "native"
                if native and not options.dry_run:
                    what = f"{shape}/{tokens} tokens/{case.name}"
                    append(TOPIC, what, round(timing.median * 1e6, 1), "us")


if __name__ == "__main__":
    main()
