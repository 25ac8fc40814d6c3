"""What a weight quantizer takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
        symmetric: the symmetric grid of docs/numerics.md, the only one that the integer runtime
            stores, or the asymmetric one.
        makes_scores: the outputs are queries or keys, which meet in a product; a clip search
            that judges a layer alone may want to leave such weights as they are.
    """

    name: str
    weight: Tensor
    bits: int
    group: int | None
    clip: Tensor | None
    hessian: Tensor | None = None
    symmetric: bool = True
    makes_scores: bool = False

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """The weight, or another of its shape, as float32 [out, groups, size]."""
        weight = self.weight if weight is None else weight
        width = weight.shape[1]
        return weight.float().reshape(weight.shape[0], -1, self.group or width)

    def needed_hessian(self, asker: str) -> Tensor:
        """The Hessian.

        Raises:
            ValueError: there is none, or it is not finite.
        """
        if self.hessian is None:
            raise ValueError(
                f"{asker}: {self.name} needs the Hessian of its inputs (calibration text)"
            )
        if not bool(self.hessian.isfinite().all()):
            raise ValueError(f"{asker}: the Hessian of {self.name} holds NaN or Inf")
        return self.hessian


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers and what they stand for: (codes − zero)·scale.

    Attributes:
        codes: int8 [out, in] in −2^(b−1)..2^(b−1)−1, on both grids.
        scale: float32 [out] or [out, groups].
        zero: float32 like the scale, or None (0) on the symmetric grid.
        notes: what a user should know about how they were found, one sentence each.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    notes: tuple[str, ...] = ()

    def dequantize(self) -> Tensor:
        """(codes − zero)·scale, float32 [out, in]."""
        groups = self.scale.reshape(self.codes.shape[0], -1, 1)
        values = self.codes.float().reshape(*groups.shape[:2], -1)
        if self.zero is not None:
            values = values - self.zero.reshape(groups.shape)
        return (values * groups).reshape(self.codes.shape)


class WeightQuantizer(ABC):
    """A rounding method with its settings; a subclass is a frozen dataclass."""

    @property
    def needs_hessian(self) -> bool:
        """Whether `quantize` reads `WeightTask.hessian`, that is, whether it needs text."""
        return False

    @abstractmethod
    def quantize(self, task: WeightTask) -> QuantizedWeight:
        """Codes and scales of one weight.

        Raises:
            ValueError: a Hessian that is needed is absent or not finite.
        """
