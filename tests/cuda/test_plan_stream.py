"""The planners of few tokens: launches that can run, enough bytes under way, and no cliff from one
token to a prompt. Pure functions; see csrc/cuda/plan_stream.h and plan_w4a16.h."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .shapes import LINEARS, ROWS
from .test_plan import GPUS, WIDTHS, Gpu, by_name, ceil_div, native

every_gpu = pytest.mark.parametrize("gpu", GPUS, ids=by_name)
STREAM = native.GEMM_KERNELS.index("stream")
TILES = {(tile["rows"]): tile for tile in native.STREAM_TILES}
SLICE = 64  # bytes of a row of weights
FEW: NDArray[np.int64] = np.arange(1, 131, dtype=np.int64)
# Every planner boundary and its neighbours: multiples of 8, of 16, 32, 64, 128, 256 tokens.
EDGES: NDArray[np.int64] = np.unique(
    [m + d for m in (*range(8, 513, 8), 768, 1024, 2048) for d in (-1, 0, 1)]
).astype(np.int64)
ENOUGH = 0.9  # of latency times bandwidth


def warps_per_sm(arch: int) -> int:
    """Compute capability table of the CUDA C++ Programming Guide."""
    return 48 if arch in (86, 89, 120) else 64


def plans_of(gpu: Gpu, n: int, k: int, a: int, w: int, m: NDArray[np.int64] = FEW) -> Any:
    """Plans, by name of the field."""
    return native.plan_gemm(gpu, m, n, k, a_bits=a, w_bits=w)


def slices_of_a_warp(plans: Any, k: int, w: int) -> Any:
    """How many slices of a row each warp has."""
    return ceil_div(ceil_div(k * w // 8, SLICE), np.maximum(plans["warps"] * plans["cluster"], 1))


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_launches_can_run(gpu: Gpu, a: int, w: int) -> None:
    for n, k in LINEARS:
        every = plans_of(gpu, n, k, a, w, ROWS)
        chosen = every["kernel"] == STREAM
        p = {key: column[chosen] for key, column in every.items()}
        registers = np.array([TILES[rows]["registers"] for rows in p["tile_n"]], dtype=np.int64)
        most = np.array([TILES[rows]["tokens"] for rows in p["tile_n"]], dtype=np.int64)
        assert (p["tile_m"] % 8 == 0).all()
        assert (p["tile_m"] <= most).all()
        assert np.isin(p["warps"], (4, 8, 16)).all()
        assert np.isin(p["stages"], (2, 3, 4, 6)).all()  # waits are compiled for at most 6
        assert np.isin(p["cluster"], (1, 2, 4) if gpu["arch"] == 90 else (1,)).all()
        stage = p["tile_n"] * SLICE + p["tile_m"] * SLICE * a // w
        assert (p["shared_bytes"] == p["warps"] * p["stages"] * stage).all()
        assert (4 * p["tile_m"] * (p["tile_n"] + 4) <= p["stages"] * stage).all(), "room for sums"
        assert (p["shared_bytes"] <= gpu["shared_per_block"]).all()
        assert (p["resident"] >= 1).all()
        assert (p["resident"] * (p["shared_bytes"] + 1024) <= gpu["shared_per_sm"]).all()
        threads = p["resident"] * p["warps"] * 32
        assert (threads * registers <= gpu["registers_per_sm"]).all()
        assert (threads <= 32 * warps_per_sm(gpu["arch"])).all()
        assert (32 * p["warps"] % p["tile_n"] == 0).all(), "a thread's outputs: one feature"


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_memory_is_asked_for_enough(gpu: Gpu, a: int, w: int) -> None:
    """Bytes under way cover latency times bandwidth, where a layer has four times as many.

    Newer cards than sm_90 have no code of their own yet: two thirds will do.
    """
    needed = gpu["bandwidth_gb"] * native.LATENCY_NS * (ENOUGH if gpu["arch"] <= 90 else 2 / 3)
    seen = 0
    for n, k in LINEARS:
        if n * k * w // 8 < 4 * needed:
            continue
        p = plans_of(gpu, n, k, a, w, FEW[:16])
        chosen = p["kernel"] == STREAM
        seen += int(chosen.sum())
        live = np.minimum(p["blocks"], gpu["sms"] * p["resident"])
        ahead = np.minimum(p["stages"] - 1, slices_of_a_warp(p, k, w)) if chosen.any() else 0
        under_way = live * p["warps"] * ahead * p["tile_n"] * SLICE
        assert (under_way[chosen] >= needed).all(), (n, k, under_way / needed)
    assert seen > 100


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu["arch"] != 100], ids=by_name)
@pytest.mark.parametrize("w", [4, 8])
def test_weights_stream_past_few_tokens(gpu: Gpu, w: int) -> None:
    """Decoding takes this kernel for nearly all of the layers that are large enough to matter."""
    large = [(n, k) for n, k in LINEARS if n * k >= 1 << 24]
    for a in {8, w}:
        kernels = np.array([plans_of(gpu, n, k, a, w, FEW[:8])["kernel"] for n, k in large])
        assert (kernels == STREAM).mean() >= 0.9, a


@every_gpu
@pytest.mark.parametrize("a", [4, 8])
def test_issue_slots_are_left(gpu: Gpu, a: int) -> None:
    """Widening nibbles is hidden behind the memory: a 4-bit product would save nothing.

    Floors per slice of a block: its instructions, and its bytes at the full bandwidth.
    """
    per_clock = gpu["bandwidth_gb"] / native.gigahertz(gpu["arch"]) / gpu["sms"]
    for tile in native.STREAM_TILES:
        for tokens in (8, 16):
            if tokens > tile["tokens"]:
                continue
            issue = native.stream_instructions(tokens, tile["rows"], a, 4) / 4
            memory = tile["rows"] * SLICE / per_clock
            # One kind of card is too fast for it; it has no 4-bit products.
            assert issue <= memory * (0.5 if gpu["arch"] < 90 else 1), (tile, tokens)


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_no_cliff(gpu: Gpu, a: int, w: int) -> None:
    """Every M to 130 and both sides of every boundary: one token more never costs much more.

    Past the tokens that memory hides, a further tile of tokens costs as much as the others.
    """
    for n, k in LINEARS:
        clocks = plans_of(gpu, n, k, a, w)["clocks"]
        assert (np.diff(clocks) >= 0).all(), (n, k)
        steps = clocks[1:] / clocks[:-1]
        assert steps[:31].max() <= 1.6, (n, k, int(steps[:31].argmax()) + 2)
        assert steps.max() <= 2, (n, k, int(steps.argmax()) + 2)
        assert clocks[7] <= (1.3 if gpu["arch"] != 100 else 1.6) * clocks[0], (n, k)
        at_edges = plans_of(gpu, n, k, a, w, EDGES)["clocks"]
        assert (np.diff(at_edges) >= 0).all(), (n, k)
        near = np.diff(EDGES) == 1
        assert (at_edges[1:] / at_edges[:-1])[near].max() <= 2, (n, k)


SWEPT: NDArray[np.int64] = np.arange(1, 2100, dtype=np.int64)
SWEPT_LAYERS = ((4096, 4096), (28672, 4096), (4096, 14336), (264, 512))
PLAN = ("kernel", "tile_m", "tile_n", "tile_k", "stages", "warps", "cluster")
FLOAT_PLAN = ("kernel", "tokens", "rows", "stages")


def steps_at_boundaries(plans: Any, fields: tuple[str, ...]) -> NDArray[np.float64]:
    """What one token more costs, as a ratio, wherever it changes the plan."""
    edges = np.flatnonzero(np.any([np.diff(plans[key]) != 0 for key in fields], axis=0)) + 1
    return np.append(plans["clocks"][edges] / plans["clocks"][edges - 1], 1.0)


@every_gpu
@pytest.mark.parametrize(("a", "w"), WIDTHS)
def test_no_hole_and_no_step_where_the_plan_changes(gpu: Gpu, a: int, w: int) -> None:
    """Every number of tokens to 2100 has a kernel, and a boundary costs at most a wave."""
    for n, k in SWEPT_LAYERS:
        plans = plans_of(gpu, n, k, a, w, SWEPT)
        assert (plans["kernel"] != native.GEMM_KERNELS.index("none")).all(), (n, k)
        assert steps_at_boundaries(plans, PLAN).max() <= 2, (n, k)


@every_gpu
def test_no_hole_and_no_step_for_floats(gpu: Gpu) -> None:
    for n, k in SWEPT_LAYERS:
        for groups in (1, k // 128):
            plans = native.plan_w4a16(gpu, SWEPT, n, k, groups=groups)
            assert np.isin(plans["kernel"], list(FLOATS)).all(), (n, k)
            assert steps_at_boundaries(plans, FLOAT_PLAN).max() <= 2, (n, k)


# ---- gemm_w4a16 ----------------------------------------------------------------------------------

KINDS = native.W4A16_KERNELS
GENERAL, STREAMS = KINDS.index("general"), KINDS.index("stream")
FLOATS = {KINDS.index(tile["kernel"]): tile for tile in native.W4A16_TILES}
GROUPS = (None, 32, 64, 128, 96)  # their sizes; None: the whole row


def groups_of(k: int, size: int | None) -> int | None:
    """The number of groups of that size, if there is one."""
    if size is None:
        return 1
    return k // size if k % size == 0 else None


@every_gpu
@pytest.mark.parametrize("size", GROUPS)
def test_float_launches_can_run(gpu: Gpu, size: int | None) -> None:
    for n, k in LINEARS:
        groups = groups_of(k, size)
        if groups is None:
            continue
        p = native.plan_w4a16(gpu, ROWS, n, k, groups=groups)
        assert np.isin(p["kernel"], list(FLOATS)).all()
        fine = size is not None and size % 128 != 0
        for kind in np.unique(p["kernel"]):
            tile, mine = FLOATS[kind], p["kernel"] == kind
            tokens, stages = p["tokens"][mine], p["stages"][mine]
            assert (p["rows"][mine] == tile["rows"]).all()
            assert (tokens <= tile["tokens"]).all()
            assert (tokens % 8 == 0).all()
            if kind != STREAMS:
                assert (tokens == tile["tokens"]).all()
            stage = tile["rows"] * (64 + (16 if fine else 4)) + tokens * 256
            sums = 4 * tokens * (tile["rows"] + 4)
            rings = 8 if kind == STREAMS else 1
            shared = p["shared_bytes"][mine]
            assert (shared == rings * np.maximum(stages * stage, sums)).all()
            assert (stage % 16 == 0).all()
            assert np.isin(stages, (2, 3, 4)).all()  # waits are compiled for at most 4
            assert shared.max() <= gpu["shared_per_block"]
            assert tile["registers"] * tile["threads"] <= gpu["registers_per_sm"]
        tiles = ceil_div(ROWS, p["tokens"]) * ceil_div(n, p["rows"])
        assert np.array_equal(p["blocks"], tiles)
        assert (np.diff(p["clocks"]) >= 0).all(), (n, k)
        assert (p["clocks"][1:131] / p["clocks"][:130]).max() <= 2, (n, k)


def test_arithmetic_depends_on_the_layer_only() -> None:
    """Tensor cores or not: the same answer for every batch on every GPU, so the same bits."""
    for k, groups, on_tensor_cores in (
        (4096, 1, True),
        (4096, 32, True),
        (4096, 128, True),
        (576, 6, True),
        (33, 1, True),
        (4096, 256, False),
        (36, 3, False),
        (7, 7, False),
    ):
        for bits in (2, 3, 4):
            for gpu in GPUS:
                plan = native.plan_w4a16(gpu, ROWS, 512, k, groups=groups, bits=bits)
                assert ((plan["kernel"] != GENERAL) == on_tensor_cores).all(), (k, groups)
                plan = native.plan_w4a16(gpu, ROWS, 512, k, groups=groups, dtype="float32")
                assert (plan["kernel"] == GENERAL).all()


def test_every_float_kernel_is_somebodys_best() -> None:
    taken = {
        int(kind)
        for gpu in GPUS
        for n, k in LINEARS
        for kind in np.unique(native.plan_w4a16(gpu, ROWS, n, k)["kernel"])
    }
    assert taken == set(FLOATS)


def test_old_gpu_or_none_has_no_float_product() -> None:
    for arch in (0, 75):
        plan = native.plan_w4a16({**GPUS[0], "arch": arch}, ROWS, 512, 512)
        assert (plan["kernel"] == KINDS.index("none")).all()
