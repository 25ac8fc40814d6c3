"""The numeric contract: csrc/contract.h and the reference agree bit for bit.

The C++ side is reached through ``flatquant_cuda._native`` (its scalars, over arrays) and through
``quantize_activation`` on every 16-bit pattern.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flatquant_cuda import library, ops, packing, reference

contract: Any = pytest.importorskip(
    "flatquant_cuda._native", reason="flatquant_cuda._native was not built (pybind11)"
)

PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
HALVES = [torch.float16, torch.bfloat16]
TINY = torch.finfo(torch.float32).tiny
SCALES = [1.0, 0.1, 1 / 3, 2.0**-24, 65504 / 7, 7.0, TINY, 3e38, math.nan]


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of a 16-bit type."""
    return PATTERNS.view(dtype)


def same(native: Any, expected: Tensor) -> None:
    """Equal bits; any NaN equals any NaN."""
    got = torch.from_numpy(np.asarray(native)).to(expected.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    if expected.dtype.is_floating_point:
        known = ~expected.isnan()
        assert torch.equal(torch.signbit(got)[known], torch.signbit(expected)[known])


# ---- conversions ---------------------------------------------------------------------------------


def test_widening_every_pattern() -> None:
    raw = PATTERNS.numpy()
    same(contract.fp16_to_float(raw), patterns(torch.float16).float())
    same(contract.bf16_to_float(raw), patterns(torch.bfloat16).float())


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_around_every_pattern(dtype: torch.dtype) -> None:
    """Every 16-bit value, every midpoint between two, and the float32 values beside those."""
    values = patterns(dtype).float()
    values = values[values.isfinite()].sort().values.unique()
    middle = (values[1:].double() / 2 + values[:-1].double() / 2).float()
    up = torch.tensor(math.inf)
    x = torch.cat([values, middle, middle.nextafter(up), middle.nextafter(-up)])
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1))
    x = torch.cat(
        [x, bits.to(torch.int32).view(torch.float32), torch.tensor([math.inf, -math.inf])]
    )
    narrow = contract.float_to_fp16 if dtype == torch.float16 else contract.float_to_bf16
    got = torch.from_numpy(narrow(x.numpy())).view(dtype)
    same(got.float().numpy(), x.to(dtype).float())


# ---- scales and codes ----------------------------------------------------------------------------


def ends() -> tuple[Tensor, Tensor]:
    """Maxima and minima of rows: ordinary, one-sided, zero, subnormal, huge, not finite."""
    generator = torch.Generator().manual_seed(2)
    size = torch.randn(500, generator=generator).exp() * 10.0 ** torch.randint(
        -40, 38, (500,), generator=generator
    )
    special = [0.0, TINY, TINY * 6, 1e-45, 1e-40, 1.0, 7.0, 3.4e38, math.inf, math.nan]
    values = torch.cat([size, torch.tensor(special)]).float()
    return torch.cat([values, values, values]), -torch.cat([values, values.flip(0), 0 * values])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("clip", [None, (0.9, 0.75), (1.0, 0.0), (0.3, 1.0)])
def test_scales(bits: int, clip: tuple[float, float] | None) -> None:
    high, low = ends()
    rows = torch.stack((high, low), dim=-1)
    ratios = torch.tensor(clip or (1.0, 1.0))
    arguments = high.numpy(), low.numpy(), *ratios.numpy(), bits
    scale, _ = reference.scale_and_zero(rows, ratios if clip else None, bits, symmetric=True)
    same(contract.symmetric_scale(*arguments), scale)
    scale, zero = reference.scale_and_zero(rows, ratios if clip else None, bits, symmetric=False)
    same(contract.asymmetric_scale(*arguments), scale)
    same(contract.asymmetric_zero(*arguments), zero.to(torch.int32))
    assert not (scale < TINY).any() and not (scale == math.inf).any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_every_pattern(dtype: torch.dtype, bits: int) -> None:
    x = patterns(dtype).float()
    x = x[x.isfinite()]
    for scale in SCALES:
        s = torch.full_like(x, scale)
        for narrow in (False, True):
            want = reference.codes_of(x[:, None], s, 0 * x, bits, True, narrow)[:, 0]
            same(contract.symmetric_code(x.numpy(), s.numpy(), bits, narrow), want.to(torch.int32))
        for zero in (0, 1, 2 ** (bits - 1), 2**bits - 1):
            z = torch.full_like(x, zero)
            want = reference.codes_of(x[:, None], s, z, bits, False)[:, 0]
            got = contract.asymmetric_code(x.numpy(), s.numpy(), zero, bits)
            same(got, want.to(torch.int32))


def test_ties_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 7.5, -8.5, 0.49999997])
    want = torch.tensor([0, 2, 2, 0, -2, -2, 6, 7, -8, 0], dtype=torch.int32)
    same(contract.symmetric_code(x.numpy(), 1.0, 4, False), want)
    same(
        reference.codes_of(x[None], torch.ones(1), torch.zeros(1), 4, True)[0].numpy(), want.float()
    )


# ---- whole rows, through the op ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_every_pattern(dtype: torch.dtype, symmetric: bool, bits: int, isa: str) -> None:
    """Each pattern alone in a row, next to a 1, and in rows of 64 neighbours."""
    x = patterns(dtype)
    for rows in (x[:, None], torch.stack((x, torch.ones_like(x)), -1), x.reshape(-1, 64)):
        got = ops.quantize_activation(rows, bits=bits, symmetric=symmetric)
        want = reference.quantize_activation(rows, bits=bits, symmetric=symmetric)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("answer", [ops.quantize_activation, reference.quantize_activation])
