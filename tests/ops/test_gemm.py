"""The matrix products in depth: integer ones bit for bit, gemm_w4a16 within its stated bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import ops, packing, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_OPS = ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8")
SHAPES = [  # m, n, k: nothing, one, odd, prime, around the tiles (64 rows, 16 columns, 64 bytes)
    (0, 5, 8),
    (5, 0, 8),
    (1, 1, 1),
    (1, 17, 2),
    (2, 3, 7),
    (3, 16, 127),
    (4, 31, 128),
    (5, 15, 129),
    (7, 33, 257),
    (63, 16, 64),
    (64, 48, 65),
    (65, 17, 61),
    (131, 5, 30),
    (9, 40, 576),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def integer_inputs(
    op: str, m: int, n: int, k: int, asymmetric: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Random codes and scales: a, a_scale, w, w_scale and, if asymmetric, a_zero, w_colsum."""
    random = torch.Generator().manual_seed(seed)
    bits = 4 if op == "gemm_w4a4" else 8
    low, high = (0, 2**bits) if asymmetric else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    a = torch.randint(low, high, (m, k), generator=random)
    wide = op == "gemm_w8a8"
    w = torch.randint(-128 if wide else -8, 128 if wide else 8, (n, k), generator=random)
    if bits == 4:
        packed = packing.pack_nibbles(a)
    else:
        packed = a.to(torch.uint8 if asymmetric else torch.int8)
    inputs: dict[str, Any] = {
        "a": packed,
        "a_scale": torch.rand(m, generator=random),
        "w": w.to(torch.int8) if wide else packing.pack_nibbles(w),
        "w_scale": torch.rand(n, generator=random) * 0.01,
    }
    if asymmetric:
        inputs["a_zero"] = torch.randint(0, 2**bits, (m,), generator=random, dtype=torch.int32)
        inputs["w_colsum"] = w.sum(1, dtype=torch.int32)
    return inputs


