"""The CUTLASS kernels of sm_80, 86 and 89, run on the host, against the reference, bit for bit.

CUTLASS 2.x is plain C++ apart from three instructions; host_cutlass/ has those again for the
emulator of tests/emulated. So what runs here are the sources that CMake compiles: CUTLASS's own
iterators, shared memory layouts and pipeline, our kernel, epilogue and widening of weights. What
the instructions do is taken from the PTX manual.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatquant_cuda import packing, reference
from tests.emulated import build

HERE = Path(__file__).parent / "host_cutlass"
ORDERS = ("forward", "reverse", "shuffled:1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}  # contract.h's
BAND = 0xA5
TILES = 5  # of each kernel


def cuda_headers() -> Path | None:
    """The include folder of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


def cutlass_headers() -> Path | None:
    """The include folder of CUTLASS."""
    found = importlib.util.find_spec("cutlass_library")
    wheel = [Path(p) / "source/include" for p in (found and found.submodule_search_locations) or ()]
    given = os.environ.get("CUTLASS_DIR")
    folders = [Path(given)] if given else wheel
    return next((folder for folder in folders if (folder / "cutlass").is_dir()), None)


class Arguments(ctypes.Structure):
    """GemmInteger of csrc/ops.h."""

    POINTERS = ("a", "a_scale", "a_zero", "w", "w_scale", "w_colsum", "bias", "residual", "out")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int32) for name in ("bias_dtype", "out_dtype")),
    )


class Memory:
    """Arrays with bands around them, aligned to 64 bytes or deliberately less."""

    def __init__(self) -> None:
        self.arrays: list[tuple[Tensor, Tensor]] = []

    def place(self, values: Tensor | None, offset: int = 0) -> Tensor | None:
        if values is None:
            return None
        size = values.numel() * values.element_size()
        block = torch.full((size + 256,), BAND, dtype=torch.uint8)
        begin = 64 + -block.data_ptr() % 64 + offset
        inside = block[begin : begin + size]
        inside.copy_(values.contiguous().view(-1).view(torch.uint8))
        self.arrays.append((block, inside))
        return inside.view(values.dtype).view(values.shape)

    def check_bands(self) -> None:
        for block, inside in self.arrays:
            begin = inside.data_ptr() - block.data_ptr()
            outside = torch.cat((block[:begin], block[begin + inside.numel() :]))
            assert bool((outside == BAND).all()), "a kernel wrote outside of its output"


class Kernels:
    """The library of host_cutlass/run.cu."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.cutlass_gemm.restype = ctypes.c_char_p

    def choose(self, order: str) -> None:
        assert self.library.flatquant_emulated_gpu(b"A100-80G") == 1
        assert self.library.flatquant_emulated_order(order.encode()) == 1

    def tile(self, op: str, index: int) -> tuple[int, ...] | None:
        found = (ctypes.c_int32 * 4)()
        known = self.library.cutlass_tile(int(op == "gemm_w4a4"), index, found)
        return tuple(found) if known else None

    def run(self, op: str, tile: tuple[int, ...], case: dict[str, Tensor | None]) -> Tensor:
        """The output, its bits as int16."""
        memory = Memory()
        # The kernels' contract: these four are aligned, the others only to their elements.
        offsets = {"a": 0, "w": 0, "residual": 0, "out": 0, "bias": 2, "w_scale": 8}
        if case["bias"] is not None and case["bias"].dtype == torch.float32:
            offsets["bias"] = 12
        placed = {name: memory.place(case[name], offsets.get(name, 4)) for name in case}
        args = Arguments()
        for name in Arguments.POINTERS:
            tensor = placed[name]
            setattr(args, name, None if tensor is None else tensor.data_ptr())
        a, w, out, bias = (placed[name] for name in ("a", "w", "out", "bias"))
        assert a is not None and w is not None and out is not None
        args.m, args.n = out.shape
        args.k = 2 * w.shape[1]
        args.out_dtype = DTYPES.index(out.dtype)
        args.bias_dtype = 0 if bias is None else DTYPES.index(bias.dtype)
        shape = (ctypes.c_int32 * 4)(*tile)
        text = self.library.cutlass_gemm(int(op == "gemm_w4a4"), ctypes.byref(args), shape)
        assert text == b""
        memory.check_bands()
        return out.view(torch.int16)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The kernels, compiled for the host."""
    cuda, cutlass = cuda_headers(), cutlass_headers()
    reason = build.why_not()
    if cuda is None or cutlass is None or reason:
        pytest.skip(reason or ("no CUDA headers" if cuda is None else "no CUTLASS headers"))
    folders = [HERE, cutlass, cuda, cuda / "cccl"]
    flags = [word for folder in folders for word in ("-isystem", str(folder))]
    flags += ["-include", str(HERE / "prelude.h"), "-DNDEBUG", "-O1", "-fpermissive", "-w"]
    sources = [*sorted(build.CUDA_FOLDER.glob("*_cutlass_sm8x.cu")), HERE / "run.cu"]
    variant = build.Variant("cutlass_sm8x", tuple(flags), ())
    return Kernels(build.build("cutlass_sm8x", sources, variant))


