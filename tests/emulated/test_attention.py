"""The packed cache on the host: what an answer may depend on, and what it must not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import ops, reference
from tests.ops.cases import CHECKS, Call, Case

from .emulated import ORDERS, Emulated
from .rows import bytes_of

OP = "attention_decode"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Few multiprocessors: a block goes through many chunks; many: a block for every chunk.
MACHINES = ("H100 SXM", "H100 SXM/1", "A100-80G/2", "RTX 3090/1")


def run(emulated: Emulated, call: Call, gpu: str = "H100 SXM", order: str = ORDERS[0]) -> Tensor:
    emulated.choose(gpu, order)
    return emulated.run(call)[0]


def changed(call: Call, **arguments: Any) -> Call:
    return Call(call.op, call.args, {**call.kwargs, **arguments})


def cases(dtype: torch.dtype) -> list[Call]:
    """Five chunks, with everything that cuts them."""
    lengths = (1025, 700)
    paged = {"blocks": 40, "lengths": lengths}
    return [
        Case(OP, (2, 4, 2, 1, 64, 1104), {"length": 1100}).call(dtype),
        Case(OP, (1, 4, 2, 3, 16, 1100), {"mask": "causal"}).call(dtype),
        Case(OP, (2, 4, 2, 5, 64, 32), paged).call(dtype),
        Case(OP, (2, 4, 2, 1, 64, 32), paged | {"window": 300}).call(dtype),
    ]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_no_bit_depends_on_the_split(dtype: torch.dtype, emulated: Emulated) -> None:
    for call in cases(dtype):
        whole = run(emulated, call)
        CHECKS[OP](call, (whole,), call.run(reference.attention_decode))
        grids = set()
        for gpu in MACHINES:
            emulated.launches()
            assert torch.equal(run(emulated, call, gpu), whole), gpu
            grids.add(emulated.launches()[0].split("grid=")[1])
        assert len(grids) > 1, "all of them cut the cache in the same way"


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_no_bit_depends_on_the_batch(dtype: torch.dtype, emulated: Emulated) -> None:
    for call in cases(dtype):
        whole, named = run(emulated, call), call.named()
        table, lengths, mask = (named[name] for name in ("block_table", "lengths", "mask"))
        for b in range(len(whole)):
            one = slice(b, b + 1)
            cache = call.args[1:] if table is not None else [t[one] for t in call.args[1:]]
            alone = changed(
                Call(OP, (call.args[0][one], *cache), call.kwargs),
                block_table=table if table is None else table[one],
                lengths=lengths if lengths is None else lengths[one],
            )
            assert torch.equal(run(emulated, alone), whole[one])
        if lengths is None:  # queries alone, too
            for i in range(whole.shape[2]):
                one = slice(i, i + 1)
                alone = Call(
                    OP, (call.args[0][:, :, one].contiguous(), *call.args[1:]), {**call.kwargs}
                )
                if mask is not None:
                    alone = changed(alone, mask=mask[one])
                assert torch.equal(run(emulated, alone), whole[:, :, one])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_no_bit_depends_on_the_planned_length(dtype: torch.dtype, emulated: Emulated) -> None:
    """What a graph was captured for, against what is in use; and the two ways to say so."""
    for used in (1, 16, 255, 256, 257, 513):
        call = Case(OP, (1, 4, 2, 1, 64, 1104), {"length": used}).call(dtype)
        plain = run(emulated, call)
        lengths = torch.tensor([used], dtype=torch.int32)
        for planned in {used, 600, 1104}:
            assert torch.equal(run(emulated, changed(call, length=planned, lengths=lengths)), plain)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [16, 48])
def test_pages_are_the_contiguous_cache(size: int, dtype: torch.dtype, emulated: Emulated) -> None:
    blocks = 720 // size
    call = Case(OP, (2, 4, 2, 3, 80, size), {"blocks": blocks, "lengths": (650, 401)}).call(dtype)
    table = call.kwargs["block_table"].clamp(min=0)
    sides = [reference._gathered(OP, call.args[i : i + 3], table) for i in (1, 4)]
    flat = Call(OP, (call.args[0], *sides[0], *sides[1]), {**call.kwargs, "block_table": None})
    assert torch.equal(run(emulated, call), run(emulated, flat))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("side", [1, 4])
def test_bad_rows_reach_whom_they_concern(
    side: int, dtype: torch.dtype, emulated: Emulated
) -> None:
    call = Case(OP, (2, 4, 2, 6, 64, 304), {"mask": "causal", "length": 300}).call(dtype)
    for order in ORDERS:
        clean = run(emulated, call, order=order)
        spoiled = Call(OP, tuple(t.clone() for t in call.args), call.kwargs)
        spoiled.args[side + 1][1, 0, 297] = math.nan
        spoiled.args[side + 1][:, :, 300:] = math.nan  # behind the length
        got = run(emulated, spoiled, order=order)
        reached = torch.zeros(got.shape, dtype=torch.bool)
        reached[1, :2, 3:] = True  # of six queries the last three see position 297
        assert got[reached].isnan().all()
        assert torch.equal(got[~reached], clean[~reached])


def test_a_block_that_does_not_exist_is_nan(emulated: Emulated) -> None:
    for dtype in (BF16, FP32):
        call = Case(OP, (2, 2, 1, 1, 64, 32), {"blocks": 3, "lengths": (60, 70)}).call(dtype)
        for bad in (-1, 6, 2**31 - 1):
            table = call.kwargs["block_table"].clone()
            table[1, 1] = bad
            got = run(emulated, changed(call, block_table=table))
            want = changed(call, block_table=table).run(reference.attention_decode)
            assert got[1].isnan().all()
            CHECKS[OP](changed(call, block_table=table), (got,), want)


def test_finite_minimum_as_mask(emulated: Emulated) -> None:
    """How transformers masks in float: where all is masked, all counts the same."""
    call = Case(OP, (1, 2, 1, 2, 64, 304), {"length": 300}).call(BF16)
    mask = torch.zeros(1, 1, 2, 300)
    mask[..., 20:] = torch.finfo(FP32).min
    mask[:, :, 1] = torch.finfo(FP32).min
    call = changed(call, mask=mask)
    CHECKS[OP](call, (run(emulated, call),), call.run(reference.attention_decode))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_tensor_cores_are_nearly_exact(dtype: torch.dtype, emulated: Emulated) -> None:
    """In all but a few answers only the rounding to the dtype is seen; small values count too."""
    for scale in (1.0, 1e-6):
        call = Case(OP, (1, 8, 1, 2, 128, 512), {}).call(dtype)
        call = Call(OP, (*call.args[:5], call.args[5] * scale, call.args[6]), call.kwargs)
        if dtype == FP16 and scale < 1:
            call = replace(call, args=(call.args[0] * 8, *call.args[1:]))
        got, want = run(emulated, call), call.run(reference.attention_decode)[0]
        assert (got != want).float().mean() < 0.03
        CHECKS[OP](call, (got,), (want,))


# ---- append -------------------------------------------------------------------------------------

SMALL = "H100 SXM/1"  # with one multiprocessor the rows below count as many


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("d", "bits"), [(64, 4), (80, 2), (96, 3), (128, 8), (256, 4), (24, 4)])
@pytest.mark.usefixtures("native_ops")
def test_append_is_that_of_the_cpu(
    d: int, bits: int, dtype: torch.dtype, emulated: Emulated
) -> None:
    """Bit for bit, by the kernels for few rows and for many."""
    for halves in (False, True):
        options = {"capacity": 70, "transform": True, "bits": bits, "clip": True, "halves": halves}
        call = Case("kv_quantize_append", (1, 2, 67, d), options).call(dtype)
        want = bytes_of(call.run(ops.kv_quantize_append))
        kernels = set()
        for gpu in ("H100 SXM", SMALL):
            emulated.launches()
            emulated.choose(gpu)
            assert bytes_of(emulated.run(call)) == want
            kernels.add(emulated.launches()[0].split(" ")[0])
        assert kernels == {"append_few_kernel", "append_many_kernel"}


@pytest.fixture
def native_ops() -> None:
    """Skip unless the CPU kernels are there."""
    from flatquant_cuda import library

    if not library.loaded:
        pytest.skip(f"no native library: {library.build_info()['library']}")


def test_append_of_bad_rows(emulated: Emulated) -> None:
    for transform, d in ((False, 64), (True, 64), (True, 13)):
        options = {"capacity": 70, "transform": transform}
        call = Case("kv_quantize_append", (1, 1, 67, d), options).call(FP32)
        spoiled = Call(call.op, (call.args[0].clone(), *call.args[1:]), call.kwargs)
        spoiled.args[0][0, 0, 5, 3], spoiled.args[0][0, 0, 9, 0] = math.nan, -math.inf
        for gpu in ("H100 SXM", SMALL):
            emulated.choose(gpu)
            clean, got = emulated.run(call), emulated.run(spoiled)
            for row in range(70):
                if row in (5, 9):
                    assert not got[0][0, 0, row].any() and got[1][0, 0, row].isnan()
                    assert got[2][0, 0, row] == 0
                else:
                    assert all(
                        torch.equal(a[0, 0, row], b[0, 0, row])
                        for a, b in zip(clean, got, strict=True)
                    )


def test_slots_of_a_whole_cache(emulated: Emulated) -> None:
    """One block per sequence: the contiguous cache."""
    call = Case("kv_quantize_append", (2, 3, 5, 64), {"capacity": 9, "start": 2}).call(BF16)
    slots = torch.arange(2)[:, None] * 9 + 2 + torch.arange(5)
    paged = Call(call.op, call.args, {**call.kwargs, "start": 0, "slots": slots})
    emulated.choose()
    assert bytes_of(emulated.run(paged)) == bytes_of(emulated.run(call))


# ---- wrong arguments ----------------------------------------------------------------------------

WRONG = [
    ({"window": 3}, "window is 3: it needs lengths"),
    ({"window": -1}, "window is -1: it must not be negative"),
    ({"lengths": torch.ones(2)}, "lengths has dtype float32: it must be int32"),
    (
        {"lengths": torch.ones(3, dtype=torch.int32)},
        "lengths has shape [3]: it must be [2]",
    ),
    (
        {"block_table": torch.ones(3, 2, dtype=torch.int32)},
        "block_table has shape [3, 2]: it must be [2, any]",
    ),
    ({"block_table": torch.ones(2, 2)}, "block_table has dtype float32: it must be int32"),
    (
        {"block_table": torch.ones(2, 2, dtype=torch.int32), "length": 33},
        "length is 33: it must be 0..32, the capacity of the cache",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_arguments_of_attention(
    arguments: dict[str, Any], message: str, emulated: Emulated
) -> None:
    call = changed(Case(OP, (2, 2, 1, 1, 64, 16)).call(BF16), **arguments)
    with pytest.raises(RuntimeError) as error:
        emulated.run(call)
    assert f"attention_decode: {message}" in str(error.value)


def test_wrong_slots(emulated: Emulated) -> None:
    call = Case("kv_quantize_append", (2, 3, 5, 64), {"capacity": 9}).call(BF16)
    slots = torch.zeros(2, 5, dtype=torch.int64)
    for arguments, message in (
        ({"slots": slots.int()}, "slots has dtype int32: it must be int64"),
        ({"slots": slots[:1]}, "slots has shape [1, 5]: it must be [2, 5]"),
        ({"slots": slots, "start": 1}, "start is 1: with slots it must be 0"),
    ):
        with pytest.raises(RuntimeError) as error:
            emulated.run(changed(call, **arguments))
        assert f"kv_quantize_append: {message}" in str(error.value)
