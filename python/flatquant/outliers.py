"""Outlier columns: input channels that stay in floating point, in inputs and weights alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("largest", "sensitive")


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Which input channels a method keeps; linears that share an input share them.

    Attributes:
        by: "largest": the channels with the largest |x| in the calibration text (QUIK);
            "sensitive": those with the largest E[x_i²]·Σ_j (w_ji − ŵ_ji)², what rounding them to
            nearest costs (OWQ, arXiv 2306.02272, equation 3).
        share: at most this share of the channels.
        threshold: only channels in which |x| reaches this value; None is all.

    Raises:
        ValueError: an unknown rule, or a share outside (0, 1].
    """

    by: str = "largest"
    share: float = 1 / 16
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.by not in RULES:
            raise ValueError(f"Outliers: by={self.by!r} must be one of {RULES}")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"Outliers: share={self.share} must lie in (0, 1]")

    def columns(self, largest: Tensor, mean_square: Tensor, weight_error: Tensor) -> Tensor:
        """Indices of the channels to keep, ascending, int64.

        Args:
            largest: max |x| by channel [channels].
            mean_square: E[x²] by channel.
            weight_error: Σ (w − ŵ)² by channel, over all linears that read the input.
        """
        score = largest if self.by == "largest" else mean_square * weight_error
        # at least one: the least that a share of a narrow layer can mean
        count = max(round(self.share * len(score)), 1)
        chosen = score.argsort(descending=True, stable=True)[:count]
        if self.threshold is not None:
            chosen = chosen[largest[chosen] >= self.threshold]
        return torch.sort(chosen).values
