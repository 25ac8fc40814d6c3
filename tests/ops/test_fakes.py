"""What ops say of their outputs without running, also with pages: what torch.compile relies on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flatquant_cuda import decoder, library, reference

from .cases import CASES, Case
from .test_decoder import SCALING, SIZES, inputs, make_cache, make_layer

pytestmark = pytest.mark.skipif(not library.loaded, reason="no native library")

PAGED = [case for case in CASES if case.call(case.dtypes[0]).in_pages()]


def test_the_table_has_pages() -> None:
    wanted = {"kv_quantize_append", "kv_dequantize", "attention_decode"}
    assert {case.op for case in PAGED} == wanted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fake_outputs_are_like_the_real_ones(case: Case) -> None:
    call = case.call(case.dtypes[-1])
    want = call.run(getattr(reference, case.op))
    op = getattr(torch.ops.flatquant_cuda, case.op).default
    with FakeTensorMode() as mode:
        arguments = [
            mode.from_tensor(value) if isinstance(value, Tensor) else value
            for value in call.schema_args()
        ]
        got = op(*arguments)
    if case.op == "kv_quantize_append":
        assert got is None
        return
    for fake, real in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert fake.is_contiguous() == real.is_contiguous()


@pytest.mark.skipif(not decoder.available(), reason="no native decoder_stack")
@pytest.mark.parametrize("placed", [False, True])
def test_fake_stack(placed: bool) -> None:
    """With the numbers on the device that a CUDA graph takes, too."""
    plan = decoder.DecoderPlan([make_layer(SIZES, 0)], SIZES, SCALING)
    cache = plan.bind_cache(make_cache(SIZES, 1, 2, 4))
    with FakeTensorMode() as mode:
        hidden, cos, sin, handle, bound = (
            mode.from_tensor(t)
            for t in (*inputs(SIZES, torch.bfloat16, 2, 1), plan.plan, cache.handle)
        )
        places = (
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int32),
        )
        op = torch.ops.flatquant_cuda.decoder_stack.default
        got = op(hidden, cos, sin, None, handle, bound, 3, *(places if placed else ()))
    assert (got.shape, got.dtype) == ((2, 1, SIZES.hidden), torch.bfloat16)


@pytest.mark.skipif(not decoder.available(), reason="no native decoder_stack")
def test_places_are_for_cuda() -> None:
    plan = decoder.DecoderPlan([make_layer(SIZES, 0)], SIZES, SCALING)
    cache = plan.bind_cache(make_cache(SIZES, 1, 2, 4))
    slots, lengths = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="slots is given: the CPU kernel knows none"):
        plan.run(*inputs(SIZES, torch.bfloat16, 2, 1), cache, past=3, slots=slots, lengths=lengths)
    with pytest.raises(RuntimeError, match="lengths is missing"):
        plan.run(*inputs(SIZES, torch.bfloat16, 2, 1), cache, past=3, slots=slots)
