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
from flatquant.formats import INTEGER, Format, raw_scale, stored_scale
from flatquant.formats.base import E4M3


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


def simulate(
    x: Tensor, format: Format, clip: Tensor | None = None, span: Tensor | None = None
) -> Tensor:
    """x in the numbers of a format; differentiable like `fake_quantize`.

    The rounding of a scale passes the gradient through, as the rounding of a number does.

    Args:
        x: [..., k]; a row is the last dimension.
        format: what to round to; off returns x unchanged.
        clip: ratios (max, min), [2] for one pair, [2, rows] for one per row of a 2-D x, or
            [2, rows·groups] for one per group of each row.
        span: ends (max, −min) of a static range, [2]; None takes those of x.
    """
    if format.off:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, format.block or x.shape[-1])
    if format.kind == INTEGER and not (format.per_tensor or format.static):
        if clip is not None and clip.dim() == 2:
            clip = clip.repeat_interleave(blocks.shape[:-1].numel() // clip.shape[1], dim=1)
        rows = blocks.reshape(-1, blocks.shape[-1])
        values = fake_quantize(rows, format.bits, clip, symmetric=format.symmetric)
        return values.reshape(x.shape)
    up, down = _ends(blocks, format, clip, span)
    if format.number is not None:
        top = None if span is None else span.amax().to(x.dtype)
        return _rounded_floats(blocks, torch.maximum(up, down), format, top).reshape(x.shape)
    return _rounded_integers(blocks, up, down, format).reshape(x.shape)


def _ends(
    blocks: Tensor, format: Format, clip: Tensor | None, span: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(max, −min) of what shares a scale, not negative, broadcastable to the blocks."""
    if span is not None and format.scale != E4M3:
        up, down = span.to(blocks.dtype)
    else:
        up = blocks.amax(-1, keepdim=True).clamp_min(0)
        down = (-blocks.amin(-1, keepdim=True)).clamp_min(0)
    if clip is not None:
        ratios = clip if clip.dim() == 1 else clip.reshape(2, blocks.shape[0], -1, 1)
        up, down = up * ratios[0], down * ratios[1]
    if (format.per_tensor or format.static) and format.scale != E4M3:
        up, down = up.amax(), down.amax()
    return up, down


def _rounded_floats(blocks: Tensor, ends: Tensor, format: Format, top: Tensor | None) -> Tensor:
    """`top`: what the unit of block scales is made from; None: the extreme of a row or tensor."""
    number = format.number
    assert number is not None
    if top is None:
        size = blocks.detach().abs()
        top = size.amax() if format.per_tensor else size.amax((-1, -2), keepdim=True)
    raw = raw_scale(ends, format)
    scale = raw + (stored_scale(ends, format, top) - raw).detach()
    ratio = (blocks / scale).clamp(-number.largest, number.largest)
    return (ratio + (number.round(ratio) - ratio).detach()) * scale


def _rounded_integers(blocks: Tensor, up: Tensor, down: Tensor, format: Format) -> Tensor:
    """The grids of docs/numerics.md over ends that are not those of a row."""
    steps = 2 ** (format.bits - 1) - 1 if format.symmetric else 2**format.bits - 1
    scale = (torch.maximum(up, down) if format.symmetric else up + down) / steps
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    zero = torch.zeros_like(scale)
    lowest = -steps - 1.0
    if not format.symmetric:
        zero, lowest = (down / scale).detach().round().clamp(0, steps), 0.0
    ratio = blocks / scale
    code = (ratio + (ratio.round() - ratio).detach() + zero).clamp(lowest, steps)
    return (code - zero) * scale


def simulate_around(
    x: Tensor,
    kept: Tensor | None,
    format: Format,
    clip: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    """`simulate`, but columns `kept` of the last dimension stay and widen no range; None: none."""
    if kept is None or format.off:
        return simulate(x, format, clip, span)
    rounded = simulate(x.index_fill(-1, kept, 0.0), format, clip, span)
    return rounded.index_copy(-1, kept, x.index_select(-1, kept))
