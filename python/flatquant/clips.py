"""Clip ratios: how much of the range of a row the grid covers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedClip(nn.Module):
    """Two ratios in (0, 1), for the maximum and the minimum, as sigmoids of free logits.

    The start 4.0 (ratio 0.982) and the sigmoid are FlatQuant's (section 3.2, LCT). One pair
    per activation site, or one per weight row.
    """

    def __init__(self, rows: int | None = None, *, start: float = 4.0) -> None:
        super().__init__()
        shape = (2,) if rows is None else (2, rows)
        self.logits = nn.Parameter(torch.full(shape, start))

    def ratios(self) -> Tensor:
        """[2] or [2, rows]: (max, min)."""
        return torch.sigmoid(self.logits)