@pytest.mark.filterwarnings("ignore:flatquant_cuda answers from")
def test_special_rows(answer: Any) -> None:
    rows = torch.zeros(6, 5)
    rows[1, 2] = 1e-40  # subnormal: the scale underflows
    rows[2, 0] = math.nan
    rows[3, 4] = -math.inf
    rows[4] = torch.tensor([-7.0, 3.5, 2.5, -0.5, 7.0])
    rows[5] = 3.4e38
    codes, scale, zero = answer(rows)
    assert scale[[0, 1, 4]].tolist() == [1.0, 1.0, 1.0] and scale[[2, 3]].isnan().all()
    assert scale[5] == torch.tensor(3.4e38) / 7
    plain = packing.unpack_nibbles(codes, 5)
    assert plain[:4].eq(0).all() and plain[4].tolist() == [-7, 4, 2, 0, 7]
    assert plain[5].eq(7).all() and zero.shape == (0,) and zero.dtype == torch.int32
    codes, scale, zero = answer(rows, symmetric=False)
    assert scale[:2].tolist() == [1.0, 1.0] and scale[2:4].isnan().all()
    assert zero.tolist()[:4] == [0, 0, 0, 0] and codes[:4].eq(0).all()
    assert zero[4] == 8 and scale[4] == torch.tensor(14.0) / 15  # rhe(7.5) = 8


# ---- bytes ---------------------------------------------------------------------------------------


def test_every_packed_byte() -> None:
    byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for signed, native in ((True, contract.signed_nibble), (False, contract.nibble)):
        codes = packing.unpack_nibbles(byte[:, None], 2, signed)
        same(native(byte.numpy()[:, None], np.arange(2)), codes)
        assert torch.equal(packing.pack_nibbles(codes)[:, 0], byte)
        same(contract.pack_nibbles(codes[:, 0].numpy(), codes[:, 1].numpy()), byte)
    for signed, native in ((True, contract.signed_crumb), (False, contract.crumb)):
        codes = packing.unpack(byte[:, None], 2, 4, signed)
        same(native(byte.numpy()[:, None], np.arange(4)), codes)
        assert torch.equal(packing.pack(codes, 2)[:, 0], byte)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 13])
def test_packing_round_trips(bits: int, k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for low, high, signed in (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, True),
        (0, 2**bits - 1, False),
    ):
        codes = torch.randint(low, high + 1, (2, 3, k), generator=generator)
        packed = packing.pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape[-1] == packing.packed_size(k, bits) == contract.packed_bytes(k, bits)
        assert torch.equal(packing.unpack(packed, bits, k, signed).to(torch.int64), codes)
        if bits <= 4:
            nibbles = packing.pack_nibbles(codes)
            assert nibbles.shape[-1] == contract.activation_bytes(k, bits)
            assert torch.equal(packing.unpack_nibbles(nibbles, k, signed).to(torch.int64), codes)
    assert packing.pack_nibbles(torch.tensor([1, -1, -1])).tolist() == [
        0xF1,
        0x0F,
    ]  # even index low


# ---- float expressions ---------------------------------------------------------------------------


def ulps(got: Any, exact: Tensor) -> Tensor:
    """Error in units in the last place of float32, where the result is normal."""
    spacing = 2.0 ** (exact.abs().log2().floor() - 23)
    return (torch.from_numpy(got).double() - exact).abs() / spacing


def test_exponential_and_silu() -> None:
    x = torch.cat([torch.linspace(-87, 88, 300_001), patterns(torch.bfloat16).float()])
    x = x[(x > -87) & (x < 88)]
    assert ulps(contract.exponential(x.numpy()), x.double().exp()).max() <= 1.1
    exact = x.double() / (1 + (-x.double()).exp())
    assert ulps(contract.silu(x.numpy()), exact)[exact.abs() > TINY].max() <= 3
    edge = np.array([0.0, -0.0, math.inf, 1e30, 88.8, -200, -1e30, -math.inf], np.float32)
    values = contract.exponential(edge)
    assert values.tolist() == [1, 1, math.inf, math.inf, math.inf, 0, 0, 0]
    assert np.isnan(contract.exponential(np.float32(math.nan)))
    assert contract.silu(edge)[:4].tolist() == [0, 0, math.inf, np.float32(1e30)]


def test_epilogue_expressions() -> None:
    generator = torch.Generator().manual_seed(4)
    sums = torch.randint(-(2**31), 2**31, (10_000,), generator=generator).to(torch.int32)
    a, w = (torch.randn(10_000, generator=generator) for _ in range(2))
    same(contract.scaled(sums.numpy(), a.numpy(), w.numpy()), sums.float() * (a * w))
    codes, zeros = (torch.randint(0, 256, (10_000,), generator=generator) for _ in range(2))
    want = (codes - zeros).float() * a
    same(contract.value(codes.int().numpy(), zeros.int().numpy(), a.numpy()), want)
    # NumPy, because torch's float32 sqrt may be a vector library's, which does not round correctly.
    squares = a.square().numpy() * 100
    norm = np.float32(1) / np.sqrt(squares / np.float32(576) + np.float32(1e-5))
    same(contract.rms_reciprocal(squares, 576, 1e-5), torch.from_numpy(norm))


def test_library_is_loaded_where_it_was_built() -> None:
    """The native comparisons above must not pass by being skipped in a full installation."""
    assert library.loaded