def call(op: str, inputs: dict[str, Any], module: Any = ops, **options: Any) -> Tensor:
    """Call an integer GEMM of `ops` or `reference`."""
    rest = {name: inputs[name] for name in ("a_zero", "w_colsum") if name in inputs}
    result: Tensor = getattr(module, op)(
        inputs["a"], inputs["a_scale"], inputs["w"], inputs["w_scale"], **rest, **options
    )
    return result


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integer_product_is_the_reference(isa: str, op: str, m: int, n: int, k: int) -> None:
    for asymmetric in (False, True):
        inputs = integer_inputs(op, m, n, k, asymmetric)
        for i, out_dtype in enumerate(DTYPES):
            for bias in (None, torch.randn(n).to(DTYPES[i - 1])):
                for residual in (None, torch.randn(m, n).to(out_dtype)):
                    options = {"bias": bias, "residual": residual, "out_dtype": out_dtype}
                    expected = call(op, inputs, reference, **options)
                    assert torch.equal(call(op, inputs, **options), expected)


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize("code", [0x00, 0x77, 0x88, 0xFF, 0x80, 0x7F])
def test_extreme_codes(isa: str, op: str, code: int) -> None:
    for asymmetric in (False, True):
        inputs = integer_inputs(op, 5, 19, 4098, asymmetric)
        inputs["a"].view(torch.uint8).fill_(code)
        for weights in (0x88, 0x77, 0x80, 0x7F):
            inputs["w"].view(torch.uint8).fill_(weights)
            if asymmetric:
                inputs["a_zero"].fill_(15 if op == "gemm_w4a4" else 255)
                w = inputs["w"]
                plain = w if op == "gemm_w8a8" else packing.unpack_nibbles(w, 4098)
                inputs["w_colsum"] = plain.sum(1, dtype=torch.int32)
            assert torch.equal(call(op, inputs), call(op, inputs, reference))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_longest_sum_does_not_overflow(isa: str, asymmetric: bool) -> None:
    k = 2**20
    inputs = integer_inputs("gemm_w4a8", 2, 3, 2, asymmetric)
    inputs["a"] = torch.full((2, k), 255 if asymmetric else -128).to(inputs["a"].dtype)
    inputs["w"] = torch.full((3, k // 2), 0x88, dtype=torch.uint8)
    if asymmetric:
        inputs["a_zero"] = torch.tensor([0, 255], dtype=torch.int32)
        inputs["w_colsum"] = torch.full((3,), -8 * k, dtype=torch.int32)
    assert torch.equal(call("gemm_w4a8", inputs), call("gemm_w4a8", inputs, reference))
    inputs |= {"a": inputs["a"][:, : 2**16], "w": torch.full((3, 2**16), -128, dtype=torch.int8)}
    if asymmetric:
        inputs["w_colsum"] = torch.full((3,), -128 * 2**16, dtype=torch.int32)
    assert torch.equal(call("gemm_w8a8", inputs), call("gemm_w8a8", inputs, reference))


@pytest.mark.parametrize("op", INTEGER_OPS)
def test_a_nan_scale_spoils_its_row_only(isa: str, op: str) -> None:
    inputs = integer_inputs(op, 6, 20, 34)
    clean = call(op, inputs)
    inputs["a_scale"][3] = float("nan")
    spoilt = call(op, inputs)
    assert spoilt[3].isnan().all()
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(spoilt[keep], clean[keep])


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.usefixtures("threads")
def test_integer_product_of_a_row_stands_alone(isa: str, op: str) -> None:
    inputs = integer_inputs(op, 131, 67, 190, asymmetric=True)
    residual = torch.randn(131, 67)
    whole = call(op, inputs, residual=residual)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(call(op, inputs, residual=residual), whole)
    for row in (0, 63, 64, 130):
        one = {**inputs, **{n: inputs[n][row : row + 1] for n in ("a", "a_scale", "a_zero")}}
        assert torch.equal(call(op, one, residual=residual[row : row + 1])[0], whole[row])


# ---- gemm_w4a16 ----------------------------------------------------------------------------------

FLOAT_SHAPES = [  # m, n, k, groups
    (0, 5, 8, 1),
    (5, 0, 8, 2),
    (1, 1, 1, 1),
    (3, 17, 7, 7),
    (9, 33, 130, 13),
    (2, 16, 300, 100),
    (65, 40, 257, 1),
    (66, 31, 576, 9),
    (1, 19, 1030, 2),
]


def float_inputs(
    m: int, n: int, k: int, groups: int, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, codes, w_scale, bias."""
    random = torch.Generator().manual_seed(m + n + k)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), generator=random)
    x = torch.randn(m, k, generator=random).to(dtype)
    scale = torch.rand(n, groups, generator=random) * 0.1
    return x, codes, scale, torch.randn(n, generator=random).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "groups"), FLOAT_SHAPES)
def test_float_product_is_within_its_bound(
    isa: str, m: int, n: int, k: int, groups: int, dtype: torch.dtype, bits: int
) -> None:
    # The bound stated in csrc/cpu/gemm_w4a16_body.h, for the sum, the bias and the rounding to T.
    x, codes, scale, bias = float_inputs(m, n, k, groups, bits, dtype)
    out = ops.gemm_w4a16(x, packing.pack(codes, bits), scale, bias=bias, bits=bits)
    assert out.dtype == dtype
    weight = reference.dequantize(codes, scale, dtype=torch.float64)
    exact = x.double() @ weight.T + bias.double()
    segments = groups + k // 128 + 1
    half_ulp = 2.0**-24
    terms = min(k // groups, 32) + 4 + segments
    error = half_ulp * (terms * 1.01 * (x.double().abs() @ weight.abs().T) + 2 * exact.abs())
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    bound = error * (1 + rounding) + rounding * exact.abs() + smallest
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.usefixtures("threads")
def test_float_product_of_a_row_stands_alone(isa: str, bits: int) -> None:
    for dtype in DTYPES:
        x, codes, scale, bias = float_inputs(77, 35, 390, 3, bits, dtype)
        w = packing.pack(codes, bits)
        out = ops.gemm_w4a16(x, w, scale, bias=bias, bits=bits)
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.gemm_w4a16(x, w, scale, bias=bias, bits=bits), out)
        for row in (0, 8, 63, 64, 76):
            one = ops.gemm_w4a16(x[row : row + 1], w, scale, bias=bias, bits=bits)
            assert torch.equal(one[0], out[row])


def test_float_product_keeps_a_nan_in_its_row(isa: str) -> None:
    x, codes, scale, _ = float_inputs(10, 18, 40, 1, 4, torch.float32)
    w = packing.pack(codes, 4)
    clean = ops.gemm_w4a16(x, w, scale)
    x[4, 7] = float("nan")
    spoilt = ops.gemm_w4a16(x, w, scale)
    assert spoilt[4].isnan().all()
    keep = [i for i in range(10) if i != 4]
    assert torch.equal(spoilt[keep], clean[keep])
