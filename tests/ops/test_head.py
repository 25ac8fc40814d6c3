"""The output head in bfloat16: right, and the same bits in any batch, on any processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flatquant_cuda import head as native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native head")

SHAPES = [(1, 1), (3, 31), (5, 32), (16, 33), (17, 64), (33, 95), (70, 576), (257, 100)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(rows: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias."""
    generator = torch.Generator().manual_seed(rows * n + k)
    shapes = ((rows, k), (n, k), (n,))
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    return x, weight, bias


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The answer in float64, and the sum of the magnitudes of its terms."""
    found = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    return (found, size) if bias is None else (found + bias.double(), size + bias.double().abs())


def in_order(x: Tensor, weight: Tensor) -> Tensor:
    """The sums in the order that csrc/cpu/head.h states, in float32; [rows, n]."""
    rows, k = x.shape
    steps = -(-k // 32)
    padded = [torch.zeros(t.shape[0], steps * 32) for t in (x, weight)]
    for target, source in zip(padded, (x, weight), strict=True):
        target[:, :k] = source.float()
    a, b = (t.view(t.shape[0], steps, 16, 2) for t in padded)
    lanes = torch.zeros(rows, weight.shape[0], 16, 2)
    for step in range(steps):  # products of bfloat16 are exact in float64, so this is an fma
        product = a[:, None, step].double() * b[None, :, step].double()
        lanes = (product + lanes.double()).float()
    total = lanes[..., 0] + lanes[..., 1]
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    return total[..., 0]


@pytest.mark.parametrize(("n", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_sums_have_one_order(rows, n, k, isa):
    x, weight, bias = make(rows, n, k)
    found = native.head(x, weight)
    assert torch.equal(found, in_order(x, weight).bfloat16())
    found = native.head(x, weight, bias)
    assert torch.equal(found, (in_order(x, weight) + bias.float()).bfloat16())
    wanted, size = exact(x, weight, bias)
    error = (found.double() - wanted).abs()
    assert (error <= 2.0**-8 * wanted.abs() + (k + 3) * 2.0**-24 * size).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_and_threads_change_nothing(threads):
    x, weight, bias = make(4, 5003, 200)
    torch.set_num_threads(1)
    wanted = torch.cat([native.head(row, weight, bias)[None] for row in x])
    torch.set_num_threads(threads)
    assert torch.equal(native.head(x, weight, bias), wanted)
    assert torch.equal(native.head(x[None, :, None], weight, bias), wanted[None, :, None])


def test_not_finite():
    x, weight, _ = make(3, 40, 70)
    weight[7, 69], x[1, 3] = float("inf"), float("nan")
    found = native.head(x, weight)
    assert found[1].isnan().all() and found[0::2, 7].isinf().all()
    assert torch.isfinite(found[0::2, torch.arange(40) != 7]).all()


def test_empty():
    assert native.head(torch.empty(0, 8).bfloat16(), torch.ones(3, 8).bfloat16()).shape == (0, 3)
    assert native.head(torch.ones(2, 8).bfloat16(), torch.empty(0, 8).bfloat16()).shape == (2, 0)


def test_fits():
    x, weight, _ = make(native.MOST_ROWS, 8, 16)
    assert native.fits(x, weight)
    assert not native.fits(torch.cat([x, x]), weight)
    assert not native.fits(x.float(), weight) and not native.fits(x, weight.float())
    assert not native.fits(x[:0], weight) and not native.fits(x, weight.T.contiguous().T)
    assert not native.fits(x.to("meta"), weight.to("meta"))


GOOD = make(2, 4, 6)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (GOOD[0].float(), GOOD[1], None, "x has dtype float32: it must be bfloat16"),
        (GOOD[0], GOOD[1].half(), None, "weight has dtype float16: it must be bfloat16"),
        (GOOD[0], GOOD[1][:, :5], None, "weight is not contiguous"),
        (GOOD[0][:, :5], GOOD[1], None, r"weight has shape \[4, 6\]: it must be \[any, 5\]"),
        (GOOD[0], GOOD[1], GOOD[2][:3], r"bias has shape \[3\]: it must be \[4\]"),
        (GOOD[0], GOOD[1], GOOD[2].float(), "bias has dtype float32"),
        (GOOD[0][:, :0], GOOD[1][:, :0], None, "x has no columns"),
        (GOOD[0][0, 0], GOOD[1], None, "x has no dimension"),
    ],
)
def test_bad_input_is_named(x, weight, bias, message):
    with pytest.raises(RuntimeError, match=message):
        native.head(x, weight, bias)


def test_shape_function():
    x, weight, bias = make(2, 4, 6)
    arguments = (x, weight, bias)
    torch.library.opcheck(torch.ops.flatquant_cuda.head.default, arguments)
