"""What the CUDA kernels became: laws on the machine code of every kernel, checked without a GPU.

Every kernel has a row in BUDGETS: a kernel nobody wrote a budget for fails. Dynamic shared memory
is the planners' (test_plan.py); here is what the compiler decided.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from . import sass

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHIVE = ROOT / "build" / "cmake" / "libfq_cuda.a"
CACHE = ARCHIVE.parent / "CMakeCache.txt"
SM8X = ("sm_80", "sm_86", "sm_89")
ALL = (*SM8X, "sm_90a")
REGISTERS_PER_SM = 65536


@dataclass(frozen=True)
class Budget:
    """What the kernels of a source may use, and instructions each of them must have."""

    source: str  # a file of csrc/cuda
    kernel: str  # searched in the kernel's name as C++ spells it
    blocks: int  # of the largest size, that have to fit on a multiprocessor by registers
    shared: int = 0  # bytes of static shared memory
    needs: tuple[str, ...] = ()  # patterns of opcodes

    def registers(self, threads: int) -> int:
        """Registers a thread may have: they are given out in eights."""
        return min(REGISTERS_PER_SM // (threads * self.blocks) // 8 * 8, 255)


TENSOR_CORES = (r"HMMA\.16816\.F32", r"LDSM\.16", "LDGSTS")
WIDE = (r"LDG\..*128",)
ATTENTION = (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.\S*128", r"LDS\.128", r"MUFU\.EX2")
# GEMMs and transforms: that one block fits. How many do is in the planners' tables, checked below.
BUDGETS = (
    # Memory-bound; short rows have blocks of fewer threads, and so more of them.
    Budget("quantize.cu", r"\bquantize_kernel<.*, 2, false>", blocks=1, shared=256),
    Budget("quantize.cu", r"\bquantize_kernel<.*, 8, false>", blocks=1, shared=256, needs=WIDE),
    Budget("quantize.cu", r"\bquantize_kernel<.*, 8, true>", blocks=7, needs=WIDE),  # a warp a row
    Budget("quantize.cu", "plain_kernel", blocks=6, shared=64),
    # One block of 512 threads loads while the other computes.
    Budget("hadamard.cu", "power_kernel", blocks=2),
    Budget("hadamard.cu", "base_kernel", blocks=4, needs=TENSOR_CORES),
    Budget("hadamard.cu", "plain_kernel", blocks=4, shared=4 * 2048 * 4),
    Budget("transform_bf16.cu", "transform_kernel", blocks=1, needs=TENSOR_CORES),
    Budget("transform_fp16.cu", "transform_kernel", blocks=1, needs=TENSOR_CORES),
    Budget("transform_general.cu", "general_kernel", blocks=3, shared=128),
    # Memory-bound where they are fast.
    Budget("kv_cache.cu", r"\bdequantize_kernel", blocks=3, needs=(r"STG\.E\.128",)),
    Budget("kv_cache.cu", "plain_kernel", blocks=8),
    Budget("kv_cache_append.cu", "append_rows_kernel", blocks=8, needs=(r"LDG\..*64",)),
    Budget("kv_cache_append.cu", "append_few_kernel", blocks=4, shared=8192),
    Budget("kv_cache_append.cu", "append_many_kernel", blocks=1, needs=("FFMA", r"LDS\.128")),
    Budget("kv_cache_append.cu", "plain_kernel", blocks=8, shared=128),
    # As many as kAttentionSizes says: checked below.
    Budget("attention_mma.cu", "attention_mma_kernel", blocks=2, needs=ATTENTION),
    Budget("attention.cu", "general_kernel", blocks=4, shared=11264),
    Budget("attention.cu", "join_kernel", blocks=8, shared=528),
    Budget("heads.cu", r"\bturn_kernel", blocks=6),
    Budget("heads.cu", r"\bgather_kernel", blocks=8),
    Budget("gemm.cu", "widen_kernel", blocks=8),  # memory-bound: all threads an SM can have
    Budget("gemm_mma.cu", "gemm_mma_kernel", blocks=1, needs=(r"IMMA\.16832\.S8\.S8", "LDGSTS")),
    Budget(
        "gemm_stream.cu",
        "gemm_stream_kernel",
        blocks=1,  # of 16 warps; registers: test_streams_use_the_registers_that_are_planned_with
        needs=(r"IMMA\.16832\.S8\.S8", r"LDGSTS\..*BYPASS.*128", r"LDS\.128"),
    ),
    Budget("gemm_w4a16.cu", "w4a16_general_kernel", blocks=3),
    *(
        Budget(
            f"gemm_w4a16_{dtype}.cu",
            kernel,
            blocks=blocks,
            needs=(r"HMMA\.16816\.F32", r"LDSM\.16", r"LDGSTS\..*BYPASS.*128"),
        )
        for dtype in ("bf16", "fp16")
        for kernel, blocks in (("stream_kernel", 2), ("tile_kernel<.*, 1, 1, 4>", 4), ("tile", 1))
    ),
    Budget("gemm_s4_cutlass_sm8x.cu", "", blocks=1, needs=(r"IMMA\.16864\.[SU]4\.S4", "LDSM")),
    Budget("gemm_s8s4_cutlass_sm8x.cu", "", blocks=1, needs=(r"IMMA\.16832\.S8\.S8", "LDSM")),
)
# Weights in registers or shared memory, tokens by the tensor memory accelerator.
HOPPER_GEMM = Budget("*_cutlass_sm90.cu", "", blocks=1, needs=(r"IGMMA\.64x.*S8\.S8", "UTMALDG"))


def architectures(source: str) -> tuple[str, ...]:
    """What CMakeLists.txt compiles a source for."""
    if source.endswith("_sm90.cu"):
        return ("sm_90a",)
    return SM8X if source.endswith("_sm8x.cu") else ALL


def budget_of(kernel: sass.Kernel) -> Budget | None:
    """The first row of BUDGETS that speaks of a kernel."""
    if kernel.source.endswith("_cutlass_sm90.cu"):  # one kernel, one file
        return HOPPER_GEMM
    rows = (row for row in BUDGETS if row.source == kernel.source)
    return next((row for row in rows if re.search(row.kernel, kernel.name)), None)


# ---- the laws: each says what is wrong with a kernel, or nothing ---------------------------------


def has_local_memory(kernel: sass.Kernel) -> str | None:
    """Spilled registers, indexed local arrays and stack frames go through memory."""
    moves = kernel.count("LDL", "STL")
    return f"{kernel.local} bytes, {moves} moves" if kernel.local or moves else None


def is_emulated(kernel: sass.Kernel) -> str | None:
    """From sm_90 on there is no 4-bit matrix unit: the compiler calls a slow routine instead."""
    called = [name for name in kernel.calls if "mma_sub_byte" in name]
    return f"calls {called[0]}" if called else None


def gemm_calls(kernel: sass.Kernel) -> str | None:
    """A subroutine in a GEMM kernel is an assertion, a division or an emulation: none belongs.

    Calls to labels and to these routines are the versions of warp-wide instructions for a warp that
    has split up; it never does.
    """
    split_warp = re.compile(r"\.L_x_|\$__internal_\d+_\$__cuda_(sm70_\w+sync|reduxsync)(_|$)")
    called = [name for name in kernel.calls if not split_warp.match(name)]
    if not kernel.source.startswith("gemm") or not called:
        return None
    return f"calls {', '.join(sorted(called))}"


def has(kernel: sass.Kernel, pattern: str) -> bool:
    """Whether an opcode matches a pattern."""
    return any(re.match(pattern, opcode) for opcode in kernel.opcodes)


def is_over_budget(kernel: sass.Kernel) -> str | None:
    """Registers, static shared memory and required instructions, by BUDGETS."""
    row = budget_of(kernel)
    if row is None:
        return "no row in BUDGETS"
    wrong = [f"no {opcode}" for opcode in row.needs if not has(kernel, opcode)]
    if kernel.registers > row.registers(kernel.threads):
        wrong.append(f"{kernel.registers} registers, {row.registers(kernel.threads)} allowed")
    if kernel.shared > row.shared:
        wrong.append(f"{kernel.shared} bytes of shared memory, {row.shared} allowed")
    return "; ".join(wrong) or None


Law = Callable[[sass.Kernel], str | None]
LAWS: tuple[Law, ...] = (has_local_memory, is_emulated, gemm_calls, is_over_budget)


def target(ptx: Path) -> str:
    """The architecture a PTX text is for."""
    found = re.search(r"^\.target (\w+)", ptx.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def emulated_products(ptx: Path) -> int:
    """4-bit matrix products in a PTX text."""
    return len(re.findall(r"\bw?mma\.\S*\.[su]4\.", ptx.read_text(encoding="utf-8")))


# ---- the build -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools() -> None:
    """Skip unless the disassembler is there."""
    missing = sass.missing_tools()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (the Makefile installs them)")


@pytest.fixture(scope="module")
def nvcc() -> str:
    """The compiler of the build."""
    cache = CACHE.read_text(encoding="utf-8") if CACHE.exists() else ""
    found = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    if found is None or not Path(found[1]).exists():
        pytest.skip("no nvcc (see python -m flatquant_cuda)")
    return found[1]


@pytest.fixture(scope="module")
def files(tools: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The objects of the build, by source."""
    settings = CACHE.read_text(encoding="utf-8") if CACHE.exists() else ""
    if "FLATQUANT_CUDA:BOOL=ON" not in settings or not ARCHIVE.exists():
        pytest.skip("the CUDA kernels were not built (see python -m flatquant_cuda)")
    if "FLATQUANT_TEST_S4:BOOL=ON" in settings:
        pytest.skip("built with FLATQUANT_TEST_S4=1: slow on purpose")
    return sass.objects(ARCHIVE, tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def kernels(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[sass.Kernel]:
    """Every kernel of the build."""
    return sass.read(files, tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def ptx(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The PTX texts of the build, by source."""
    return sass.read_ptx(files, tmp_path_factory.mktemp("ptx"))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_no_kernel(law: Law, kernels: list[sass.Kernel]) -> None:
    assert kernels
    assert [f"{kernel}: {wrong}" for kernel in kernels if (wrong := law(kernel))] == []


def test_every_source_is_compiled_for_its_architectures(kernels: list[sass.Kernel]) -> None:
    found = {(kernel.source, kernel.arch) for kernel in kernels}
    sources = {kernel.source for kernel in kernels}
    assert found == {(source, arch) for source in sources for arch in architectures(source)}


def test_every_architecture_has_the_same_kernels(kernels: list[sass.Kernel]) -> None:
    """Nothing is compiled away behind an `#if` on the architecture."""
    for source in {kernel.source for kernel in kernels}:
        names = {
            arch: {k.name for k in kernels if (k.source, k.arch) == (source, arch)}
            for arch in architectures(source)
        }
        assert len({frozenset(found) for found in names.values()}) == 1, source


def test_every_budget_has_a_kernel(kernels: list[sass.Kernel]) -> None:
    spoken_of = {budget_of(kernel) for kernel in kernels}
    built = {kernel.source for kernel in kernels}
    assert [row for row in BUDGETS if row.source in built and row not in spoken_of] == []


# ---- what the planners believe -------------------------------------------------------------------


@pytest.fixture(scope="module")
def native() -> Any:
    """The planners."""
    return pytest.importorskip(
        "flatquant_cuda._native", reason="flatquant_cuda._native was not built (pybind11)"
    )


def planned_tile(kernel: sass.Kernel) -> tuple[str, ...] | None:
    """Kernel and tile by the names of plan_gemm.h: (name, m, n), or None if it is no GEMM."""
    if match := re.match(r"gemm_(s4|s8s4)_cutlass_sm8x", kernel.source):
        tile = re.search(r"GemmShape<(\d+), (\d+), \d+>", kernel.name)
        assert tile, kernel
        return f"{match[1]}_sm8x", *tile.groups()
    if match := re.match(r"gemm_(bytes|mixed)_(\d+)x(\d+)_cutlass_sm90", kernel.source):
        return f"{match[1]}_sm90", *match.groups()[1:]
    if match := re.search(r"\bgemm_mma_kernel<\S*MmaTile<(\d+), (\d+),", kernel.name):
        return "mma", *match.groups()
    return None


def test_gemm_tiles_are_resident_as_planned(native: Any, kernels: list[sass.Kernel]) -> None:
    tiles = {
        (tile["kernel"], str(tile["tile_m"]), str(tile["tile_n"])): tile
        for tile in native.GEMM_TILES
    }
    assert len(tiles) == len(native.GEMM_TILES)
    seen = set()
    for kernel in kernels:
        tile = planned_tile(kernel)
        if tile is None:
            continue
        assert tile in tiles, kernel
        seen.add(tile)
        registers = -(-kernel.registers // 8) * 8 * kernel.threads
        assert registers * tiles[tile]["resident"] <= REGISTERS_PER_SM, kernel
    if any("_cutlass_" in kernel.source for kernel in kernels):
        assert seen == set(tiles)


def test_streams_use_the_registers_that_are_planned_with(
    native: Any, kernels: list[sass.Kernel]
) -> None:
    """Of gemm_stream by its products down and across, of gemm_w4a16 by the threads of a block."""
    streams = {(tile["rows"] // 16, tile["tokens"] // 8): tile for tile in native.STREAM_TILES}
    floats = {tile["kernel"]: tile for tile in native.W4A16_TILES}
    seen = set()
    for kernel in kernels:
        if match := re.search(r"\bgemm_stream_kernel<.*>, (\d+), (\d+)>", kernel.name):
            size = int(match[1]), int(match[2])
            seen.add(size)
            assert kernel.registers <= streams[size]["registers"], kernel
        elif match := re.search(r"\bw4a16_(stream|tile)_kernel<", kernel.name):
            name = "stream" if match[1] == "stream" else "small_tile"
            name = "large_tile" if kernel.threads != floats[name]["threads"] else name
            seen.add(name)
            assert kernel.threads == floats[name]["threads"], kernel
            assert kernel.registers <= floats[name]["registers"], kernel
    assert seen == {*streams, *floats}


def test_transforms_use_the_registers_that_are_planned_with(
    native: Any, kernels: list[sass.Kernel]
) -> None:
    used: dict[int, int] = {}
    for kernel in kernels:
        match = re.search(r"\btransform_kernel<\S+, (\d+), (\d+), (\d+)", kernel.name)
        if match:
            tiles, _, warps = map(int, match.groups())
            assert kernel.threads == 32 * warps, kernel
            used[tiles] = max(used.get(tiles, 0), kernel.registers)
    planned = {kernel["column_tiles"]: kernel["registers"] for kernel in native.TRANSFORM_KERNELS}
    assert used.keys() == planned.keys()
    for tiles, registers in used.items():
        assert registers <= planned[tiles] <= registers + 16, tiles


def test_attention_blocks_are_resident_as_planned(native: Any, kernels: list[sass.Kernel]) -> None:
    seen = set()
    for kernel in kernels:
        match = re.search(r"\battention_mma_kernel<(\d+), (\d+)>", kernel.name)
        if match:
            dim, resident = map(int, match.groups())
            assert native.ATTENTION_SIZES[dim] == resident
            assert kernel.threads == native.ATTENTION_THREADS
            registers = -(-kernel.registers // 8) * 8 * kernel.threads
            assert registers * resident <= REGISTERS_PER_SM, kernel
            seen.add(dim)
    assert seen == set(native.ATTENTION_SIZES)


# ---- what is shipped -----------------------------------------------------------------------------


def shipped() -> Path | None:
    """The op library as it was installed."""
    spec = importlib.util.find_spec("flatquant_cuda")
    folders = spec.submodule_search_locations if spec else None
    return next(Path(folders[0]).glob("_ops*.so"), None) if folders else None


def test_ptx_is_where_it_is_wanted(kernels: list[sass.Kernel], ptx: dict[str, list[Path]]) -> None:
    """One for sm_80 beside every kernel for all cards; none beside what one card only can do."""
    sources = {kernel.source for kernel in kernels}
    found = {source: [target(path) for path in ptx[source]] for source in sources}
    assert found == {s: ["sm_80"] if architectures(s) == ALL else [] for s in sources}


def test_ptx_has_no_4_bit_products(ptx: dict[str, list[Path]]) -> None:
    """A newer card would compile it at load time, to a slow emulation."""
    assert [path for paths in ptx.values() for path in paths if emulated_products(path)] == []


@pytest.mark.parametrize("arch", [pytest.param("sm_100", marks=pytest.mark.long), "sm_120"])
def test_ptx_becomes_good_code_on_newer_cards(
    arch: str, ptx: dict[str, list[Path]], nvcc: str, tmp_path: Path
) -> None:
    """What the driver will do there: local memory and emulation are no answer."""
    work = [(source, path) for source, paths in ptx.items() for path in paths]

    def compiled(source: str, path: Path) -> tuple[Path, str, str]:
        cubin = tmp_path / f"{source}.cubin"
        subprocess.run([nvcc, f"-arch={arch}", "-cubin", path, "-o", cubin], check=True)
        return cubin, source, arch

    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda item: compiled(*item), work))
    found = sass.read_cubins(cubins)
    assert [
        str(kernel) for kernel in found if has_local_memory(kernel) or is_emulated(kernel)
    ] == []


def test_library_ships_the_kernels_that_were_looked_at(kernels: list[sass.Kernel]) -> None:
    library = shipped()
    if library is None:
        pytest.skip("no op library beside flatquant_cuda/__init__.py")
    assert sass.kernel_names(library) == sass.kernel_names(ARCHIVE)
    assert sass.ptx_count(library) == sass.ptx_count(ARCHIVE)


# ---- the laws themselves: planted faults must be found -------------------------------------------

PLANTED = r"""
#include <cstdint>
#define S4 "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
__global__ void s4_kernel(const uint32_t* a, int32_t* c) {
  int32_t d[4] = {0, 0, 0, 0};
  asm volatile(S4 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
  for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = d[i];
}
__global__ void spilling_kernel(const float* x, float* y) {
  __shared__ float tile[1024];
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = x[i * blockDim.x + threadIdx.x];
  tile[threadIdx.x] = values[threadIdx.x % 64];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x ^ 1] / values[(threadIdx.x + 7) % 64];
}
"""


Planted = tuple[Path, dict[tuple[str, str], sass.Kernel]]


@pytest.fixture(scope="module")
def planted(tools: None, nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """An object with faulty kernels and PTX, made by the compiler of the build."""
    folder = tmp_path_factory.mktemp("planted")
    source = folder / "gemm_planted.cu"
    source.write_text(PLANTED, encoding="utf-8")
    codes = ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a")
    options = [f"-gencode={code}" for code in codes]
    made = Path(f"{source}.o")
    subprocess.run([nvcc, "-O3", *options, "-c", source, "-o", made], check=True)
    kernels = sass.read({source.name: made}, folder)
    return made, {(kernel.name.split("(")[0], kernel.arch): kernel for kernel in kernels}


def test_emulation_is_found(planted: Planted) -> None:
    kernels = planted[1]
    assert is_emulated(kernels["s4_kernel", "sm_90a"])
    assert gemm_calls(kernels["s4_kernel", "sm_90a"])
    assert not is_emulated(kernels["s4_kernel", "sm_80"])
    assert kernels["s4_kernel", "sm_80"].count("IMMA.16864.S4.S4") == 1
    assert kernels["s4_kernel", "sm_90a"].count("IMMA.16864.S4.S4") == 0


def test_local_memory_is_found(planted: Planted) -> None:
    for arch in ("sm_80", "sm_90a"):
        kernel = planted[1]["spilling_kernel", arch]
        assert has_local_memory(kernel)
        assert kernel.local >= 256
        assert kernel.shared == 4096
        assert kernel.count("LDL") >= 1
        assert kernel.count("LDS") >= 1


def test_division_in_a_gemm_is_found(
    planted: Planted,
) -> None:
    assert gemm_calls(planted[1]["spilling_kernel", "sm_80"])


def test_ptx_is_found(planted: Planted, tmp_path: Path) -> None:
    assert sass.ptx_count(planted[0]) == 1
    (found,) = sass.read_ptx({"planted": planted[0]}, tmp_path)["planted"]
    assert target(found) == "sm_80"
    assert emulated_products(found) == 1


def test_kernel_without_budget_is_found(
    planted: Planted,
) -> None:
    assert is_over_budget(planted[1]["s4_kernel", "sm_80"]) == "no row in BUDGETS"


def test_kernel_over_its_budget_is_found() -> None:
    good = sass.Kernel(
        source="gemm_mma.cu",
        arch="sm_80",
        name="void gemm_mma_kernel<...>(MmaParams)",
        threads=128,
        registers=128,
        shared=0,
        local=0,
        opcodes=Counter({"IMMA.16832.S8.S8": 8, "LDGSTS.E.BYPASS.128": 4}),
        calls=frozenset(),
    )
    assert is_over_budget(good) is None
    assert is_over_budget(replace(good, threads=512, registers=136)) == "136 registers, 128 allowed"
    assert is_over_budget(replace(good, shared=16)) == "16 bytes of shared memory, 0 allowed"
    assert is_over_budget(replace(good, opcodes=Counter({"IDP.4A": 8}))) is not None
