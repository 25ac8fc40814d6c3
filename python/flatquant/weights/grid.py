"""The grids that weights are rounded to: docs/numerics.md, by the ops' own reference.

Floating-point numbers are a grid too, one whose codes are not evenly spaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatquant.formats import Format, stored_scale
from flatquant.formats.base import E4M3
from flatquant.weights.base import QuantizedWeight, WeightTask
from flatquant_cuda.reference import codes_of, scale_and_zero


@dataclass(frozen=True)
class Grid:
    """One scale and zero point for every row and group of a weight.

    Codes are floating-point here: the integers −2^(b−1)..2^(b−1)−1, or 0..2^b−1 if asymmetric,
    or the numbers of a floating-point format.

    Attributes:
        format: what is rounded to.
        scale: float32 [out, groups].
        zero: float32 [out, groups].
    """

    format: Format
    scale: Tensor
    zero: Tensor

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.format.bits

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0."""
        return self.format.symmetric

    @classmethod
    def between(cls, ends: Tensor, task: WeightTask) -> Grid:
        """The grid from −ends[1] to ends[0]; ends: float32 [2, out, groups], not negative."""
        format = task.format
        if format.number is not None:
            top = task.largest if format.scale == E4M3 else None
            scale = stored_scale(torch.maximum(ends[0], ends[1]), format, top)
            return cls(format, scale, torch.zeros_like(scale))
        extremes = torch.stack((ends[0], -ends[1]), dim=-1)
        scale, zero = scale_and_zero(extremes, None, task.bits, task.symmetric)
        return cls(format, scale, zero)

    def codes(self, rows: Tensor) -> Tensor:
        """Nearest codes of [out, groups, size], in its dtype."""
        scale, zero = self.scale.to(rows.dtype), self.zero.to(rows.dtype)
        if self.format.number is not None:
            return self.format.number.round(rows / scale.unsqueeze(-1))
        return codes_of(rows, scale, zero, self.bits, self.symmetric)

    def values(self, codes: Tensor) -> Tensor:
        """(codes − zero)·scale of [out, groups, size]."""
        scale, zero = self.scale.to(codes.dtype), self.zero.to(codes.dtype)
        return (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)

    def stored(
        self, codes: Tensor, task: WeightTask, notes: tuple[str, ...] = ()
    ) -> QuantizedWeight:
        """Codes [out, groups, size] or [out, in] as they are kept."""
        shape = self.scale.shape[:1] if task.group is None else self.scale.shape
        number = self.format.number
        if number is not None:
            patterns = number.encode(codes).reshape(task.weight.shape).contiguous()
            scale = self.scale.reshape(shape)
            return QuantizedWeight(patterns, scale, None, notes, number.name)
        shift = 0 if self.symmetric else 2 ** (self.bits - 1)
        return QuantizedWeight(
            (codes - shift).to(torch.int8).reshape(task.weight.shape).contiguous(),
            self.scale.reshape(shape),
            None if self.symmetric else (self.zero - shift).reshape(shape),
            notes,
        )
