"""Second moments of a linear's inputs, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("float32", "mixed", "float64")

ROWS = 2048
"""Tokens multiplied at a time: bounds the copy of the inputs in another type."""


class HessianCollector:
    """Accumulates H = Σ xᵀx [channels, channels] over any number of batches.

    GPTQ's H = 2·XXᵀ (arXiv 2210.17323, beside equation 2) up to the factor 2, which no
    quantizer here depends on. Linears that read the same input share one collector. What is
    kept does not grow with the text: H itself and, in "mixed", one float32 matrix of its size.

    Args:
        precision: of the products and of their sum: "float32", "float64", or "mixed": products
            of up to 2048 tokens in float32, which all processors are quick at, summed in
            float64, so that long texts do not lose the small directions.
    """

    def __init__(self, precision: str = "mixed") -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"HessianCollector: precision={precision!r} must be one of {PRECISIONS}"
            )
        self.precision = precision
        self.hessian: Tensor | None = None
        self.count = 0
        self._product: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        """x: [..., channels], any float dtype."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.hessian is None:
            kept = torch.float32 if self.precision == "float32" else torch.float64
            self.hessian = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=kept)
        for part in rows.split(ROWS):
            self._add(self.hessian, part)
        self.count += rows.shape[0]

    def _add(self, hessian: Tensor, part: Tensor) -> None:
        if self.precision != "mixed":
            part = part.to(hessian.dtype)
            hessian.addmm_(part.T, part)
            return
        part = part.float()
        if self._product is None:
            self._product = hessian.new_empty(hessian.shape, dtype=torch.float32)
        hessian.add_(torch.mm(part.T, part, out=self._product))
