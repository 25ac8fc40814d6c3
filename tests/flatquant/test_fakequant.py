"""The differentiable quantizer: values of the reference, straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flatquant_cuda as fq
from flatquant.fakequant import fake_quantize


def straight_through(x: Tensor, clip: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The same, as a chain of autograd nodes."""
    high = x.amax(-1, keepdim=True).clamp_min(0) * clip[0].unsqueeze(-1)
    low = x.amin(-1, keepdim=True).clamp_max(0) * clip[1].unsqueeze(-1)

    def rounded(t: Tensor) -> Tensor:
        return t + (t.round() - t).detach()

    if symmetric:
        qmax = 2 ** (bits - 1) - 1
        scale = torch.maximum(high, -low) / qmax
        return rounded(x / scale).clamp(-qmax - 1, qmax) * scale
    levels = 2**bits - 1
    scale = (high - low) / levels
    zero = (-low / scale).round().detach()
    return ((rounded(x / scale) + zero).clamp(0, levels) - zero) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_autograd_chain(
    symmetric: bool, per_row: bool, bits: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(9, 37, generator=generator, dtype=dtype).mul_(3).requires_grad_()
    ratios = torch.rand((2, 9) if per_row else (2,), generator=generator, dtype=dtype) / 2 + 0.4
    clip = ratios.requires_grad_()
    grad = torch.randn(9, 37, generator=generator, dtype=dtype)
    ours = fake_quantize(x, bits, clip, symmetric=symmetric)
    chain = straight_through(x, clip, bits, symmetric)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert torch.allclose(ours, chain, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (x, clip), grad),
        torch.autograd.grad(chain, (x, clip), grad),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=10 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_the_quantizer_ops_values(symmetric: bool) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    clip = torch.tensor([0.9, 0.8])
    codes, scale, zero = fq.ops.quantize_activation(x, clip=clip, symmetric=symmetric)
    q = fq.packing.unpack_nibbles(codes, 33, symmetric).float()
    value = (q if symmetric else q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    assert torch.equal(fake_quantize(x, 4, clip, symmetric=symmetric), value)


def test_zero_rows_and_sixteen_bits() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = fake_quantize(x, 4, symmetric=True)
    assert torch.equal(y, torch.zeros(2, 8))
    y.sum().backward()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]
    assert fake_quantize(x, 16, symmetric=True) is x


@pytest.mark.parametrize("symmetric", [True, False])
def test_native_equals_reference(symmetric: bool) -> None:
    if fq.backend("fake_quantize") != "native":
        pytest.skip("the native library is not built")
    x = torch.randn(70, 129, generator=torch.Generator().manual_seed(0)) * 2
    grad = torch.randn(70, 129, generator=torch.Generator().manual_seed(1))
    for clip in (torch.tensor([0.9, 0.7]), torch.rand(2, 70) / 2 + 0.5):
        args = {"bits": 4, "symmetric": symmetric}
        assert torch.equal(
            fq.ops.fake_quantize(x, clip, **args), fq.reference.fake_quantize(x, clip, **args)
        )
        for a, b in zip(
            fq.ops.fake_quantize_backward(grad, x, clip, **args),
            fq.reference.fake_quantize_backward(grad, x, clip, **args),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
