"""The planner of attention_decode: for every real cache on every GPU of the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .shapes import MODELS

native: Any = pytest.importorskip(
    "flatquant_cuda._native", reason="flatquant_cuda._native was not built (pybind11)"
)

Gpu = dict[str, Any]
Columns = dict[str, NDArray[np.int64]]

GPUS: list[Gpu] = native.gpus()
LENGTHS = np.unique(
    [n + step for n in (1, 256, 512, 2048, 4096, 32768, 131072, 2**20) for step in (-1, 0, 1)]
)
LENGTHS = LENGTHS[LENGTHS <= 2**20]
HEADS = sorted({(m.heads, m.kv_heads, m.head_dim) for m in MODELS} | {(32, 32, 80), (16, 8, 256)})
BITS = ((4, 4), (2, 2), (3, 8), (8, 8), (5, 4))
every_gpu = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu["name"])


def check(gpu: Gpu, plans: Columns, pairs: int, head_dim: int) -> None:
    """What has to hold of any plan."""
    chunk = native.ATTENTION_CHUNK
    assert np.array_equal(plans["chunks"], np.maximum(1, -(-LENGTHS // chunk)))
    assert (plans["splits"] >= 1).all()
    assert (plans["splits"] <= plans["chunks"]).all()
    assert (plans["tiles_at_a_time"] >= 1).all()
    assert (plans["tiles_at_a_time"] <= plans["tiles"]).all()
    assert np.array_equal(plans["blocks"], plans["splits"] * plans["tiles_at_a_time"] * pairs)
    assert plans["blocks"].max() < 2**31
    assert plans["shared_bytes"].max() <= gpu["shared_per_block"]
    rows = pairs * plans["tiles_at_a_time"] * native.ATTENTION_TILE_ROWS
    partial = rows * plans["chunks"] * (head_dim + 2) * 4
    assert np.array_equal(plans["workspace_bytes"], np.where(plans["chunks"] > 1, partial, 0))
    more = plans["workspace_bytes"] > 64 << 20  # only where one tile needs it
    assert (plans["tiles_at_a_time"][more] == 1).all()


@every_gpu
def test_every_real_cache_on_tensor_cores(gpu: Gpu) -> None:
    for heads, kv_heads, head_dim in HEADS:
        for batch in (1, 3, 64):
            for tq in (1, 5, 16):
                for k_bits, v_bits in BITS:
                    plans = native.plan_attention(
                        gpu,
                        LENGTHS,
                        batch=batch,
                        heads=heads,
                        kv_heads=kv_heads,
                        tq=tq,
                        head_dim=head_dim,
                        k_bits=k_bits,
                        v_bits=v_bits,
                    )
                    check(gpu, plans, batch * kv_heads, head_dim)
                    assert (plans["kernel"] == native.ATTENTION_KERNELS.index("mma")).all()
                    dim = min(size for size in native.ATTENTION_SIZES if size >= head_dim)
                    assert (plans["dim"] == dim).all()
                    assert set(plans["k_granule"]) <= {4, 8, 16}


@every_gpu
@pytest.mark.parametrize(
    "limits",
    [
        {"dtype": "float32"},
        {"head_dim": 264},
        {"head_dim": 81},
        {"head_dim": 68, "v_bits": 3},
        {"alignment": 2},
        {"capacity": 1026},
        {"capacity": 2**20 + 8, "paged": True},
    ],
    ids=str,
)
def test_the_general_kernel_takes_the_rest(gpu: Gpu, limits: dict[str, Any]) -> None:
    plans = native.plan_attention(gpu, LENGTHS, **limits)
    check(gpu, plans, 8, limits.get("head_dim", 128))
    assert (plans["kernel"] == native.ATTENTION_KERNELS.index("general")).all()


@every_gpu
def test_blocks_fill_the_gpu(gpu: Gpu) -> None:
    """A long cache keeps it busy: no wave of blocks that is mostly empty; a short one is split."""
    for batch in (1, 4, 16, 64):
        plans = native.plan_attention(gpu, LENGTHS, batch=batch)
        fit = gpu["shared_per_sm"] // (plans["shared_bytes"][0] + 1024)
        slots = gpu["sms"] * min(fit, native.ATTENTION_SIZES[128])
        jobs = plans["chunks"] * batch * 8
        assert (plans["splits"][jobs <= slots] == plans["chunks"][jobs <= slots]).all()
        waves = -(-plans["blocks"] // slots)
        time = waves * -(-plans["chunks"] // plans["splits"])
        assert (time[jobs > 16 * slots] * slots < 1.35 * jobs[jobs > 16 * slots]).all()


def test_no_device() -> None:
    nothing = {**GPUS[0], "name": "none", **dict.fromkeys(list(GPUS[0])[1:], 0)}
    assert (native.plan_attention(nothing, LENGTHS)["kernel"] == 0).all()
    old = {**GPUS[0], "arch": 75}
    assert (native.plan_attention(old, LENGTHS)["kernel"] == 0).all()
