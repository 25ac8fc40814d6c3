"""Differentiable quantize-dequantize: the contract's grids with straight-through rounding.

The numbers are those of `flatquant_cuda.reference` (one definition, held equal by tests);
what is added here is a gradient: rounding passes it through, clamping stops it, and the scale
passes it on to the clip ratios and to the largest and smallest value of the row (FlatQuant,
section 3.3; LSQ). Each backward is written out, because a chain of autograd nodes keeps six
times as many activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Symmetric(torch.autograd.Function):
    """y = s·clamp(round(x/s)), s = max(clip_max·max(x, 0), clip_min·max(−x, 0)) / qmax."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int) -> Tensor:
        qmax = 2 ** (bits - 1) - 1
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        upper = high.clamp_min(0) * clip[0].unsqueeze(-1)
        lower = (-low).clamp_min(0) * clip[1].unsqueeze(-1)
        scale = torch.maximum(upper, lower) / qmax
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        y = torch.div(x, scale).round_().clamp_(-qmax - 1, qmax).mul_(scale)
        ctx.save_for_backward(x, clip, low, high, scale)
        ctx.qmax = qmax
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, clip, low, high, scale = ctx.saved_tensors
        qmax = ctx.qmax
        ratio = x / scale
        rounded = ratio.round()
        code = rounded.clamp(-qmax - 1, qmax)
        inside = code == rounded
        # d y / d s is q − x/s where rounding passes the gradient on, and q where clamping stops it
        step = code.sub_(ratio.mul_(inside))
        grad_scale = step.mul_(grad).sum(-1, keepdim=True) / qmax
        grad_x = grad * inside
        use_high = high.clamp_min(0) * clip[0].unsqueeze(-1) >= (-low).clamp_min(0) * clip[
            1
        ].unsqueeze(-1)
        grad_high = grad_scale * use_high
        grad_low = grad_scale * ~use_high
        index = torch.where(use_high, x.argmax(-1, keepdim=True), x.argmin(-1, keepdim=True))
        slope = torch.where(use_high, clip[0].unsqueeze(-1), -clip[1].unsqueeze(-1))
        grad_x.scatter_add_(-1, index, grad_scale * slope)
        grad_clip = torch.stack(
            (
                (grad_high * high.clamp_min(0)).squeeze(-1).sum_to_size(clip[0].shape),
                (grad_low * (-low).clamp_min(0)).squeeze(-1).sum_to_size(clip[1].shape),
            )
        )
        return grad_x, grad_clip, None


class _Asymmetric(torch.autograd.Function):
    """y = s·(clamp(round(x/s) + z) − z) with lo, hi forced to include 0 (contract)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int) -> Tensor:
        levels = 2**bits - 1
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        upper = high.clamp_min(0) * clip[0].unsqueeze(-1)
        lower = low.clamp_max(0) * clip[1].unsqueeze(-1)
        scale = (upper - lower) / levels
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.div(-lower, scale).round_().clamp_(0, levels)
        y = torch.div(x, scale).round_()
        y = torch.minimum(torch.maximum(y, -zero), levels - zero).mul_(scale)
        ctx.save_for_backward(x, clip, low, high, scale, zero)
        ctx.levels = levels
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, clip, low, high, scale, zero = ctx.saved_tensors
        levels = ctx.levels
        ratio = x / scale
        rounded = ratio.round()
        code = torch.minimum(torch.maximum(rounded, -zero), levels - zero)
        inside = code == rounded
        step = code.sub_(ratio.mul_(inside))
        grad_scale = step.mul_(grad).sum(-1, keepdim=True) / levels
        grad_x = grad * inside
        grad_x.scatter_add_(
            -1, x.argmax(-1, keepdim=True), grad_scale * clip[0].unsqueeze(-1) * (high > 0)
        )
        grad_x.scatter_add_(
            -1, x.argmin(-1, keepdim=True), -grad_scale * clip[1].unsqueeze(-1) * (low < 0)
        )
        grad_clip = torch.stack(
            (
                (grad_scale * high.clamp_min(0)).squeeze(-1).sum_to_size(clip[0].shape),
                (-grad_scale * low.clamp_max(0)).squeeze(-1).sum_to_size(clip[1].shape),
            )
        )
        return grad_x, grad_clip, None


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
    function = _Symmetric if symmetric else _Asymmetric
    result: Tensor = function.apply(x, clip, bits)
    return result
