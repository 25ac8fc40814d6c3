"""What a weight quantizer takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flatquant.formats import INTEGER, Format
from flatquant.formats.numbers import NUMBERS


@dataclass(frozen=True, kw_only=True)
class WeightTask:
    """One weight to be rounded.

    Attributes:
        name: full name, for messages.
        weight: [out, in] float64, in its final basis.
        bits: 2..8.
        group: input channels per scale, None for the whole row.
        clip: ratios (max, min), [2, out] or one pair a group, [2, out, groups]; or None.
        hessian: Σ xᵀx [in, in] float64 of its inputs, if the quantizer asked for it.
        symmetric: the symmetric grid of docs/numerics.md, the only one that the integer runtime
            stores, or the asymmetric one.
        makes_scores: the outputs are queries or keys, which meet in a product; a clip search
            that judges a layer alone may want to leave such weights as they are.
        kind: "int", or a name in `flatquant.formats.FORMATS`.
        per_tensor: one scale for the whole matrix (formats with block scales: one float32 unit).
        top: largest magnitude of the whole matrix, where `weight` is a part of it.
    """

    name: str
    weight: Tensor
    bits: int
    group: int | None
    clip: Tensor | None
    hessian: Tensor | None = None
    symmetric: bool = True
    makes_scores: bool = False
    kind: str = INTEGER
    per_tensor: bool = False
    top: Tensor | None = None

    @property
    def format(self) -> Format:
        """What the weight is rounded to."""
        return Format(
            kind=self.kind,
            bits=self.bits,
            symmetric=self.symmetric,
            group=self.group,
            per_tensor=self.per_tensor,
        )

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of the whole matrix, float32 scalar."""
        return self.weight.float().abs().amax() if self.top is None else self.top

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
    """Integers and what they stand for: (codes − zero)·scale, or number(codes)·scale.

    Attributes:
        codes: int8 [out, in] in −2^(b−1)..2^(b−1)−1, on both grids; of floats, the bit patterns.
        scale: float32 [out] or [out, groups].
        zero: float32 like the scale, or None (0) on the symmetric grid.
        notes: what a user should know about how they were found, one sentence each.
        number: name of the floats in `flatquant.formats.NUMBERS`; None are integers.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    notes: tuple[str, ...] = ()
    number: str | None = None

    def dequantize(self) -> Tensor:
        """What the codes stand for, float32 [out, in]."""
        return dequantized(self.codes, self.scale, self.zero, self.number, torch.float32)


def dequantized(
    codes: Tensor, scale: Tensor, zero: Tensor | None, number: str | None, dtype: torch.dtype
) -> Tensor:
    """Weights of codes [out, in] and scales [out] or [out, groups]: see `QuantizedWeight`."""
    groups = scale.reshape(codes.shape[0], -1, 1).to(dtype)
    values = codes.to(dtype) if number is None else NUMBERS[number].decode(codes, dtype)
    values = values.reshape(*groups.shape[:2], -1)
    if zero is not None:
        values = values - zero.reshape(groups.shape).to(dtype)
    return (values * groups).reshape(codes.shape)


class WeightQuantizer(ABC):
    """A rounding method with its settings; a subclass is a frozen dataclass."""

    @property
    def needs_hessian(self) -> bool:
        """Whether `quantize` reads `WeightTask.hessian`, that is, whether it needs text."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether it sets weights to 0, also where they stay in floating point."""
        return False

    def keeps(self, task: WeightTask) -> Tensor | None:
        """Which weights are not pruned, bool [out, in]; None are all."""
        return None

    @abstractmethod
    def quantize(self, task: WeightTask) -> QuantizedWeight:
        """Codes and scales of one weight.

        Raises:
            ValueError: a Hessian that is needed is absent or not finite.
        """
