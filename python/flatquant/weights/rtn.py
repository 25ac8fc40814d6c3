"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from flatquant.weights.base import QuantizedWeight, WeightQuantizer, WeightTask
from flatquant.weights.search import ClipSearch, fit_grid


@dataclass(frozen=True, kw_only=True)
class Rtn(WeightQuantizer):
    """Every weight to the nearest code.

    Attributes:
        clip: search for the ends of the grid; None: the extremes, times the task's clip ratios.
    """

    clip: ClipSearch | None = None

    @property
    def needs_hessian(self) -> bool:
        """Only for a clip search that looks at outputs."""
        return self.clip is not None and self.clip.needs_hessian

    def quantize(self, task: WeightTask) -> QuantizedWeight:
        """Grid, then codes."""
        grid = fit_grid(task, self.clip)
        return grid.stored(grid.codes(task.rows()), task)
