"""Scales of floating-point formats."""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.formats.base import E4M3, E8M0, Format
from flatquant.formats.numbers import NUMBERS

_SCALE = NUMBERS["E4M3"]
_SMALLEST = 2.0**-9
"""The smallest E4M3 above 0: the scale of a block that is tiny beside the largest of its row."""


def raw_scale(span: Tensor, format: Format) -> Tensor:
    """What maps `span` to the largest number; differentiable. 1 where it would be subnormal."""
    assert format.number is not None
    scale = span / format.number.largest
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def stored_scale(span: Tensor, format: Format, top: Tensor | None = None) -> Tensor:
    """The scale of blocks as the format stores it; no gradient.

    Args:
        span: largest magnitude that each block is to cover, not negative.
        format: a floating-point one.
        top: for E4M3 scales, the largest span of all blocks that share a float32 factor,
            broadcastable to `span`.

    Returns:
        float32: span / largest. E8M0: 2^(⌊log2 span⌋ − exponent of the largest number), so that
        a block's extreme may saturate (OCP Microscaling, 6.3). E4M3: span / largest, rounded to
        E4M3 in units of top / (448·largest), so that the largest block has scale 448.
    """
    number = format.number
    assert number is not None
    scale = raw_scale(span.detach(), format)
    if format.scale == E8M0:
        exponent = torch.frexp(span.detach()).exponent - 1 - number.largest_exponent
        power = torch.ldexp(torch.ones_like(scale), exponent.clamp(-126, 127))
        # an empty block keeps 1; NaN has no exponent
        return torch.where((span > 0) & span.isfinite(), power, scale)
    if format.scale == E4M3:
        assert top is not None
        unit = raw_scale(top.detach(), format) / _SCALE.largest
        return _SCALE.round(scale / unit).clamp_min(_SMALLEST) * unit
    return scale
