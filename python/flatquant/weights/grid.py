"""The grids that weights are rounded to: docs/numerics.md, by the ops' own reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatquant.weights.base import QuantizedWeight, WeightTask
from flatquant_cuda.reference import codes_of, scale_and_zero


@dataclass(frozen=True)
class Grid:
    """One scale and zero point for every row and group of a weight.

    Codes are floating-point integers here: −2^(b−1)..2^(b−1)−1, or 0..2^b−1 if asymmetric.

    Attributes:
        bits: 2..8.
        symmetric: whether the zero point is 0.
        scale: float32 [out, groups].
        zero: float32 [out, groups].
    """

    bits: int
    symmetric: bool
    scale: Tensor
    zero: Tensor

    @classmethod
    def between(cls, ends: Tensor, bits: int, symmetric: bool) -> Grid:
        """The grid from −ends[1] to ends[0]; ends: float32 [2, out, groups], not negative."""
        extremes = torch.stack((ends[0], -ends[1]), dim=-1)
        scale, zero = scale_and_zero(extremes, None, bits, symmetric)
        return cls(bits, symmetric, scale, zero)

    def codes(self, rows: Tensor) -> Tensor:
        """Nearest codes of [out, groups, size], in its dtype."""
        scale, zero = self.scale.to(rows.dtype), self.zero.to(rows.dtype)
        return codes_of(rows, scale, zero, self.bits, self.symmetric)

    def values(self, codes: Tensor) -> Tensor:
        """(codes − zero)·scale of [out, groups, size]."""
        scale, zero = self.scale.to(codes.dtype), self.zero.to(codes.dtype)
        return (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)

    def stored(
        self, codes: Tensor, task: WeightTask, notes: tuple[str, ...] = ()
    ) -> QuantizedWeight:
        """Codes [out, groups, size] or [out, in] as they are kept."""
        shift = 0 if self.symmetric else 2 ** (self.bits - 1)
        shape = self.scale.shape[:1] if task.group is None else self.scale.shape
        return QuantizedWeight(
            (codes - shift).to(torch.int8).reshape(task.weight.shape).contiguous(),
            self.scale.reshape(shape),
            None if self.symmetric else (self.zero - shift).reshape(shape),
            notes,
        )
