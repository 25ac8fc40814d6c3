"""No kernel needs more alignment than its types, reads its neighbours, or spreads a bad row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flatquant_cuda import reference
from tests.ops.cases import CHECKS, DTYPES, Call, Case
from tests.ops.test_ops import guarded

from .emulated import ORDERS, Emulated
from .rows import TABLE, Row, bytes_of


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_views_and_guard_bands(row: Row, offset: int, emulated: Emulated) -> None:
    """Inputs lie between NaNs, outputs between guard bands that the library checks."""
    plain = row.case.call(row.dtype)
    placed = plain.map(lambda tensor: guarded(tensor, offset))
    tensors = [t for t in (*placed.args, *placed.kwargs.values()) if isinstance(t, Tensor)]
    roots = [base for tensor in tensors if (base := tensor._base) is not None]
    before = [bytes_of((root,)) for root in roots]
    emulated.choose(gpu=row.gpu, shift=offset)
    got = emulated.run(placed)
    CHECKS[row.case.op](plain, got, plain.run(getattr(reference, row.case.op)))
    assert [bytes_of((root,)) for root in roots] == before, "an input was written"


@pytest.mark.parametrize(
    "case",
    [
        Case("quantize_activation", (5, 35)),
        Case("quantize_activation", (5, 1536), {"symmetric": False, "bits": 8}),
        Case("kronecker_quantize", (5, 5, 7), {"symmetric": False}),
        Case("kronecker_quantize", (5, 16, 24), {"rms_eps": 1e-5}),
        Case("kronecker_quantize", (5, 32, 48), {"gate": True}),
    ],
    ids=lambda case: case.id,
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_rows_stay_alone(
    case: Case, bad: float, dtype: torch.dtype, emulated: Emulated
) -> None:
    """A row with a NaN or an Inf has scale NaN and codes 0; the others do not change."""
    call = case.call(dtype)
    spoiled = Call(case.op, (call.args[0].clone(), *call.args[1:]), call.kwargs)
    spoiled.args[0][2, 17] = bad
    for order in ORDERS:
        emulated.choose(order=order)
        clean, got = emulated.run(call), emulated.run(spoiled)
        assert got[1][2].isnan() and not got[0][2].any()
        assert not got[2].numel() or got[2][2] == 0
        for row in (0, 1, 3, 4):
            assert all(
                torch.equal(a[row], b[row]) for a, b in zip(clean, got, strict=True) if a.numel()
            )
