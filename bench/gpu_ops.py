"""Check the CUDA kernels against the reference, then time them, on the current GPU.

    python bench/gpu_ops.py [--seconds S]

An op takes part as soon as it has a CUDA kernel: `flatquant_cuda.backend(op, "cuda")` is native.
Figures go to $OUT/gpu-ops.jsonl, or docs/results without $OUT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from harness import measure, rotate
from record import append, device_name
from torch import Tensor

from flatquant_cuda import backend, ops, reference

TOPIC = "gpu-ops"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 4096), (16, 4096), (2048, 4096), (2048, 11008))


def quantize_mismatches() -> Iterator[str]:
    """Every setting of quantize_activation whose answer is not the reference's, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for rows, k in ((0, 64), (1, 1), (3, 7), (5, 576), (2, 4097), (257, 1536)):
        for dtype in DTYPES:
            x = torch.randn(rows, k, generator=generator).to(dtype)
            if rows > 2:
                x[0] = 0
                x[1, 0] = float("nan")
            for bits, symmetric in ((4, True), (4, False), (8, True), (8, False), (3, True)):
                want = reference.quantize_activation(x, bits=bits, symmetric=symmetric)
                got = ops.quantize_activation(x.cuda(), bits=bits, symmetric=symmetric)
                if not all(_same(g.cpu(), w) for g, w in zip(got, want, strict=True)):
                    yield f"quantize_activation [{rows}, {k}] {dtype} bits={bits} {symmetric=}"


def time_quantize(seconds: float) -> None:
    """Time quantize_activation and record its time and the bytes it moves a second."""
    for rows, k in SHAPES:
        inputs = rotate(
            lambda index, rows=rows, k=k: [torch.randn(rows, k, device="cuda").bfloat16()]  # type: ignore[misc]
        )
        timing = measure(ops.quantize_activation, inputs, seconds=seconds)
        moved = rows * (2 * k + k / 2 + 4)
        name = f"quantize_activation/{rows}x{k} bfloat16"
        device = device_name()
        append(TOPIC, f"{name}/time", round(timing.median * 1e6, 2), "us", device=device)
        append(TOPIC, f"{name}/rate", round(moved / timing.median / 1e9, 1), "GB/s", device=device)


def main() -> int:
    """Check, then time; 1 where there is no GPU, no CUDA kernel, or a wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=1.0, help="of sampling for each shape")
    options = parser.parse_args()
    if not torch.cuda.is_available() or backend("quantize_activation", "cuda") != "native":
        print("gpu_ops: no GPU, or no CUDA kernel (see python -m flatquant_cuda)", file=sys.stderr)
        return 1
    wrong = list(quantize_mismatches())
    device = device_name()
    append(TOPIC, "quantize_activation/settings that differ from the reference", len(wrong),
           device=device)  # fmt: skip
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    if not wrong:
        time_quantize(options.seconds)
    return 1 if wrong else 0


def _same(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and torch.equal(
        torch.nan_to_num(got.double(), nan=-1e300), torch.nan_to_num(want.double(), nan=-1e300)
    )


if __name__ == "__main__":
    sys.exit(main())
