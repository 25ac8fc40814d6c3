"""The planners of the CUDA kernels: for every real size on every GPU of the table there is a plan,
and it is one that can run. No GPU is needed: the planners are pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .shapes import CHANNELS, FACTORS, HEADS, LINEARS, ROWS

native: Any = pytest.importorskip(
    "flatquant_cuda._native", reason="flatquant_cuda._native was not built (pybind11)"
)

Gpu = dict[str, Any]
Columns = dict[str, NDArray[np.int64]]

GPUS: list[Gpu] = native.gpus()
MOST_BLOCKS = 2**31 - 1  # of a grid, in x
SM8X = (80, 86, 89)
WIDTHS = ((4, 4), (8, 4), (8, 8))  # bits of activations and weights
NO_DEVICE: Gpu = {**GPUS[0], "name": "none", **dict.fromkeys(list(GPUS[0])[1:], 0)}


def by_name(gpu: Gpu) -> str:
    """A GPU's name, for the tests' names."""
    name: str = gpu["name"]
    return name


every_gpu = pytest.mark.parametrize("gpu", GPUS, ids=by_name)


def test_table_of_gpus() -> None:
    assert {gpu["arch"] for gpu in GPUS} >= {80, 86, 89, 90, 100, 120}
    assert len({gpu["name"] for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert gpu["shared_per_sm"] == gpu["shared_per_block"] + 1024, gpu
        assert gpu["registers_per_sm"] == 65536, gpu
        assert 64 <= gpu["sms"] <= 256, gpu
        assert 600 <= gpu["bandwidth_gb"] <= 8000, gpu
        assert 4 << 20 <= gpu["l2_bytes"] <= 256 << 20, gpu


# ---- GEMM ----------------------------------------------------------------------------------------


def gemm_names(plans: Columns) -> set[str]:
    """The kernels that some plans take."""
    return {native.GEMM_KERNELS[kernel] for kernel in np.unique(plans["kernel"])}


def gemm_tiles(plans: Columns) -> set[tuple[Any, ...]]:
    """The entries of the table that some plans take."""
    keys = ("kernel", "tile_m", "tile_n", "tile_k", "stages")
    tiled = plans["kernel"] != STREAM
    found = np.unique(np.stack([plans[key][tiled] for key in keys]), axis=1).T
    return {(native.GEMM_KERNELS[kernel], *map(int, rest)) for kernel, *rest in found}


STREAM = native.GEMM_KERNELS.index("stream")  # its launches: test_plan_stream.py
COMPILED = {
    tuple(tile[key] for key in ("kernel", "tile_m", "tile_n", "tile_k", "stages"))
    for tile in native.GEMM_TILES
}
WHERE = {  # which GPUs have the instructions that a kernel is made of
    "mma": lambda arch: arch >= 80,
    "stream": lambda arch: arch >= 80,
    "s4_sm8x": lambda arch: arch in SM8X,
    "s8s4_sm8x": lambda arch: arch in SM8X,
    "mixed_sm90": lambda arch: arch == 90,
    "bytes_sm90": lambda arch: arch == 90,
}
TAKES = {  # and which widths it reads, before and after activations are widened
    "mma": {(4, 4), (8, 4), (8, 8)},
    "stream": {(4, 4), (8, 4), (8, 8)},
    "s4_sm8x": {(4, 4)},
    "s8s4_sm8x": {(8, 4)},
    "mixed_sm90": {(4, 4), (8, 4)},
    "bytes_sm90": {(8, 8)},
}
TAKES_ZERO = {"mma", "stream", "s4_sm8x"}  # asymmetric activations


def check_gemm(gpu: Gpu, plans: Columns, m: NDArray[np.int64], n: int, a: int, w: int) -> None:
    """What has to hold of any plan."""
    for name in gemm_names(plans):
        assert name in WHERE, (name, n)
        assert WHERE[name](gpu["arch"]), name
        assert (a, w) in TAKES[name], name
    assert gemm_tiles(plans) <= COMPILED
    assert plans["shared_bytes"].max() <= gpu["shared_per_block"]
    tiles = -(-m // plans["tile_m"]) * -(-n // plans["tile_n"])
    assert np.array_equal(plans["blocks"], tiles * np.maximum(plans["cluster"], 1))
    assert plans["blocks"].min() > 0
    assert plans["blocks"].max() <= MOST_BLOCKS
    mixed = plans["kernel"] == native.GEMM_KERNELS.index("mixed_sm90")
    assert np.array_equal(plans["widen"] == 1, mixed & (a == 4))


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_gemm_of_every_real_shape(gpu: Gpu, a: int, w: int) -> None:
    for n, k in LINEARS:
        for residual in (False, True):
            plans = native.plan_gemm(gpu, ROWS, n, k, a_bits=a, w_bits=w, residual=residual)
            check_gemm(gpu, plans, ROWS, n, a, w)


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_more_tokens_never_cost_less(gpu: Gpu, a: int, w: int) -> None:
    for n, k in LINEARS:
        clocks = native.plan_gemm(gpu, ROWS, n, k, a_bits=a, w_bits=w)["clocks"]
        assert (np.diff(clocks) >= 0).all(), (n, k, ROWS[1:][np.diff(clocks) < 0])


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu["arch"] in SM8X], ids=by_name)
def test_4_bit_activations_never_cost_more_with_int4_tensor_cores(gpu: Gpu) -> None:
    for n, k in LINEARS:
        narrow, wide = (native.plan_gemm(gpu, ROWS, n, k, a_bits=a)["clocks"] for a in (4, 8))
        assert (narrow <= wide).all(), (n, k)


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_same_gemm_same_plan(gpu: Gpu, a: int, w: int) -> None:
    """The plan for a token count does not depend on what was planned before."""
    n, k = LINEARS[len(LINEARS) // 2]
    plans = native.plan_gemm(gpu, ROWS, n, k, a_bits=a, w_bits=w)
    again = native.plan_gemm(gpu, ROWS[::-1], n, k, a_bits=a, w_bits=w)
    assert all(np.array_equal(plans[key], again[key][::-1]) for key in plans)


@every_gpu
@pytest.mark.parametrize(
    "limits",
    [
        {"aligned": False},
        {"zero": True},
        {"dtype": "float32"},
        {"cutlass": False},
        {"n": 4097},
        {"n": 4100},
        {"k": 4097},
        {"k": 4112},
    ],
    ids=str,
)
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_cutlass_is_asked_for_nothing_it_cannot_do(
    gpu: Gpu, limits: dict[str, Any], a: int, w: int
) -> None:
    query = {"n": 4096, "k": 4096, **limits}
    plans = native.plan_gemm(gpu, ROWS, a_bits=a, w_bits=w, **query)
    check_gemm(gpu, plans, ROWS, query["n"], a, w)
    other = {"mma"} if limits == {"aligned": False} else {"mma", "stream"}
    assert gemm_names(plans) <= (other if "zero" not in limits else TAKES_ZERO)


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_gemm_of_odd_and_extreme_sizes(gpu: Gpu, a: int, w: int) -> None:
    m = np.array([1, 7, 16, 17, 1000, 1 << 20], dtype=np.int64)
    for n in (1, 13, 8, 152064):
        for k in (1, 31, 32, 129024, 131071, 131072, 1048576 // (8 if w == 8 else 1)):
            plans = native.plan_gemm(gpu, m, n, k, a_bits=a, w_bits=w)
            check_gemm(gpu, plans, m, n, a, w)


@pytest.mark.parametrize("arch", [0, 70, 75])
def test_old_gpu_or_none_has_no_gemm(arch: int) -> None:
    for a, w in WIDTHS:
        plans = native.plan_gemm({**NO_DEVICE, "arch": arch}, ROWS, 4096, 4096, a_bits=a, w_bits=w)
        assert gemm_names(plans) == {"none"}


def test_every_compiled_gemm_tile_is_somebodys_best() -> None:
    """A tile that no real problem takes only costs compile time."""
    taken = set()
    for gpu in GPUS:
        for n, k in LINEARS:
            for a, w in WIDTHS:
                for cutlass in (True, False):
                    plans = native.plan_gemm(gpu, ROWS, n, k, a_bits=a, w_bits=w, cutlass=cutlass)
                    taken |= gemm_tiles(plans)
    assert COMPILED - taken == set()


# ---- the Kronecker transform ---------------------------------------------------------------------

# Sizes, and whether there is a right factor.
TRANSFORMS = [(n1, n2, True) for n1, n2 in FACTORS] + [(n1, n2, False) for n1, n2 in HEADS]
# Qwen2.5-32B's down_proj: twelve column tiles have no kernel of their own, and the one for fourteen
# has not the registers for nine row tiles in a block. Right, but slow, without clusters.
WITHOUT_KERNEL = {(144, 192)}
WITH_KERNEL = [size for size in TRANSFORMS if size[:2] not in WITHOUT_KERNEL]
GENERAL, TENSOR_CORE = (native.TRANSFORM_PATHS.index(name) for name in ("general", "tensor_core"))
KERNELS = {kernel["column_tiles"]: kernel for kernel in native.TRANSFORM_KERNELS}
FRAGMENT = 512  # bytes of 16 x 16 numbers of a factor
MOST_RANGES = 32  # warps that share a token have room to exchange so many ranges


def ceil_div(a: Any, b: Any) -> Any:
    """a / b, rounded up."""
    return -(-a // b)


def plan_transform(gpu: Gpu, n1: int, n2: int, right: bool, **how: Any) -> Columns:
    """Plans for every row count of the ladder."""
    plans: Columns = native.plan_transform(gpu, ROWS, n1, n2, right=right, **how)
    return plans


def shared_bytes(plans: Columns, right: bool, **changes: Any) -> NDArray[np.int64]:
    """What a plan's factors and tokens take of shared memory, written down a second time."""
    p = {**plans, **changes}
    left = p["left_shared"] * ceil_div(p["row_tiles"], p["cluster"]) * p["row_tiles"] * FRAGMENT
    slices = np.where(p["right_shared"], p["column_tiles"], 2) if right else 0
    # 16 bytes more than 16-bit numbers need, so that rows begin in different banks
    slot = 16 * p["row_tiles"] * (32 * p["column_tiles"] + 16)
    exchange = p["tokens"] * (2 * MOST_RANGES * 8 + p["row_tiles"] * 4)
    total: NDArray[np.int64] = (
        left + slices * p["column_tiles"] * FRAGMENT + p["tokens"] * slot + exchange
    )
    return total


