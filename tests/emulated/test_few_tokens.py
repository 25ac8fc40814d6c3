"""Kernels for few tokens: a token's bits do not depend on its batch or on alignment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import Call, Case

from .emulated import Emulated
from .rows import bytes_of

# The plans of a large GPU, of one with little shared memory, and of one that is always busy.
PLACES = ("H100 SXM", "RTX 3090", "A100-80G/1")
TOKENS = 63
BATCHES = (1, 2, 8, 9, 16, 17, 33, 48, 63)


def moved(tensor: Tensor) -> Tensor:
    """The same numbers off alignment."""
    buffer = tensor.new_empty(tensor.numel() + 3)
    return buffer[3:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("k", "groups", "bits"), [(1100, 1, 4), (640, 20, 4), (1152, 9, 2), (288, 3, 3), (70, 10, 4)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float_products_of_a_token_stand_alone(
    k: int, groups: int, bits: int, dtype: torch.dtype, emulated: Emulated
) -> None:
    case = Case("gemm_w4a16", ((TOKENS,), 127, k, groups), {"bits": bits, "bias": torch.float32})
    call = case.call(dtype)
    emulated.choose(PLACES[0])
    (whole,) = emulated.run(call)
    blocks = set()
    for place in PLACES:
        for m in BATCHES:
            for first in {0, TOKENS - m}:
                x = call.args[0][first : first + m]
                part = Call(call.op, (x, *call.args[1:]), call.kwargs)
                emulated.choose(place)
                emulated.launches()
                (got,) = emulated.run(part)
                (launch,) = emulated.launches()
                blocks.add(launch[launch.index(" block=") :])  # threads and shared memory
                assert bytes_of((got,)) == bytes_of((whole[first : first + m],)), (place, m)
    if groups == 1 or k // groups % 32 == 0:
        assert len(blocks) >= 3, "not every kernel has answered"
    (unaligned,) = emulated.run(call.map(moved))
    assert bytes_of((unaligned,)) == bytes_of((whole,))


@pytest.mark.parametrize("op", ["gemm_w4a4", "gemm_w4a8", "gemm_w8a8"])
def test_blocks_share_k_where_there_are_few(op: str, emulated: Emulated) -> None:
    """A narrow layer on Hopper: a cluster of blocks adds up its sums."""
    clusters = set()
    for m, n, k in ((12, 70, 2048), (30, 40, 4096)):
        emulated.choose("H100 SXM")
        emulated.launches()
        emulated.run(Case(op, ((m,), n, k)).call(torch.bfloat16))
        (launch,) = emulated.launches()
        assert "gemm_stream_kernel" in launch
        clusters.add(launch.split(" cluster=")[1].split()[0])
    assert clusters - {"1"}, "no case has a cluster"
