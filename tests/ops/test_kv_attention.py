"""The quantized KV cache and the attention that reads it, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flatquant_cuda import ops, packing, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = range(2, 9)
Cache = tuple[Tensor, Tensor, Tensor]  # codes, scale, zero


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def empty_cache(batch: int, heads: int, capacity: int, d: int, bits: int) -> Cache:
    """A cache full of marks, which shows what was written."""
    codes = torch.full((batch, heads, capacity, packing.packed_size(d, bits)), 0xA5)
    scale = torch.full((batch, heads, capacity), -1.0)
    zero = torch.full((batch, heads, capacity), 77)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def same(found: Cache, expected: Cache) -> bool:
    codes, scale, zero = found
    return (
        torch.equal(codes, expected[0])
        and torch.equal(scale.nan_to_num(-2.0), expected[1].nan_to_num(-2.0))
        and torch.equal(zero, expected[2])
    )


# ---- writing and reading the cache ---------------------------------------------------------------

CACHES = [  # batch, heads, t, d, capacity, start
    (1, 1, 1, 1, 1, 0),
    (2, 3, 5, 64, 9, 2),
    (1, 2, 3, 7, 5, 1),
    (3, 1, 2, 33, 2, 0),
    (1, 2, 4, 128, 6, 2),
    (0, 2, 4, 8, 6, 1),
    (2, 2, 0, 8, 6, 6),
]


def values(batch: int, heads: int, t: int, d: int, dtype: torch.dtype) -> Tensor:
    """Rows to append: some ordinary, one zero, one with a NaN, one with an Inf."""
    x = torch.randn(batch, heads, t, d, generator=torch.Generator().manual_seed(d)) * 3
    if batch and t > 2:
        x[0, 0, 0] = 0.0
        x[0, 0, 1, -1] = math.nan
        x[-1, -1, 2, 0] = -math.inf
    return x.to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("batch", "heads", "t", "d", "capacity", "start"), CACHES)
def test_append_and_read_are_the_reference(
    isa: str, batch: int, heads: int, t: int, d: int, capacity: int, start: int, bits: int
) -> None:
    for dtype in DTYPES:
        x = values(batch, heads, t, d, dtype)
        for clip in (None, torch.tensor([0.9, 0.8])):
            found = empty_cache(batch, heads, capacity, d, bits)
            expected = empty_cache(batch, heads, capacity, d, bits)
            ops.kv_quantize_append(x, *found, clip=clip, bits=bits, start=start)
            reference.kv_quantize_append(x, *expected, clip=clip, bits=bits, start=start)
            assert same(found, expected)
        for length in {0, start + t, capacity}:
            for out_dtype in DTYPES:
                read = {
                    module: module.kv_dequantize(
                        *found, bits=bits, head_dim=d, length=length, out_dtype=out_dtype
                    ).nan_to_num(99.0)
                    for module in (ops, reference)
                }
                assert torch.equal(read[ops], read[reference])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 64, 80])
def test_append_transforms(isa: str, d: int, dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(2, 3, 50, d).to(dtype)
    for matrix_dtype in (torch.float32, torch.bfloat16):
        transform = (torch.randn(d, d) / math.sqrt(d)).to(matrix_dtype)
        found = empty_cache(2, 3, 50, d, bits)
        expected = empty_cache(2, 3, 50, d, bits)
        ops.kv_quantize_append(x, *found, transform=transform, bits=bits)
        reference.kv_quantize_append(x, *expected, transform=transform, bits=bits)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
        assert (found[2].int() - expected[2].int()).abs().max() <= 1
        # less the zero point: where that differs, beside a rounding boundary, all codes move along
        codes = [
            packing.unpack(c[0], bits, d, signed=False).int() - c[2][..., None].int()
            for c in (found, expected)
        ]
        differ = (codes[0] - codes[1]).abs()
        assert differ.max() <= 1
        assert differ.float().mean() <= 1e-3


@pytest.mark.usefixtures("threads")
def test_append_one_by_one_is_append_at_once(isa: str) -> None:
    x = torch.randn(2, 3, 37, 40).bfloat16()
    transform = torch.randn(40, 40)
    whole, single = empty_cache(2, 3, 40, 40, 4), empty_cache(2, 3, 40, 40, 4)
    ops.kv_quantize_append(x, *whole, transform=transform, start=1)
    for count, i in zip((1, 2, 3) * 13, range(37), strict=False):
        torch.set_num_threads(count)
        ops.kv_quantize_append(x[:, :, i : i + 1], *single, transform=transform, start=1 + i)
    assert same(single, whole)


@pytest.mark.parametrize("bits", BITS)
def test_round_trip_error_is_half_a_step(isa: str, bits: int) -> None:
    x = torch.randn(2, 2, 11, 48)
    codes, scale, zero = empty_cache(2, 2, 11, 48, bits)
    ops.kv_quantize_append(x, codes, scale, zero, bits=bits)
    back = ops.kv_dequantize(codes, scale, zero, bits=bits, head_dim=48)
    # Half a step for the code, half a step more at the ends for the rounded zero point.
    assert ((back - x).abs() <= scale[..., None] * 1.0001).all()
    inside = (back > back.amin(-1, keepdim=True)) & (back < back.amax(-1, keepdim=True))
    assert ((back - x).abs()[inside] <= (0.5001 * scale[..., None]).expand_as(x)[inside]).all()


# ---- attention -----------------------------------------------------------------------------------

ATTENTION = [  # batch, heads, kv_heads, tq, d, capacity, length, k_bits, v_bits
    (1, 1, 1, 1, 1, 1, 1, 4, 4),
    (2, 9, 3, 1, 64, 70, 65, 4, 4),
    (1, 4, 2, 5, 32, 40, 33, 2, 3),
    (1, 2, 2, 17, 7, 20, 20, 8, 5),
    (1, 8, 1, 3, 128, 300, 257, 4, 8),
    (2, 2, 1, 40, 16, 64, 64, 3, 2),
    (1, 2, 1, 2, 9, 5, 0, 4, 4),
    (1, 3, 1, 1, 64, 1100, 1090, 4, 4),
    (0, 2, 1, 3, 8, 4, 4, 4, 4),
    (2, 2, 1, 0, 8, 4, 4, 4, 4),
]


def filled_cache(batch: int, heads: int, capacity: int, d: int, bits: int, length: int) -> Cache:
    """A random cache; what lies behind `length` is poison."""
    codes, scale, zero = reference.kv_quantize(
        torch.randn(batch, heads, capacity, d), None, None, bits
    )
    scale[..., length:] = math.nan
    return packing.pack(codes, bits), scale, zero


def masks(batch: int, heads: int, tq: int, length: int, dtype: torch.dtype) -> list[Tensor | None]:
    """None, bool, additive, and some that are broadcast or strided."""
    allowed = torch.rand(batch, 1, tq, length) > 0.4
    additive = torch.randn(1, heads, tq, length).masked_fill(
        torch.rand(1, heads, tq, length) > 0.7, -math.inf
    )
    causal = torch.ones(tq, length, dtype=torch.bool).tril(length - tq)[None, None]
    strided = (torch.rand(length, tq) > 0.2).T.expand(batch, 1, tq, length)
    columns = torch.rand(batch, 1, 1, length) > 0.5
    return [None, allowed, additive.to(dtype), additive, causal, strided, columns]


def expression(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Attention as one would write it in PyTorch, in `dtype`; rows that see nothing give 0."""
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
@pytest.mark.usefixtures("native")
def test_attention_is_as_exact_as_pytorch(case: tuple[int, ...], dtype: torch.dtype) -> None:
    # Once: test_ops.py holds the instruction sets bit-equal to each other.
    torch.manual_seed(0)
    batch, heads, kv_heads, tq, d, capacity, length, k_bits, v_bits = case
    q = torch.randn(batch, heads, tq, d).to(dtype)
    k = filled_cache(batch, kv_heads, capacity, d, k_bits, length)
    v = filled_cache(batch, kv_heads, capacity, d, v_bits, length)
    plain = [
        ops.kv_dequantize(*cache, bits=bits, head_dim=d, length=length).repeat_interleave(
            heads // kv_heads, 1
        )
        for cache, bits in ((k, k_bits), (v, v_bits))
    ]
    options = {"k_bits": k_bits, "v_bits": v_bits, "length": length}
    for mask in masks(batch, heads, tq, length, dtype):
        out = ops.attention_decode(q, *k, *v, mask=mask, **options)
        assert out.dtype == dtype
        assert out.shape == q.shape
        if out.numel() == 0 or length == 0:
            assert not out.any()
            continue
        exact = expression(q, *plain, mask, torch.float64)
        ours = (out.double() - exact).abs().max()
        pytorch = (expression(q, *plain, mask, torch.float32).to(dtype) - exact).abs().max()
        ulp = torch.finfo(dtype).eps * exact.abs().max()
        assert ours <= 2 * pytorch + ulp
        expected = reference.attention_decode(q, *k, *v, mask=mask, **options)
        assert (out - expected).abs().max() <= ulp + 1e-5


