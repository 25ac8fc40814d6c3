"""What can be read off one quantized block without running it: weights, clips, transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from flatquant.analysis.bases import LinearBasis, factors_of, owner_of
from flatquant.analysis.meters import ChannelMaxima, Moments
from flatquant.analysis.tables import Cell, Rows
from flatquant.formats import INTEGER
from flatquant.models.spec import FamilySpec, Group, Site
from flatquant.runtime.activation import InputQuantizer
from flatquant.runtime.attention import KVQuantizer
from flatquant.runtime.linear import QuantizedLinear
from flatquant.weights import MseClip, WeightTask
from flatquant.weights.search import ends_of, fit_grid

COLUMN_BINS = 64
"""Bins of input channels in the table of errors by column, at most."""
_SAMPLED_ROWS = 32
"""Rows of a weight that the range search looks at."""
_RANGES = MseClip(steps=25, shrink=0.6, sides="each", norm=2.0)


@torch.no_grad()
def describe_block(
    layer: int,
    fp_block: nn.Module,
    block: nn.Module,
    family: FamilySpec,
    bases: dict[str, LinearBasis],
    rows: Rows,
) -> None:
    """Rows of the tables that need no text.

    Args:
        layer: number of the block.
        fp_block: of the floating-point model.
        block: of the quantized one.
        family: of both.
        bases: from `linear_bases`.
        rows: gets the rows.
    """
    for group in family.groups:
        _magnitudes(layer, fp_block, group, bases, rows)
        for name in group.linears:
            basis = bases[name]
            original = fp_block.get_parameter(f"{name}.weight")
            for when, weight in (("before", original), ("after", basis.weight)):
                moments = Moments()
                moments(weight)
                rows.add("kurtosis", layer, name, "weight", when, moments.kurtosis)
            for index, error in enumerate(column_errors(basis)):
                rows.add("columns", layer, name, index, error)
            linear = block.get_submodule(name)
            if isinstance(linear, QuantizedLinear) and _on_a_grid(linear):
                for line in ranges(linear, basis):
                    rows.add("ranges", layer, name, *line)
        for line in _clips(group.site.value, owner_of(block, group), "clip_ratio"):
            rows.add("clips", layer, *line)
        for factor, value in conditions(owner_of(block, group)):
            rows.add("conditions", layer, group.site.value, factor, value)
    quantizer = getattr(block.get_submodule(family.attention), "kv_quantizer", None)
    if isinstance(quantizer, KVQuantizer):
        for where, name in (("keys", "k_clip"), ("values", "v_clip")):
            for line in _clips(where, quantizer, name):
                rows.add("clips", layer, *line)
        if quantizer.k_trans is not None:
            value = float(torch.linalg.cond(quantizer.k_trans.double()))
            rows.add("conditions", layer, Site.QK_HEAD.value, "whole", value)
    heads = bases[family.value].output.heads
    if heads is not None:
        worst = float(torch.linalg.cond(heads.double()).max())
        rows.add("conditions", layer, Site.V_HEAD.value, "whole", worst)


def _magnitudes(
    layer: int, fp_block: nn.Module, group: Group, bases: dict[str, LinearBasis], rows: Rows
) -> None:
    for when in ("before", "after"):
        maxima = ChannelMaxima()
        for name in group.linears:
            before = when == "before"
            maxima(fp_block.get_parameter(f"{name}.weight") if before else bases[name].weight)
        for quantile, magnitude in maxima.curve():
            rows.add("magnitudes", layer, group.site.value, "weight", when, quantile, magnitude)


def column_errors(basis: LinearBasis) -> list[float]:
    """‖W − Ŵ‖/‖W‖ over at most `COLUMN_BINS` equal stretches of columns."""
    bins = min(COLUMN_BINS, basis.weight.shape[1])
    noise = (basis.weight - basis.stored).square().sum(0)
    pooled = [adaptive_avg_pool1d(v[None], bins)[0] for v in (noise, basis.weight.square().sum(0))]
    return [
        math.sqrt(error / size) if size > 0 else 0.0
        for error, size in zip(pooled[0].tolist(), pooled[1].tolist(), strict=True)
    ]


def _on_a_grid(linear: QuantizedLinear) -> bool:
    """Integers whose scale a row or group has for itself."""
    kind = linear.w_format
    return not kind.off and kind.kind == INTEGER and not kind.per_tensor


def ranges(linear: QuantizedLinear, basis: LinearBasis) -> Iterator[tuple[Cell, ...]]:
    """(grid, low, high, relative error) of a sample of rows.

    Low and high are means over rows (and groups) of the ends over the largest magnitude. "stored"
    is what the model has; "symmetric" and "asymmetric" are searched on the weight before rounding.
    """
    step = max(basis.weight.shape[0] // _SAMPLED_ROWS, 1)
    weight, stored = basis.weight[::step].double(), basis.stored[::step].double()
    size = linear.w_format.group
    task = WeightTask(name="", weight=weight, bits=linear.w_bits, group=size, clip=None)
    largest = ends_of(task).amax(0).clamp_min(1e-30)
    share = task.rows(stored)
    ends = torch.stack((share.amax(-1), -share.amin(-1)))
    yield ("stored", *_ends(ends, largest), _relative(stored, weight))
    for grid, symmetric in (("symmetric", True), ("asymmetric", False)):
        task = WeightTask(
            name="", weight=weight, bits=linear.w_bits, group=size, clip=None, symmetric=symmetric
        )
        found = fit_grid(task, _RANGES)
        values = found.values(found.codes(task.rows())).reshape(weight.shape).double()
        steps = 2 ** (task.bits - 1) - 1 if symmetric else 2**task.bits - 1
        down = torch.full_like(found.zero, steps) if symmetric else found.zero
        up = torch.full_like(found.zero, steps) if symmetric else steps - found.zero
        ends = torch.stack((up, down)) * found.scale
        yield (grid, *_ends(ends, largest), _relative(values, weight))


def _ends(ends: Tensor, largest: Tensor) -> tuple[float, float]:
    up, down = ends
    return -float((down / largest).mean()), float((up / largest).mean())


def _relative(values: Tensor, weight: Tensor) -> float:
    return float((values - weight).norm() / weight.norm().clamp_min(1e-30))


def _clips(where: str, owner: nn.Module, name: str) -> Iterator[tuple[Cell, ...]]:
    clip = getattr(owner, name, None)
    if isinstance(clip, Tensor):
        for side, ratio in zip(("max", "min"), clip.tolist(), strict=True):
            yield where, side, ratio


def conditions(owner: nn.Module) -> Iterator[tuple[str, float]]:
    """(factor, condition number) of an online transform, the whole one last."""
    if not isinstance(owner, InputQuantizer):
        return
    whole, left, right = 1.0, *factors_of(owner)
    for name, factor in (("left", left), ("right", right)):
        if factor is not None:
            value = float(torch.linalg.cond(factor))
            whole *= value
            yield name, value
    if left is not None or right is not None:
        yield "whole", whole
