"""Clip searches: how far below its extremes the grid of a row or group should end.

Every search tries the same thing, a list of ratios, and differs in the error that it looks at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatquant.formats.base import FLOAT32
from flatquant.weights.base import WeightTask
from flatquant.weights.grid import Grid

ErrorOf = Callable[[Tensor], Tensor]
"""Rounding error [out, groups, size] -> its cost [out, groups]."""

SIDES = ("absmax", "same", "each")


@dataclass(frozen=True, kw_only=True)
class ClipSearch(ABC):
    """A search over the ratios 1, 1 − 1/steps, ..., down to 1 − shrink (excluded).

    Attributes:
        steps: ratios per unit.
        shrink: how much of the range may be given up.
        sides: "absmax": the ends are ±ratio·max|w|, no further out than the extremes; "same":
            one ratio for maximum and minimum; "each": from the best common ratio, that of the
            maximum and then that of the minimum is searched on its own. On the symmetric grid,
            where only the larger end counts, the three are the same.
    """

    steps: int
    shrink: float
    sides: str

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps < 1:
            raise ValueError(f"{name}: steps={self.steps} must be at least 1")
        if not 0.0 <= self.shrink <= 1.0:
            raise ValueError(f"{name}: shrink={self.shrink} must lie in [0, 1]")
        if self.sides not in SIDES:
            raise ValueError(f"{name}: sides={self.sides!r} must be one of {SIDES}")

    @property
    def needs_hessian(self) -> bool:
        """Whether the error is that of outputs."""
        return False

    @abstractmethod
    def error_of(self, task: WeightTask) -> ErrorOf | None:
        """What to minimise, or None to leave this weight unclipped."""

    def ratios(self) -> list[float]:
        """The ratios, falling from 1."""
        return [1.0 - i / self.steps for i in range(max(int(self.shrink * self.steps), 1))]

    def find(self, task: WeightTask) -> Tensor:
        """Best ends of the grid, (up, down) [2, out, groups]; the task's own clip comes first."""
        widest = ends_of(task)
        error_of = self.error_of(task)
        if error_of is None:
            return widest
        best = _Best(task, error_of, widest)
        for ratio in self.ratios()[1:]:
            narrowed = widest * ratio
            if self.sides == "absmax":
                narrowed = torch.minimum(widest, narrowed.amax(0))
            best.offer(narrowed)
        if self.sides == "each" and not task.symmetric:
            for side in (0, 1):
                common = best.ends.clone()
                for ratio in self.ratios():
                    offer = common.clone()
                    offer[side] = widest[side] * ratio
                    best.offer(offer)
        return best.ends


class _Best:
    """The best ends of every row and group so far; equal errors keep the wider grid."""

    def __init__(self, task: WeightTask, error_of: ErrorOf, ends: Tensor) -> None:
        self.task, self.error_of, self.ends = task, error_of, ends
        self.rows = task.rows()
        self.error = self._error(ends)

    def _error(self, ends: Tensor) -> Tensor:
        grid = Grid.between(ends, self.task)
        error = self.error_of(grid.values(grid.codes(self.rows)) - self.rows)
        # one grid for all rows has one error
        return error.sum().expand(error.shape) if _shared(self.task) else error

    def offer(self, ends: Tensor) -> None:
        error = self._error(ends)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.ends = torch.where(better, ends, self.ends)


def ends_of(task: WeightTask) -> Tensor:
    """Extremes times the task's clip ratios: (max, −min), not negative, [2, out, groups]."""
    rows = task.rows()
    ends = torch.stack((rows.amax(-1).clamp_min(0), (-rows.amin(-1)).clamp_min(0)))
    if task.clip is not None:
        ends = ends * task.clip.float().reshape(2, ends.shape[1], -1)
    return ends.amax((1, 2), keepdim=True).expand(ends.shape) if _shared(task) else ends


def _shared(task: WeightTask) -> bool:
    """Whether all rows have one scale, and not only one unit of scales."""
    return task.per_tensor and task.format.scale == FLOAT32


def fit_grid(task: WeightTask, search: ClipSearch | None) -> Grid:
    """The grid of a weight: its extremes and clip ratios, narrowed by a search."""
    ends = ends_of(task) if search is None else search.find(task)
    return Grid.between(ends, task)


@dataclass(frozen=True, kw_only=True)
class MseClip(ClipSearch):
    """Least Σ|ŵ − w|^norm, without data.

    The search that QuaRot (arXiv 2404.00456) clips its weights with and that GPTQ's code has as
    an option (`mse`); norm, steps and range are those of both repositories.
    """

    steps: int = 100
    shrink: float = 0.8
    sides: str = "same"
    norm: float = 2.4

    def error_of(self, task: WeightTask) -> ErrorOf:
        """Of the weights alone."""
        return lambda delta: delta.abs().pow(self.norm).sum(-1)


@dataclass(frozen=True, kw_only=True)
class AwqClip(ClipSearch):
    """Least squared error of what a row's group contributes to its output.

    The search of AWQ's code (arXiv 2306.00978): Σ_t ((ŵ − w)·x_t)² over the group's channels,
    which is Δ·H_gg·Δᵀ with the group's diagonal block of H = Σ xᵀx: every token counts, and no
    token has to be kept. Weights beyond the clip saturate at the last code; they are not cut
    to the clip first, which could only move them further away.

    Attributes:
        skip_scores: leave queries and keys unclipped, as AWQ's code does: their errors meet in
            a product that a single layer does not see.
    """

    steps: int = 20
    shrink: float = 0.5
    sides: str = "absmax"
    skip_scores: bool = True

    @property
    def needs_hessian(self) -> bool:
        """The inputs' second moments are the weighting."""
        return True

    def error_of(self, task: WeightTask) -> ErrorOf | None:
        """Of the outputs, group by group."""
        if self.skip_scores and task.makes_scores:
            return None
        hessian = task.needed_hessian("AwqClip")
        size = task.group or hessian.shape[0]
        blocks = torch.stack(
            [hessian[i : i + size, i : i + size] for i in range(0, hessian.shape[0], size)]
        )

        def error(delta: Tensor) -> Tensor:
            wide = delta.to(blocks.dtype).transpose(0, 1)  # [groups, out, size]
            return ((wide @ blocks) * wide).sum(-1).T

        return error
