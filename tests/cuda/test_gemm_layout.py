"""The layout of the hand-written GEMM, by its own functions for every thread, on the host.

Shared memory: a warp's 16-byte accesses go out in quarters, 8-byte ones in halves, of consecutive
lanes; each must touch every bank at most once. Fragments: the operands that the lanes make, put
through the definition of mma.m16n8k32 (PTX ISA), must give the integer product.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatquant_cuda import packing
from tests.emulated import build

SOURCE = Path(__file__).parent / "gemm_layout.cpp"
TILES = range(3)  # large, medium, small
CODES = range(3)  # w4a4, w4a8, w8a8
A_BYTES = 64  # of a row of a in a slice
BANKS, WARP = 32, 32


class Layout:
    """A tile and a pair of code widths, and the functions of the library for it."""

    def __init__(self, library: ctypes.CDLL, tile: int, codes: int) -> None:
        self.library, self.tile, self.codes = library, tile, codes
        sizes = (ctypes.c_int * 12)()
        library.gemm_sizes(tile, codes, sizes)
        self.block_m, self.block_n, self.warps_m, self.warps_n, self.warps_k = sizes[:5]
        self.down, self.across, self.steps, self.shift, self.offset = sizes[5:10]
        self.w_bytes, self.slice_codes = sizes[10:]
        self.a_bits = 4 if codes == 0 else 8
        self.w_bits = 8 if codes == 2 else 4
        self.group_threads = WARP * self.warps_m * self.warps_n

    def lane(
        self, warp_m: int, warp_n: int, lane: int
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Offsets of a lane's words of a and of w in their slices; its rows; its first columns."""
        out = [(ctypes.c_int * size)() for size in (2 * self.down, self.across) * 2]
        a, w, rows, columns = out
        self.library.gemm_lane(
            self.tile, self.codes, warp_m, warp_n, lane // 4, lane % 4, a, w, rows, columns
        )
        return list(a), list(w), list(rows), list(columns)[: self.across // 4]

    def copies(self, of_w: bool, thread: int) -> list[tuple[int, int]]:
        """The 16-byte chunks a thread copies: where from in the rows, where to in the slice."""
        places = (ctypes.c_int * 64)()
        count = self.library.gemm_copies(self.tile, self.codes, int(of_w), thread, places)
        return [(places[2 * i], places[2 * i + 1]) for i in range(count)]

    def halves(self, of_w: bool, step: int, flip: int, words: Sequence[int]) -> tuple[int, int]:
        """The two operands that a lane makes of its words."""
        out = (ctypes.c_uint32 * 2)()
        given = (ctypes.c_uint32 * 4)(*words)
        self.library.gemm_halves(self.codes, int(of_w), step, ctypes.c_uint32(flip), given, out)
        return out[0], out[1]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Layout]:
    """Build the functions and hand out layouts."""
    why_not = build.why_not()
    if why_not:
        pytest.skip(why_not)
    library = tmp_path_factory.mktemp("gemm_layout") / "gemm_layout.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
    flags += ["-DFQ_EMULATED", f"-I{build.HERE}", "-shared", "-fPIC"]
    subprocess.run([build.compiler(), *flags, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    return lambda tile, codes: Layout(loaded, tile, codes)


def worst_conflict(addresses: Sequence[int], size: int) -> int:
    """Accesses of a warp that meet at one bank in one go: 1 is none too many."""
    at_once = WARP * 4 // size
    worst = 0
    for first in range(0, WARP, at_once):
        words = {
            address // 4 + i
            for address in addresses[first : first + at_once]
            for i in range(size // 4)
        }
        for bank in range(BANKS):
            worst = max(worst, sum(word % BANKS == bank for word in words))
    return worst


def test_the_simulation_sees_a_conflict() -> None:
    assert worst_conflict([16 * lane for lane in range(32)], 16) == 1
    assert worst_conflict([128 * lane for lane in range(32)], 16) == 8
    assert worst_conflict([64 * (lane // 4) + 8 * (lane % 4) for lane in range(32)], 8) == 2


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("tile", TILES)
def test_shared_memory_has_no_bank_conflicts(
    layout: Callable[[int, int], Layout], tile: int, codes: int
) -> None:
    it = layout(tile, codes)
    for warp_m in range(it.warps_m):
        for warp_n in range(it.warps_n):
            lanes = [it.lane(warp_m, warp_n, lane) for lane in range(WARP)]
            for part in range(2 * it.down):
                assert worst_conflict([a[part] for a, *_ in lanes], 16) == 1
            for n in range(it.across):
                assert worst_conflict([w[n] for _, w, *_ in lanes], it.w_bytes // 4) == 1
    for of_w in (False, True):
        for warp in range(it.group_threads // WARP):
            threads = [it.copies(of_w, warp * WARP + lane) for lane in range(WARP)]
            for copies in zip(*threads, strict=True):
                assert worst_conflict([to for _, to in copies], 16) == 1


@pytest.mark.parametrize("tile", TILES)
def test_sums_wait_in_places_of_their_own(layout: Callable[[int, int], Layout], tile: int) -> None:
    it = layout(tile, 0)
    places = [
        [
            it.library.gemm_scratch(tile, group, part, half, thread)
            for thread in range(it.group_threads)
        ]
        for group in range(it.warps_k)
        for part in range(2 * it.down)
        for half in range(2)
    ]
    everything = [place for row in places for place in row]
    assert sorted(everything) == list(range(len(everything)))
    for row in places:
        for first in range(0, it.group_threads, WARP):
            assert worst_conflict([16 * place for place in row[first : first + WARP]], 16) == 1


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("tile", TILES)
def test_a_slice_holds_every_byte_once(
    layout: Callable[[int, int], Layout], tile: int, codes: int
) -> None:
    it = layout(tile, codes)
    for of_w, size in ((False, it.block_m * A_BYTES), (True, it.block_n * it.w_bytes)):
        copies = [copy for t in range(it.group_threads) for copy in it.copies(of_w, t)]
        for places in zip(*copies, strict=True):
            assert sorted(places) == list(range(0, size, 16))


def placed(it: Layout, of_w: bool, matrix: Tensor) -> bytes:
    """A slice in shared memory, of rows of bytes."""
    rows = matrix.contiguous().view(torch.uint8).flatten().tolist()
    shared = bytearray(len(rows))
    for thread in range(it.group_threads):
        for source, target in it.copies(of_w, thread):
            shared[target : target + 16] = bytes(rows[source : source + 16])
    return bytes(shared)


def signed_bytes(word: int) -> list[int]:
    """Four numbers from a register."""
    return [byte - 256 if byte > 127 else byte for byte in word.to_bytes(4, "little")]


def words_at(shared: bytes, offset: int, count: int) -> list[int]:
    """The 32-bit words a lane loads."""
    return [int.from_bytes(shared[offset + 4 * i :][:4], "little") for i in range(count)]


def product_of_warp(it: Layout, a: bytes, w: bytes, warp: tuple[int, int], flip: int) -> Tensor:
    """The sums of a warp, [down, across, 16, 8], as mma.m16n8k32 defines them."""
    left = torch.zeros(it.steps, it.down, 16, 32, dtype=torch.int64)
    right = torch.zeros(it.steps, it.across, 32, 8, dtype=torch.int64)
    for lane in range(WARP):
        g, k = lane // 4, 4 * (lane % 4)
        a_at, w_at, _, _ = it.lane(*warp, lane)
        for step in range(it.steps):
            for part, at in enumerate(a_at):
                halves = it.halves(False, step, flip, words_at(a, at, 4))
                for i, word in enumerate(halves):
                    row = left[step, part // 2, part % 2 * 8 + g]
                    row[16 * i + k :][:4] = torch.tensor(signed_bytes(word))
            for n, at in enumerate(w_at):
                halves = it.halves(True, step, 0, words_at(w, at, it.w_bytes // 16))
                for i, word in enumerate(halves):
                    right[step, n, 16 * i + k :][:4, g] = torch.tensor(signed_bytes(word))
    return torch.einsum("smik,snkj->mnij", left, right)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("tile", TILES)
def test_fragments_give_the_integer_product(
    layout: Callable[[int, int], Layout], tile: int, codes: int, signed: bool
) -> None:
    it = layout(tile, codes)
    random = torch.Generator().manual_seed(tile * 3 + codes)
    low = -(2 ** (it.a_bits - 1)) if signed else 0
    a = torch.randint(low, low + 2**it.a_bits, (it.block_m, it.slice_codes), generator=random)
    half = 2 ** (it.w_bits - 1)
    w = torch.randint(-half, half, (it.block_n, it.slice_codes), generator=random)
    a_shared = placed(it, False, packing.pack_nibbles(a) if it.a_bits == 4 else a.to(torch.uint8))
    w_shared = placed(it, True, packing.pack_nibbles(w) if it.w_bits == 4 else w.to(torch.int8))
    exact = (a - (0 if signed else it.offset)) @ w.T

    sums = torch.full_like(exact, -1)
    for warp_m in range(it.warps_m):
        for warp_n in range(it.warps_n):
            warp = (warp_m, warp_n)
            made = product_of_warp(it, a_shared, w_shared, warp, 0 if signed else 0x80808080)
            assert (made & ((1 << it.shift) - 1) == 0).all()
            made >>= it.shift
            for lane in range(WARP):  # lane (g, t) has columns 2 t and 2 t + 1 of row g
                g, t = lane // 4, lane % 4
                _, _, rows, columns = it.lane(*warp, lane)
                for part, row in enumerate(rows):
                    for i, column in enumerate(columns):
                        four = made[part // 2, 4 * i : 4 * i + 4, part % 2 * 8 + g, 2 * t :][:, :2]
                        sums[row, column : column + 8] = four.flatten()
    assert torch.equal(sums, exact)
