"""Differentiable quantize-dequantize: the contract's grids with straight-through rounding.

The numbers and the gradient are those of `flatquant_cuda.ops.fake_quantize`: rounding passes the
gradient through, clamping stops it, and the scale passes it on to the clip ratios and to the
largest and smallest value of the row (FlatQuant, section 3.3; LSQ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flatquant_cuda as fq


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int, symmetric: bool) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.grid = {"bits": bits, "symmetric": symmetric}
        return fq.ops.fake_quantize(x, clip, **ctx.grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        grad_x, grad_clip = fq.ops.fake_quantize_backward(grads[0], x, clip, **ctx.grid)
        return grad_x, grad_clip.sum(1) if clip.dim() == 1 else grad_clip, None, None


def fake_quantize(x: Tensor, bits: int, clip: Tensor | None = None, *, symmetric: bool) -> Tensor:
    """Quantize and dequantize the rows of x; gradients for x and clip.

    Args:
        x: [..., k]; a row is the last dimension.
        bits: 2..8, or 16 to return x unchanged.
        clip: ratios (max, min), [2] for one pair or [2, rows] for one per row of a 2-D x.
        symmetric: which of the two grids of docs/numerics.md.
    """
    if bits == 16:
        return x
    if clip is None:
        clip = torch.ones(2, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    result: Tensor = _FakeQuantize.apply(rows, clip, bits, symmetric)
    return result.reshape(x.shape)