def make_case(
    op: str,
    m: int,
    n: int,
    k: int,
    out: torch.dtype,
    *,
    bias: torch.dtype | None = None,
    residual: bool = False,
    zero: bool = False,
    bad_row: bool = False,
    extreme: bool = False,
) -> dict[str, Tensor | None]:
    """Arguments, in their places in GemmInteger."""
    generator = torch.Generator().manual_seed(m * 1009 + n * 31 + k)
    low, high = (-128, 128) if op == "gemm_w4a8" else (0, 16) if zero else (-8, 8)
    codes = torch.randint(low, high, (m, k), generator=generator)
    weights = torch.randint(-8, 8, (n, k), generator=generator)
    if extreme:
        codes.fill_(high - 1 if zero else low)
        weights.fill_(-8)
    a_scale = torch.rand(m, generator=generator) + 0.01
    if bad_row:
        a_scale[m // 2] = torch.nan
    return {
        "a": packing.pack_nibbles(codes) if op == "gemm_w4a4" else codes.to(torch.int8),
        "a_scale": a_scale,
        "a_zero": torch.randint(0, 16, (m,), generator=generator).int() if zero else None,
        "w": packing.pack_nibbles(weights),
        "w_scale": torch.rand(n, generator=generator) * 0.01,
        "w_colsum": weights.sum(1).int() if zero else None,
        "bias": torch.randn(n, generator=generator).to(bias) if bias else None,
        "residual": torch.randn(m, n, generator=generator).to(out) if residual else None,
        "out": torch.full((m, n), 7.0, dtype=out),
    }


def expected(op: str, case: dict[str, Tensor | None]) -> Tensor:
    """The reference's answer, its bits as int16."""
    out = case["out"]
    assert out is not None
    named = {key: value for key, value in case.items() if key != "out"}
    positional = [named.pop(name) for name in ("a", "a_scale", "w", "w_scale")]
    answer: Tensor = getattr(reference, op)(*positional, **named, out_dtype=out.dtype)
    bits = answer.view(torch.int16)
    return torch.where(answer.isnan(), torch.tensor(NAN[out.dtype], dtype=torch.int16), bits)


def ragged_cases(op: str, tile: tuple[int, ...]) -> Iterator[dict[str, Tensor | None]]:
    """Shapes around the tile's, with every option in turn."""
    m, n, k, stages = tile
    shapes = [
        (1, 8, 32),
        (m, n, k),
        (m + 1, n + 8, k + 32),
        (m - 1, n - 8, k - 32),
        (m + 17, n + 72, k * (stages - 1)),
        (3, n + 8, k * stages),
        (m // 2, 2 * n, k * (stages + 1) + 32),
        (2 * m + 5, 24, 2 * k + 64),
    ]
    options = itertools.cycle(itertools.product((None, *DTYPES), (False, True), DTYPES[1:]))
    for i, (shape, (bias, residual, out)) in enumerate(zip(shapes, options, strict=False)):
        yield make_case(
            op,
            *shape,
            out if i % 3 else torch.float16,
            bias=bias,
            residual=residual,
            zero=op == "gemm_w4a4" and i % 2 == 1,
            bad_row=i % 4 == 2,
            extreme=i % 5 == 4,
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("index", range(TILES))
@pytest.mark.parametrize("op", ["gemm_w4a4", "gemm_w4a8"])
def test_equals_the_reference(kernels: Kernels, op: str, index: int, order: str) -> None:
    tile = kernels.tile(op, index)
    assert tile is not None
    kernels.choose(order)
    for case in ragged_cases(op, tile):
        assert torch.equal(kernels.run(op, tile, case), expected(op, case))


def test_there_are_no_other_tiles(kernels: Kernels) -> None:
    assert kernels.tile("gemm_w4a4", TILES) is None
    assert kernels.tile("gemm_w4a8", TILES) is None


@pytest.mark.parametrize(
    ("op", "zero", "k"),
    [("gemm_w4a4", False, 1 << 20), ("gemm_w4a4", True, 1 << 20), ("gemm_w4a8", False, 131040)],
)
def test_longest_sums_are_exact(kernels: Kernels, op: str, zero: bool, k: int) -> None:
    """All codes at the end of their range, at the largest k that the planner allows."""
    tile = kernels.tile(op, TILES - 1)  # the smallest
    assert tile is not None
    kernels.choose(ORDERS[0])
    case = make_case(op, 2, 8, k, torch.bfloat16, zero=zero, extreme=True)
    assert torch.equal(kernels.run(op, tile, case), expected(op, case))
