"""Rounding up or down as a number to be learned (TesseraQ; AdaRound, arXiv 2004.10568)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.weights.base import QuantizedWeight, WeightTask
from flatquant.weights.grid import Grid
from flatquant.weights.progressive import Progressive
from flatquant.weights.search import fit_grid

_LOW, _HIGH = -0.1, 1.1
"""The sigmoid is stretched to these ends and cut to [0, 1], so that it reaches both."""

_HARD = 100.0
"""Logit of a decided rounding: its sigmoid is 1 and has no gradient."""


class SoftRounding(nn.Module):
    """ŵ = s·2σ(v)·(⌊w/s⌋ + h(ν) − z): ν a weight (up or down), v a group (scale).

    At the start h(ν) is the fraction that ⌊w/s⌋ leaves, so ŵ = w within the grid. `advance`
    decides what is decided best, step by step, and `hardened` decides the rest.

    Args:
        task: the weight, with a Hessian if the clip search asks for one.
        settings: of the hardening.

    Raises:
        ValueError: a floating-point format, which has no next code up.
    """

    lower: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, task: WeightTask, settings: Progressive) -> None:
        super().__init__()
        if task.format.number is not None:
            raise ValueError(f"{task.name}: rounding is learned for integers, not {task.kind}")
        self.task, self.settings = task, settings
        self.grid = fit_grid(task, settings.clip)
        self.lowest = -(2 ** (task.bits - 1)) if task.symmetric else 0
        self.highest = self.lowest + 2**task.bits - 1
        ratio = task.rows() / self.grid.scale.unsqueeze(-1) + self.grid.zero.unsqueeze(-1)
        lower = ratio.floor()
        fraction = ((ratio - lower) - _LOW) / (_HIGH - _LOW)
        self.register_buffer("lower", lower)
        self.register_buffer("scale", self.grid.scale.clone())
        self.register_buffer("zero", self.grid.zero.clone())
        self.up = nn.Parameter(torch.logit(fraction))
        self.stretch = nn.Parameter(torch.zeros_like(self.grid.scale))

    def share_up(self) -> Tensor:
        """h(ν), [out, groups, size]: 1 is up, 0 is down."""
        return (torch.sigmoid(self.up) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)

    def steps(self) -> Tensor:
        """Scales as they are now, [out, groups]."""
        return self.scale * 2 * torch.sigmoid(self.stretch)

    def forward(self) -> Tensor:
        """The weight that the block sees, [out, in]."""
        codes = (self.lower + self.share_up()).clamp(self.lowest, self.highest)
        values = (codes - self.zero.unsqueeze(-1)) * self.steps().unsqueeze(-1)
        return values.reshape(self.task.weight.shape)

    @torch.no_grad()
    def advance(self, progress: float) -> None:
        """Decide all but the share that `settings` leaves open at this progress, 0 to 1."""
        shares = self.settings.shares
        share = shares[min(int(progress * len(shares)), len(shares) - 1)]
        score = (self.share_up() - 0.5).abs()
        undecided = max(int(share * score.numel()), 1)
        edge = score.flatten().kthvalue(undecided).values
        self.up.copy_(torch.where(score > edge, self.up.sign() * _HARD, self.up))

    @torch.no_grad()
    def hardened(self) -> QuantizedWeight:
        """Codes and scales, everything decided."""
        codes = (self.lower + (self.up > 0)).clamp(self.lowest, self.highest)
        return Grid(self.grid.format, self.steps(), self.zero).stored(codes, self.task)
