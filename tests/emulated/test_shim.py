"""The emulator itself: what its instructions compute, and the faults that it must find."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .conftest import Libraries

POISON = 0x7FFF7FFF


class Shim:
    """The functions of shim.cu."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.shim_failure.restype = ctypes.c_char_p
        self.library.flatquant_emulated_launches.restype = ctypes.c_char_p

    def __call__(self, name: str, *arguments: Tensor | int | bool) -> None:
        values = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a)
            for a in arguments
        ]
        error = getattr(self.library, f"shim_{name}")(*values)
        if error == -1:
            raise RuntimeError(self.library.shim_failure().decode())
        if error:
            raise RuntimeError(f"CUDA error {error}")

    def choose(self, *, gpu: str | None = None, order: str | None = None) -> None:
        if gpu is not None:
            assert self.library.flatquant_emulated_gpu(gpu.encode()) == 1
        if order is not None:
            assert self.library.flatquant_emulated_order(order.encode()) == 1


@pytest.fixture
def shim(libraries: Libraries) -> Iterator[Shim]:
    found = Shim(libraries.shim)
    found.choose(gpu="H100 SXM", order="forward")
    yield found
    found.choose(gpu="H100 SXM", order="forward")


def bits(*shape: int) -> Tensor:
    """Random 32-bit words."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


# ---- instructions --------------------------------------------------------------------------------


def test_ldmatrix(shim: Shim, order: str) -> None:
    shim.choose(order=order)
    numbers = torch.arange(256, dtype=torch.int16)
    out = torch.zeros(384, dtype=torch.int32)
    shim("ldmatrix", numbers, out)
    pairs = out.view(torch.int16)  # two numbers a register
    matrices = numbers.reshape(4, 8, 8)
    # Lane i has numbers 2 * (i % 4) and the next of row i // 4 of every matrix.
    plain = matrices.reshape(4, 32, 2).permute(1, 0, 2)
    transposed = matrices.mT.reshape(4, 32, 2).permute(1, 0, 2)
    assert torch.equal(pairs[:256].reshape(32, 4, 2), plain)
    assert torch.equal(pairs[256:512].reshape(32, 4, 2), transposed)
    assert torch.equal(pairs[512:640].reshape(32, 2, 2), plain[:, :2])
    assert torch.equal(pairs[640:].reshape(32, 2, 2), transposed[:, :2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_of_halves(shim: Shim, dtype: torch.dtype, order: str) -> None:
    shim.choose(order=order)
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    want = c.clone()
    for k in range(16):  # the order that emulated_ptx.h promises
        want += a[:, k : k + 1].float() * b[k : k + 1].float()
    shim("mma_half", dtype == torch.bfloat16, a, b, c)
    assert torch.equal(c, want)


@pytest.mark.parametrize("unsigned", [False, True])
def test_mma_of_bytes(shim: Shim, unsigned: bool) -> None:
    a, b = bits(16, 8).view(torch.uint8), bits(8, 8).view(torch.int8)
    c = torch.full((16, 8), 2**31 - 5, dtype=torch.int32)
    left = a.long() if unsigned else a.view(torch.int8).long()
    want = c + left @ b.long().T
    shim("mma_byte", unsigned, a, b, c)
    assert torch.equal(c, want.to(torch.int32)), "wraps like int32"


def test_copies_land_only_when_waited_for(shim: Shim, order: str) -> None:
    shim.choose(order=order)
    words, out = bits(64, 3), torch.zeros(64, 8, dtype=torch.int32)
    shim("copy", words, out)
    assert (out[:, :3] == POISON).all()
    assert torch.equal(out[:, 3:5], words[:, :2]) and (out[:, 5] == POISON).all()
    assert torch.equal(out[:, 6], words[:, 2])
    part = words.flatten()[:4].clone()
    part.view(torch.uint8)[6:] = 0
    assert torch.equal(out[:, 7], part.repeat(16))


def test_warp_operations(shim: Shim, order: str) -> None:
    shim.choose(order=order)
    values, out = bits(64), torch.zeros(64, 12, dtype=torch.int32)
    values[:32] = values[:32].abs() + 1
    shim("warp", values, out)
    for warp, rows in zip(values.reshape(2, 32), out.reshape(2, 32, 12), strict=True):
        lanes = torch.arange(32)
        down = torch.where(lanes % 16 < 13, lanes + 3, lanes)
        up = torch.where(lanes >= 9, lanes - 9, lanes)
        assert torch.equal(rows[:, 0], warp[3].expand(32))
        assert torch.equal(rows[:, 1], warp[lanes // 8 * 8 + (lanes * 7 + 1) % 8])
        assert torch.equal(rows[:, 2], warp[lanes ^ 5])
        assert torch.equal(rows[:, 3], warp[down])
        assert torch.equal(rows[:, 4], warp[up])
        votes = warp > 0
        ballot = int((votes.long() << lanes).sum())
        assert (rows[:, 5].long() & 0xFFFFFFFF == ballot).all()
        assert (rows[:, 6] == votes.any()).all() and (rows[:, 7] == votes.all()).all()
        assert (rows[:, 8] == warp.max()).all()
        assert (rows[:, 9].long() & 0xFFFFFFFF == (warp.long() & 0xFFFFFFFF).max()).all()
        assert (rows[:, 10] == warp.sum(dtype=torch.int64).to(torch.int32)).all()
        small = torch.fmod(warp, 1000).sum()
        assert (rows[:, 11] == small).all()


def test_block_sum(shim: Shim, order: str) -> None:
    shim.choose(order=order)
    values, out = bits(3, 256), torch.zeros(3, 256)
    shim("block", values, out, 3)
    sums = torch.fmod(values, 1000).sum(1, keepdim=True)
    assert torch.equal(out, sums.float().expand(3, 256))


def test_conversions(shim: Shim) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.cat(
        (
            torch.tensor([0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1e-41, 65519.0, 65520.0, 3e38]),
            torch.tensor([3e9, -3e9, torch.inf, -torch.inf, 7.5, -8.5, 127.5, -128.5, 1.0]),
            torch.randn(2000, generator=generator) * 10,
            torch.randn(2000, generator=generator).exp() * 1e-7,
        )
    )
    y = x.roll(-1)
    out = torch.zeros(len(x), 8, dtype=torch.int32)
    shim("convert", x, out, len(x))
    for column, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        pairs = out[:, column].contiguous().view(dtype).reshape(-1, 2)
        assert torch.equal(pairs, torch.stack((x, y), 1).to(dtype))
    whole = x.double().round().clamp(-(2**31), 2**31 - 1).long()
    assert torch.equal(out[:, 2].long(), whole)
    following = whole.roll(-1)
    for column, width in ((3, 4), (4, 8)):
        least, most, mask = -(1 << width - 1), (1 << width - 1) - 1, (1 << width) - 1
        want = (
            (0x12345678 << 2 * width)
            | (whole.clamp(least, most) & mask) << width
            | following.clamp(least, most) & mask
        )
        assert torch.equal(out[:, column].long() & 0xFFFFFFFF, want & 0xFFFFFFFF)
    assert torch.equal(out[:, 5].contiguous().view(torch.float32), 1 / x)
    assert torch.equal(out[:, 6], x.view(torch.int32))
    first, second = x.view(torch.uint8).reshape(-1, 4), y.view(torch.uint8).reshape(-1, 4)
    sign = torch.where(first[:, 0] >= 128, 255, 0).to(torch.uint8)
    want = torch.stack((first[:, 1], second[:, 0], second[:, 2], sign), 1)
    assert torch.equal(out[:, 7].contiguous().view(torch.uint8).reshape(-1, 4), want)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_clusters_exchange_shared_memory(shim: Shim, size: int, order: str) -> None:
    shim.choose(order=order)
    blocks = 16
    out = torch.zeros(blocks, 4, dtype=torch.int32)
    shim("cluster", out, blocks, size, True)
    for block, (left, right, far, place) in enumerate(out.tolist()):
        first, rank = block - block % size, block % size
        assert left == first + (rank - 1) % size and right == first + (rank + 1) % size
        assert far == 100 + first + (rank + 2) % size and place == 10 * size + rank


# ---- faults --------------------------------------------------------------------------------------

FAULTS = {
    1: r"deadlock: 32 threads have ended, 32 threads wait for their block at .*shim.cu:\d+",
    2: r"deadlock: threads of a block wait at different barriers, .*shim.cu:\d+ and .*shim.cu:\d+",
    3: r"deadlock: lanes of a warp are in different operations, .* at .*shim.cu:\d+ and .* at ",
    4: r"deadlock: 1 threads have ended, 31 threads wait for their warp in __syncwarp at .*shim.cu",
    5: r"copy_async at the misaligned address",
    6: r"ldmatrix_x4 at the misaligned address",
    7: r"ldmatrix_x4 of 16 bytes at .* is not shared memory of the block",
    8: r"dynamic shared memory was written 0 bytes behind its end",
    9: r"dynamic shared memory was written 4 bytes before its begin",
    10: r"a thread ended without waiting for its copy_async",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(shim: Shim, fault: int, order: str) -> None:
    shim.choose(order=order)
    words, out = bits(64, 4), torch.zeros(64, dtype=torch.int32)
    threads = 32 if fault == 4 else 64
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        shim("fault", words, out, fault, threads, 256, 256)
    shim("fault", words, out, 0, 64, 256, 256)  # the next launch is none the worse


@pytest.mark.parametrize("fault", [11, 12])
def test_shared_memory_is_poisoned_before_every_block(shim: Shim, fault: int) -> None:
    words, out = bits(64, 4), torch.zeros(64, dtype=torch.int32)
    shim("fault", words, out, 0, 64, 256, 256)  # writes the static array
    shim("fault", words, out, fault, 64, 256, 256)
    assert (out == POISON).all()


def test_a_missing_barrier_shows_in_some_order(shim: Shim, order: str) -> None:
    shim.choose(order=order)
    values = bits(128) // 2
    want = values + values.roll(64)
    out = torch.zeros(128, dtype=torch.int32)
    shim("neighbours", values, out, True)
    assert torch.equal(out, want)
    shim("neighbours", values, out, False)
    assert not torch.equal(out, want)


def test_cluster_memory_needs_a_barrier_first(shim: Shim) -> None:
    out = torch.zeros(8, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="before any cluster barrier"):
        shim("cluster", out, 8, 2, False)


def test_launches_that_the_gpu_refuses(shim: Shim) -> None:
    words, out = bits(64, 4), torch.zeros(64, dtype=torch.int32)
    shim("fault", words, out, 0, 64, 200 << 10, 200 << 10)
    shim.choose(gpu="RTX 3090")
    with pytest.raises(RuntimeError, match=r"CUDA error 1$"):
        shim("fault", words, out, 0, 64, 200 << 10, 200 << 10)
    shim("fault", words, out, 0, 64, 99 << 10, 99 << 10)
    with pytest.raises(RuntimeError, match=r"CUDA error 1$"):  # not allowed more than 48 KiB
        shim("fault", words, out, 0, 64, 49 << 10, 0)
    with pytest.raises(RuntimeError, match=r"CUDA error 9$"):
        shim("fault", words, out, 0, 2048, 256, 256)
    with pytest.raises(RuntimeError, match=r"CUDA error 801$"):
        shim("cluster", torch.zeros(8, 4, dtype=torch.int32), 8, 2, True)
    with pytest.raises(RuntimeError, match="only whole warps are emulated"):
        shim("fault", words, out, 0, 48, 256, 256)
