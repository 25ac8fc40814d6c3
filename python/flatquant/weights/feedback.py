"""Rounding with feedback: each column is rounded after the errors of those before it.

GPTQ (arXiv 2210.17323) and QuIP's LDLQ (arXiv 2307.13304) are this one loop. With
H = U·D·Uᵀ, U unit upper triangular and D diagonal,

    ŵ_k = Q( w_k + Σ_{j<k} (w_j − ŵ_j)·U_jk )                         (QuIP, section 3)

has the error tr(Δ·H·Δᵀ) = Σ_k D_k·‖rounding of column k‖². GPTQ writes the same targets with the
inverse of H (its equations 2 and 3), as QuIP proves; this form needs no inverse.
tests/flatquant/test_weights_gptq.py holds the loop against independent writings of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatquant.weights.base import QuantizedWeight, WeightQuantizer, WeightTask
from flatquant.weights.grid import Grid
from flatquant.weights.search import ClipSearch, fit_grid

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}

ATTEMPTS = 7
"""Factorisations tried, each with ten times the damping of the one before."""


@dataclass(frozen=True, kw_only=True)
class Feedback(WeightQuantizer):
    """The loop with its settings; `Gptq` and `Ldlq` are its names.

    No row has more error tr(Δ·H·Δᵀ) than rounding to nearest gives it: such rows are rounded to
    nearest, and a note says how many.

    Attributes:
        act_order: round the columns with the largest H_kk first, while there are most others
            left to make up for them; scales stay those of contiguous groups.
        static_groups: scales from the weights as they were; otherwise each group's scale is
            made when its turn comes, from weights that have taken up the errors so far.
        damp: added to the diagonal of H, as a share of its mean over live channels.
        block: columns whose errors are gathered before they reach the columns behind them.
        passes: rounds of coordinate descent afterwards: every code in turn to its best value
            given all others, which never raises the (damped) error.
        precision: "float64" or "float32", of the factorisation and the loop.
        clip: search for the ends of the grid.

    Raises:
        ValueError: settings that make no sense.
    """

    act_order: bool = False
    static_groups: bool = True
    damp: float = 0.01
    block: int = 128
    passes: int = 0
    precision: str = "float64"
    clip: ClipSearch | None = None

    def __post_init__(self) -> None:
        name = self.label
        for setting, least in (("damp", 0), ("block", 1), ("passes", 0)):
            value = getattr(self, setting)
            if value < least:
                raise ValueError(f"{name}: {setting}={value} must be at least {least}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"{name}: precision={self.precision!r} must be one of {list(PRECISIONS)}"
            )
        if self.act_order and not self.static_groups:
            raise ValueError(
                f"{name}: act_order=True needs static_groups=True: a group whose columns are "
                "rounded at different times has no moment at which its scale could be made"
            )

    @property
    def label(self) -> str:
        """Name in messages."""
        return type(self).__name__.lower()

    @property
    def needs_hessian(self) -> bool:
        """Always."""
        return True

    def quantize(self, task: WeightTask) -> QuantizedWeight:
        """Codes that nearly minimise tr(Δ·H·Δᵀ), on the grid that `clip` finds.

        Raises:
            ValueError: no Hessian, or one that cannot be factorised.
        """
        return _round_with_feedback(task, self)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H + damp·mean(diag)·I; channels that were never active get the mean as their diagonal.

    Such a channel has no correlation with any other, so its weights are rounded to nearest:
    the text has not excited them, which is no reason to think that nothing ever will.
    """
    h = hessian.clone()
    diagonal = h.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    diagonal[~live] = mean
    diagonal += damp * mean
    return h


def unit_upper(hessian: Tensor, damp: float, name: str) -> tuple[Tensor, Tensor, float]:
    """U of H = U·D·Uᵀ, the damped H, and the damping that was needed.

    Raises:
        ValueError: H cannot be factorised even when its diagonal dominates.
    """
    for attempt in range(ATTEMPTS):
        share = damp if attempt == 0 else max(damp, 1e-6) * 10.0**attempt
        h = damped(hessian, share)
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info) == 0 and bool(lower.isfinite().all()):
            upper = lower.flip(0, 1)
            return upper / upper.diagonal(), h, share
    raise ValueError(
        f"{name}: the Hessian is not positive definite, not even with {share:g} times its mean "
        "diagonal added; is it a sum of xᵀx?"
    )