@every_gpu
@pytest.mark.parametrize(("n1", "n2", "right"), WITH_KERNEL)
def test_transform_of_every_real_size(gpu: Gpu, n1: int, n2: int, right: bool) -> None:
    plans = plan_transform(gpu, n1, n2, right)
    assert (plans["path"] == TENSOR_CORE).all(), "tensor cores serve every real size"

    # Tiles cover the matrix, and no more than that.
    assert (16 * plans["row_tiles"] >= n1).all()
    assert (16 * plans["row_tiles"] - n1 < 16).all()
    assert (16 * plans["column_tiles"] >= n2).all()
    assert (16 * plans["column_tiles"] - n2 < 16).all()
    tiles_per_block = ceil_div(plans["row_tiles"], plans["cluster"])
    assert (plans["warps"] * plans["tiles_per_warp"] >= tiles_per_block).all()
    of_half = ceil_div(plans["row_tiles"], np.maximum(plans["cluster"] // 2, 1))
    assert (tiles_per_block < of_half)[plans["cluster"] > 1].all(), "half the cluster would do"

    # There is such a kernel.
    kernel = KERNELS[int(plans["column_tiles"][0])]
    assert (plans["column_tiles"] == kernel["column_tiles"]).all()
    assert (plans["tiles_per_warp"] <= kernel["tiles_per_warp"]).all()
    assert (plans["threads"] == 32 * plans["warps"] * plans["tokens"]).all()
    assert (plans["threads"] <= 32 * kernel["warps"]).all()
    # Only warps with a row tile have a range; the others of a block help to load.
    owners = ceil_div(tiles_per_block, plans["tiles_per_warp"])
    assert (owners * plans["cluster"] <= MOST_RANGES).all()
    if kernel["tiles_per_warp"] > 1:  # only the others can do without a factor in shared memory
        assert plans["left_shared"].all()
        assert plans["right_shared"].all()

    # It fits, at least once.
    assert (plans["shared_bytes"] == shared_bytes(plans, right)).all()
    assert plans["shared_bytes"].max() <= gpu["shared_per_block"]
    registers = ceil_div(kernel["registers"], 8) * 8
    assert (plans["threads"] * registers).max() <= gpu["registers_per_sm"]

    # Every row has a block, and no block is without.
    groups = plans["blocks"] // plans["cluster"]
    assert (plans["blocks"] % plans["cluster"] == 0).all()
    assert (groups >= 1).all()
    assert (groups <= ceil_div(ROWS, plans["tokens"])).all()
    assert plans["blocks"].max() <= MOST_BLOCKS


@every_gpu
@pytest.mark.parametrize(("n1", "n2", "right"), WITH_KERNEL)
def test_transform_uses_the_whole_gpu(gpu: Gpu, n1: int, n2: int, right: bool) -> None:
    """Many tokens: no idle multiprocessor. Few, on Hopper: several blocks share one."""
    plans = plan_transform(gpu, n1, n2, right)
    assert (plans["blocks"] >= gpu["sms"] // plans["cluster"] * plans["cluster"])[
        gpu["sms"] <= ROWS
    ].all()
    few = gpu["sms"] >= 8 * ROWS
    if gpu["arch"] == 90 and n1 >= 64:
        assert (plans["cluster"][few] >= 2).all()
    if gpu["arch"] != 90:  # code for others has no clusters, PTX for newer ones neither
        assert (plans["cluster"] == 1).all()
    assert np.isin(plans["cluster"], (1, 2, 4, 8)).all()
    assert (plans["tokens"][plans["cluster"] > 1] == 1).all()


@every_gpu
@pytest.mark.parametrize(("n1", "n2", "right"), WITH_KERNEL)
def test_right_factor_is_read_again_only_if_it_must(
    gpu: Gpu, n1: int, n2: int, right: bool
) -> None:
    plans = plan_transform(gpu, n1, n2, right)
    smallest = {"left_shared": 0, "right_shared": 1, "tokens": 1}
    fits = shared_bytes(plans, right, **smallest) <= gpu["shared_per_block"]
    assert plans["right_shared"][fits].all()


def test_sizes_without_kernel_are_as_few_as_possible() -> None:
    for n1, n2 in WITHOUT_KERNEL:
        plans = [plan_transform(gpu, n1, n2, True) for gpu in GPUS]
        assert any((plan["path"] == GENERAL).any() for plan in plans), "there is one now"


@every_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_transform_of_anything_else(gpu: Gpu, dtype: str) -> None:
    """Float32, misaligned tensors, odd and prime sizes take the general path."""
    for n1, n2, right in TRANSFORMS:
        plans = plan_transform(gpu, n1, n2, right, dtype=dtype, vectors=False)
        assert (plans["path"] == GENERAL).all()
        if dtype == "float32":
            assert (plan_transform(gpu, n1, n2, right, dtype=dtype)["path"] == GENERAL).all()
    for n1, n2 in ((1, 13), (13, 1), (3, 7), (64, 514), (300, 300), (1, 8191)):
        assert (plan_transform(gpu, n1, n2, True, dtype=dtype)["path"] == GENERAL).all()


@every_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_general_transform_fits(gpu: Gpu, dtype: str) -> None:
    odd = [(1, 1), (1, 13), (13, 1), (3, 7), (1, 4097), (257, 256), (1, 8191)]
    for n1, n2 in [*FACTORS, *HEADS, *odd]:
        for rows in (1, 7, 4096, 1 << 20):
            for left in (True, False):
                for right in (True, False):
                    how = {"dtype": dtype, "left": left, "right": right}
                    plan = native.plan_general(gpu, rows, n1, n2, **how)
                    assert 0 < plan["blocks"] <= min(rows, MOST_BLOCKS), (n1, n2, how)
                    assert plan["shared_bytes"] <= gpu["shared_per_block"], (n1, n2, how)


def test_same_transform_same_plan() -> None:
    for gpu in GPUS:
        for n1, n2, right in TRANSFORMS:
            plans = native.plan_transform(gpu, ROWS, n1, n2, right=right)
            again = native.plan_transform(gpu, ROWS[::-1], n1, n2, right=right)
            assert all(np.array_equal(plans[key], again[key][::-1]) for key in plans)


def test_every_compiled_transform_is_somebodys_best() -> None:
    """A kernel that no real size takes only costs compile time."""
    taken = {
        int(tiles)
        for gpu in GPUS
        for n1, n2, right in TRANSFORMS
        for tiles in np.unique(plan_transform(gpu, n1, n2, right)["column_tiles"])
    }
    assert set(KERNELS) - taken == set()


# ---- Hadamard ------------------------------------------------------------------------------------

POWER, BASE = (native.HADAMARD_KERNELS.index(name) for name in ("power", "base"))
# Rows of the base and power of two: every real channel count that has such a matrix, among others.
HADAMARDS = [
    (base, n // base)
    for n in (*CHANNELS, 64, 128, 256, 16384, 32768)
    for base in (1, 12, 20, 28, 36, 44, 52, 60, 76, 108, 140, 156, 172)
    if n % base == 0 and (n // base).bit_count() == 1
]


@every_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("aligned", [True, False])
def test_hadamard_of_every_real_size(gpu: Gpu, dtype: str, aligned: bool) -> None:
    for size, power in HADAMARDS:
        how = {"dtype": dtype, "base": size > 1, "aligned": aligned}
        plans = native.plan_hadamard(gpu, ROWS, size, power, **how)
        assert (1 << plans["log_power"] == power).all()
        assert plans["shared_bytes"].max() <= gpu["shared_per_block"]
        assert plans["blocks"].min() >= 1
        assert plans["blocks"].max() <= MOST_BLOCKS
        assert plans["rows"].min() >= 1
        assert (plans["threads"] % 32 == 0).all()
        assert plans["threads"].min() >= 32
        assert plans["threads"].max() <= 1024
        based = plans["kernel"] == BASE
        assert (16 * plans["tiles"][based] >= size).all()
        assert (16 * plans["tiles"][based] - size < 16).all()
        assert (plans["chunk"][based] >= 1).all()
        assert (plans["chunk"] <= plans["tiles"]).all()
        if not aligned:
            assert (plans["kernel"] == native.HADAMARD_KERNELS.index("plain")).all()
        elif dtype != "float32" and power >= 32 and 4 * size * power <= gpu["shared_per_block"]:
            assert (plans["kernel"] == (BASE if size > 1 else POWER)).all(), (size, power)
