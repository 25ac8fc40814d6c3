"""The matrix unit of AMX takes subnormal numbers for 0: kernels that use it must not show that.

Also: what is computed another way on some instruction set, for every number there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flatquant_cuda import library, ops, packing, reference

TINY = (1e-20, 1e-30, 1e-36, 2.0**-126, 2.0**-130)


def on_every_isa(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """The same bits on every instruction set this machine has."""
    if not library.loaded:
        pytest.skip("no native library")
    before = library.cpu_isa()
    try:
        answers = {}
        for name in library.ISAS:
            if library.cpu_isa(name) == name:
                answers[name] = [part.nan_to_num(-77.0) for part in run()]
            library.cpu_isa(before)
    finally:
        library.cpu_isa(before)
    first, *others = answers.items()
    for name, answer in others:
        for ours, theirs in zip(answer, first[1], strict=True):
            assert torch.equal(ours, theirs), (name, first[0])


@pytest.mark.parametrize("factor", [1.0, 1.37, -0.0123])
def test_every_gate(factor: float) -> None:
    """One element a row, whose scale is that of round(silu(gate) * x)."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)[:, None]
    x = torch.full_like(gate, factor)
    on_every_isa(lambda: ops.kronecker_quantize(x, torch.ones(1, 1), None, gate=gate, bits=8))


@pytest.mark.parametrize("small", TINY)
def test_transforms(small: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 24 * 32).bfloat16()
    x[3, 5] = x[7, 700] = small
    x[8] *= small
    x[9, 1] = math.nan
    x[10, 767] = -math.inf
    factors = [torch.randn(n, n) / math.sqrt(n) for n in (24, 32)]
    on_every_isa(lambda: ops.kronecker_quantize(x, *factors, bits=8, rms_eps=1e-6))
    on_every_isa(lambda: (ops.kronecker(x, *factors, out_dtype=torch.float32),))
    factors[1][4, 4] = small
    on_every_isa(lambda: (ops.kronecker(x, *factors, out_dtype=torch.float32),))


@pytest.mark.parametrize("small", TINY)
def test_attention(small: float) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 4, 5, 32).bfloat16()
    caches = []
    for _ in range(2):
        codes, scale, zero = reference.kv_quantize(torch.randn(1, 2, 300, 32), None, None, 4)
        caches.append([packing.pack(codes, 4), scale, zero])
    q[0, 1, 2, 3] = small
    on_every_isa(lambda: (ops.attention_decode(q, *caches[0], *caches[1]),))
    caches[1][1][0, 1, 280] = small  # one chunk of two
    on_every_isa(lambda: (ops.attention_decode(q, *caches[0], *caches[1]),))
    caches[1][1].mul_(max(small, 2.0**-120))
    on_every_isa(lambda: (ops.attention_decode(q, *caches[0], *caches[1]),))
    caches[0][1][0, 0, 17] = math.nan
    on_every_isa(lambda: (ops.attention_decode(q, *caches[0], *caches[1]),))
