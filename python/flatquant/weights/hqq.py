"""HQQ: grids from a robust norm of the weights' errors, without data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatquant.formats.base import FLOAT32
from flatquant.weights.base import QuantizedWeight, WeightQuantizer, WeightTask
from flatquant.weights.grid import Grid
from flatquant.weights.search import fit_grid


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """sign(x)·max(|x| − |x|^(p−1)/β, 0): the generalised soft threshold, 0 at 0."""
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp_min(0)


def _codes(grid: Grid, rows: Tensor) -> Tensor:
    """Nearest codes; unlike the contract's, this grid's zero point may be a fraction."""
    if grid.symmetric:
        return grid.codes(rows)
    shifted = rows / grid.scale.unsqueeze(-1) + grid.zero.unsqueeze(-1)
    return shifted.round().clamp(0, 2**grid.bits - 1)


@dataclass(frozen=True, kw_only=True)
class Hqq(WeightQuantizer):
    """Half-quadratic quantization (Badri and Shaji, mobiusml.github.io/hqq_blog, 2023).

    min Σ|w − ŵ|^p, p < 1, by splitting: an outlier part e ← shrink(w − ŵ, β), then the grid's
    free number in closed form for w − e, β ← κ·β, a few times.

    On the asymmetric grid the free number is the zero point, as in the original:
    z ← mean(q − (w − e)/s); it becomes a fraction. The symmetric grid, which the integer
    runtime stores, has no zero point; there the same half-quadratic problem is solved for the
    scale: s ← ⟨q, w − e⟩ / ⟨q, q⟩. Every group keeps the best of its iterates, the start
    included, by mean |w − ŵ|, the measure by which the original decides when to stop.

    Attributes:
        p: exponent of the norm, 0 < p <= 1.
        beta: first weight of the split, in units of the weights.
        kappa: its growth.
        iterations: at most.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"Hqq: p={self.p} must lie in (0, 1]")
        if self.beta <= 0 or self.kappa < 1 or self.iterations < 0:
            raise ValueError(
                f"Hqq: beta={self.beta} must be positive, kappa={self.kappa} at least 1, "
                f"iterations={self.iterations} not negative"
            )

    def quantize(self, task: WeightTask) -> QuantizedWeight:
        """Codes nearest to the weights on the optimised grid.

        Raises:
            ValueError: the format does not let every group choose its scale.
        """
        if task.per_tensor or task.format.scale != FLOAT32:
            raise ValueError(
                f"hqq: {task.name}: a scale of its own for every row or group is what HQQ "
                "optimises; it takes no format with stored block scales and no scale per tensor"
            )
        start = fit_grid(task, None)
        # float64: the error has plateaus, on which rounding noise would choose the iterate
        rows = task.weight.double().reshape(task.rows().shape)
        grid = best = replace(start, scale=start.scale.double(), zero=start.zero.double())
        least = self._error(grid, rows)
        beta = self.beta
        for _ in range(self.iterations):
            grid = self._step(grid, rows, beta)
            beta *= self.kappa
            error = self._error(grid, rows)
            better = error < least * (1 - 1e-9)
            least = torch.where(better, error, least)
            best = replace(
                best,
                scale=torch.where(better, grid.scale, best.scale),
                zero=torch.where(better, grid.zero, best.zero),
            )
        best = replace(best, scale=best.scale.float(), zero=best.zero.float())
        return best.stored(_codes(best, rows), task)

    def _error(self, grid: Grid, rows: Tensor) -> Tensor:
        return (rows - grid.values(_codes(grid, rows))).abs().mean(-1)

    def _step(self, grid: Grid, rows: Tensor, beta: float) -> Grid:
        codes = _codes(grid, rows)
        target = rows - shrink(rows - grid.values(codes), beta, self.p)
        if not grid.symmetric:
            return replace(grid, zero=(codes - target / grid.scale.unsqueeze(-1)).mean(-1))
        power = codes.square().sum(-1)
        scale = (codes * target).sum(-1) / power
        return replace(grid, scale=torch.where((power > 0) & (scale > 0), scale, grid.scale))
