"""Small floating-point numbers: their values, rounding to them, and their bit patterns.

E2M1, E3M2 and E2M3 are those of the OCP Microscaling formats (v1.0, 2023), E4M3 and E5M2 those of
"FP8 formats for deep learning" (arXiv 2209.05433): the ranges that hardware has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatNumber:
    """A sign, an exponent and a mantissa; subnormals, and no infinities.

    Attributes:
        name: "E4M3" and so on.
        exponent_bits: width of the exponent.
        mantissa_bits: width of the mantissa.
        largest: the largest finite value.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        """Width in all."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number, and of the subnormals."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def largest_exponent(self) -> int:
        """Exponent of `largest`."""
        return math.frexp(self.largest)[1] - 1

    def round(self, x: Tensor) -> Tensor:
        """The nearest number, ties to the even mantissa, saturating; NaN stays. No gradient."""
        x = x.detach()
        exponent = torch.frexp(x).exponent - 1
        step = torch.ldexp(
            torch.ones_like(x), exponent.clamp_min(self.smallest_exponent) - self.mantissa_bits
        )
        return ((x / step).round() * step).clamp(-self.largest, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        """Bit patterns of numbers of this kind as integers of `bits` bits, int8."""
        magnitudes = _magnitudes(self).to(values.device, values.dtype)
        pattern = torch.searchsorted(magnitudes, values.abs().contiguous())
        negative = (values < 0).to(pattern.dtype)
        return (pattern - negative * 2 ** (self.bits - 1)).to(torch.int8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Inverse of `encode`."""
        magnitudes = _magnitudes(self).to(codes.device, dtype)
        values = torch.cat((magnitudes, -magnitudes))
        patterns = codes.to(torch.int32) & (len(values) - 1)
        return values.index_select(0, patterns.reshape(-1)).reshape(codes.shape)


@cache
def _magnitudes(number: FloatNumber) -> Tensor:
    """Values of the patterns without a sign, ascending; those beyond `largest` are unused."""
    values = []
    for exponent in range(2**number.exponent_bits):
        for mantissa in range(2**number.mantissa_bits):
            share = mantissa / 2**number.mantissa_bits
            power = number.smallest_exponent + max(exponent - 1, 0)
            values.append(math.ldexp(share + (exponent > 0), power))
    return torch.tensor(values, dtype=torch.float64)


NUMBERS = {
    number.name: number
    for number in (
        FloatNumber("E2M1", 2, 1, 6.0),
        FloatNumber("E2M3", 2, 3, 7.5),
        FloatNumber("E3M2", 3, 2, 28.0),
        FloatNumber("E4M3", 4, 3, 448.0),
        FloatNumber("E5M2", 5, 2, 57344.0),
        FloatNumber("E4M3X", 4, 3, 480.0),
        FloatNumber("E5M2X", 5, 2, 114688.0),
    )
}
"""By name. X: no pattern is set aside for NaN or infinity, the range that a scaled exponent bias
gives (arXiv 2208.09225, and LLMC); in E2M1, E2M3 and E3M2 hardware sets none aside either."""
