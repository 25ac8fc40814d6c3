"""What a weight quantizer takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WeightTask:
    """One weight to be rounded.

    Attributes:
        name: full name, for messages.
        weight: [out, in] float64, in its final basis.
        bits: 2..8.
        group: input channels per scale, None for the whole row.
        clip: ratios [2, out] = (max, min), or None.
        hessian: Σ xᵀx [in, in] float64 of its inputs, if the quantizer asked for it.
    """

    name: str
    weight: Tensor
    bits: int
    group: int | None
    clip: Tensor | None
    hessian: Tensor | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes int8 [out, in] and scale float32 [out] or [out, groups]."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """codes·scale, float32 [out, in]."""
        scale = self.scale if self.scale.dim() == 2 else self.scale.unsqueeze(-1)
        width = self.codes.shape[1] // scale.shape[1]
        return self.codes.float() * scale.repeat_interleave(width, dim=1)


@dataclass(frozen=True)
class WeightQuantizer:
    """A rounding method and whether it wants the Hessian."""

    quantize: Callable[[WeightTask], QuantizedWeight]
    needs_hessian: bool = False