@pytest.mark.usefixtures("threads")
def test_attention_of_a_query_does_not_depend_on_the_others(isa: str) -> None:
    torch.manual_seed(0)
    batch, heads, kv_heads, tq, d, length = 2, 6, 2, 21, 24, 150
    q = torch.randn(batch, heads, tq, d)
    k = filled_cache(batch, kv_heads, length, d, 4, length)
    v = filled_cache(batch, kv_heads, length, d, 4, length)
    causal = torch.ones(tq, length, dtype=torch.bool).tril(20)[None, None]
    whole = ops.attention_decode(q, *k, *v, mask=causal)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(ops.attention_decode(q, *k, *v, mask=causal), whole)
    for i in range(tq):
        one = slice(i, i + 1)
        alone = ops.attention_decode(q[:, :, one], *k, *v, mask=causal[:, :, one])
        assert torch.equal(alone, whole[:, :, one])
    for b in range(batch):
        one = slice(b, b + 1)
        sides = [[part[one] for part in side] for side in (k, v)]
        alone = ops.attention_decode(q[one], *sides[0], *sides[1], mask=causal)
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_nan_reaches_exactly_those_who_attend_to_it(isa: str, side: str, additive: bool) -> None:
    batch, heads, kv_heads, tq, d, length = 2, 4, 2, 70, 16, 70
    q = torch.randn(batch, heads, tq, d)
    k = filled_cache(batch, kv_heads, length, d, 4, length)
    v = filled_cache(batch, kv_heads, length, d, 4, length)
    mask = torch.ones(tq, length, dtype=torch.bool).tril()[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    clean = ops.attention_decode(q, *k, *v, mask=mask)
    broken = k if side == "key" else v
    broken[1][1, 0, 37] = math.nan
    broken[0][1, 0, 37] = 0
    out = ops.attention_decode(q, *k, *v, mask=mask)
    attends = torch.zeros(batch, heads, tq, dtype=torch.bool)
    attends[1, :2, 37:] = True
    assert out[attends].isnan().all()
    assert torch.equal(out[~attends], clean[~attends])


def test_a_query_that_sees_nothing_gives_zero(isa: str) -> None:
    q = torch.randn(1, 2, 3, 8)
    k, v = (filled_cache(1, 1, 40, 8, 4, 40) for _ in range(2))
    mask = torch.rand(1, 1, 3, 40) > 0.5
    mask[0, 0, 1] = False
    out = ops.attention_decode(q, *k, *v, mask=mask)
    assert not out[:, :, 1].any()
    assert out[:, :, (0, 2)].any(-1).all()


def test_scaling_and_a_finite_minimum(isa: str) -> None:
    q = torch.randn(1, 2, 3, 8)
    k, v = (filled_cache(1, 2, 40, 8, 4, 40) for _ in range(2))
    mask = torch.zeros(1, 1, 3, 40)
    mask[..., 20:] = torch.finfo(torch.float32).min  # how transformers masks in float
    out = ops.attention_decode(q, *k, *v, mask=mask, scaling=0.7)
    expected = reference.attention_decode(q, *k, *v, length=20, scaling=0.7)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