class _Columns:
    """State of the loop, transposed, so that a column of the weight is contiguous: [in, out]."""

    def __init__(self, task: WeightTask, grid: Grid, order: Tensor, dtype: torch.dtype) -> None:
        self.format = grid.format
        self.weight = task.weight.T[order].to(dtype)
        self.codes = torch.zeros_like(self.weight)
        self.errors = torch.zeros_like(self.weight)  # w − ŵ
        self.scale = grid.scale.T.to(dtype, copy=True).contiguous()  # [groups, out]
        self.zero = grid.zero.T.to(dtype, copy=True).contiguous()
        size = task.weight.shape[1] // grid.scale.shape[1]
        self.group = (order // size).tolist()

    def round(self, k: int, target: Tensor) -> Tensor:
        """Round column k to the code nearest `target` [out]; returns the new error."""
        g = self.group[k]
        one = Grid(self.format, self.scale[g], self.zero[g])
        code = one.codes(target.unsqueeze(-1))
        self.codes[k] = code[:, 0]
        return self.weight[k] - one.values(code)[:, 0]

    def result(self, task: WeightTask, order: Tensor, notes: tuple[str, ...]) -> QuantizedWeight:
        """Codes in the columns' own order, and the scales they were rounded with."""
        codes = torch.empty_like(self.codes)
        codes[order] = self.codes
        scale, zero = self.scale.T.float().contiguous(), self.zero.T.float().contiguous()
        return Grid(self.format, scale, zero).stored(codes.T, task, notes)


def _forward(
    columns: _Columns, upper: Tensor, block: int, start: Callable[[int, Tensor], None] | None
) -> None:
    """The loop of the formula above, in blocks; `start` sees what each block has become."""
    weight, errors = columns.weight, columns.errors
    for begin in range(0, len(weight), block):
        end = min(begin + block, len(weight))
        carried = upper[:begin, begin:end].T @ errors[:begin]
        inner = upper[begin:end, begin:end]
        if start is not None:
            # GPTQ's update of all columns to come, w + (W − Ŵ)_<·H_<F·H_FF⁻¹, within this block
            now = torch.linalg.solve_triangular(inner.T, carried, upper=False, unitriangular=True)
            start(begin, weight[begin:end] + now)
        for k in range(begin, end):
            fed = inner[: k - begin, k - begin] @ errors[begin:k]
            errors[k] = columns.round(k, weight[k] + carried[k - begin] + fed)


def _descend(columns: _Columns, hessian: Tensor, block: int) -> None:
    """One pass of coordinate descent on tr(Δ·H·Δᵀ) (QuIP's greedy updates)."""
    weight, errors = columns.weight, columns.errors
    for begin in range(0, len(weight), block):
        end = min(begin + block, len(weight))
        pull = hessian[begin:end] @ errors
        for k in range(begin, end):
            own = hessian[k, k]
            new = columns.round(k, weight[k] + pull[k - begin] / own - errors[k])
            pull += torch.outer(hessian[begin:end, k], new - errors[k])
            errors[k] = new


def _round_with_feedback(task: WeightTask, settings: Feedback) -> QuantizedWeight:
    hessian = task.needed_hessian(settings.label)
    dtype = PRECISIONS[settings.precision]
    order = torch.arange(len(hessian), device=hessian.device)
    if settings.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper, h, share = unit_upper(
        hessian[order][:, order].to(dtype), settings.damp, f"{settings.label}: {task.name}"
    )
    grid = fit_grid(task, settings.clip)
    columns = _Columns(task, grid, order, dtype)
    if settings.static_groups or task.group is None:
        _forward(columns, upper, settings.block, None)
    else:
        _forward(columns, upper, task.group, _MovingGrid(task, settings.clip, columns))
    for _ in range(settings.passes):
        _descend(columns, h, settings.block)
    notes: tuple[str, ...] = ()
    if share != settings.damp:
        notes = (f"damping grew from {settings.damp:g} to {share:g} for a singular Hessian",)
    result = columns.result(task, order, notes)
    # rows that share one scale cannot choose between two grids
    one_grid = settings.clip is None or task.per_tensor
    for plain in (grid,) if one_grid else (grid, fit_grid(task, None)):
        nearest = plain.stored(plain.codes(task.rows()), task)
        result = _best_rows(task, result, nearest, hessian)
    return result


class _MovingGrid:
    """Makes the scale of a group from the weights that its columns have become."""

    def __init__(self, task: WeightTask, search: ClipSearch | None, columns: _Columns) -> None:
        self.task, self.search, self.columns = task, search, columns

    def __call__(self, begin: int, now: Tensor) -> None:
        """now: [group, out], the group that starts at column `begin`."""
        task, end = self.task, begin + len(now)
        hessian = None if task.hessian is None else task.hessian[begin:end, begin:end]
        index = begin // len(now)
        clip = task.clip
        if clip is not None and clip.dim() == 3:
            clip = clip[..., min(index, clip.shape[2] - 1)]
        part = replace(task, weight=now.T, hessian=hessian, clip=clip, top=task.largest)
        grid = fit_grid(part, self.search)
        self.columns.scale[index] = grid.scale[:, 0].to(now.dtype)
        self.columns.zero[index] = grid.zero[:, 0].to(now.dtype)


def row_errors(weight: Tensor, candidate: QuantizedWeight, hessian: Tensor) -> Tensor:
    """Σ_t ((ŵ − w)·x_t)² of every row, [out]: the diagonal of Δ·H·Δᵀ."""
    delta = weight.to(hessian.dtype) - candidate.dequantize().to(hessian.dtype)
    return ((delta @ hessian) * delta).sum(1)


def _best_rows(
    task: WeightTask, ours: QuantizedWeight, plain: QuantizedWeight, hessian: Tensor
) -> QuantizedWeight:
    """`ours`, but rows whose error is larger than with `plain`, and the note that says so."""
    errors = [row_errors(task.weight, candidate, hessian) for candidate in (ours, plain)]
    worse = ~(errors[0] <= errors[1])  # NaN is no better than anything
    count = int(worse.sum())
    if count == 0:
        return ours

    def pick(ours: Tensor, plain: Tensor) -> Tensor:
        return torch.where(worse.reshape(-1, *[1] * (ours.dim() - 1)), plain, ours)

    zero = None
    if ours.zero is not None and plain.zero is not None:
        zero = pick(ours.zero, plain.zero)
    note = f"{count} of {len(worse)} rows are rounded to nearest, which has less error there"
    return replace(
        ours,
        codes=pick(ours.codes, plain.codes),
        scale=pick(ours.scale, plain.scale),
        zero=zero,
        notes=(*ours.notes, note),
    )
