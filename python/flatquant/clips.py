"""Clip ratios: how much of the range of a row the grid covers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatquant.weights.search import ClipSearch


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A pair of clip ratios that is learned.

    Attributes:
        start: logit that both ratios start from; 4.0 (ratio 0.982) is FlatQuant's.
        search: of weights: start where this search ends, if that is below `start`.
    """

    start: float = 4.0
    search: ClipSearch | None = None


ClipSetting = float | Learned
"""A fixed ratio in (0, 1], where 1 is no clip, or `Learned()`."""


_CLIPPED = ("weights", "activations", "keys", "values")


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Which clip ratios a method sets, and which it learns.

    Attributes:
        weights: one pair per output channel, or per group of each.
        activations: one pair per input that linears share.
        keys: one pair per layer.
        values: one pair per layer.
        early_weights: clamp weights before the transforms instead of narrowing the grid of the
            transformed ones, which is where outliers are gone (FlatQuant's ablation of the
            place). Inputs, keys and values are clipped by the ops, always after.

    Raises:
        ValueError: a ratio outside (0, 1].
    """

    weights: ClipSetting = 1.0
    activations: ClipSetting = 1.0
    keys: ClipSetting = 1.0
    values: ClipSetting = 1.0
    early_weights: bool = False

    def __post_init__(self) -> None:
        for name in _CLIPPED:
            setting = getattr(self, name)
            if not isinstance(setting, Learned) and not 0.0 < setting <= 1.0:
                raise ValueError(f"Clips: {name}={setting} must lie in (0, 1], or be Learned()")

    @property
    def any_learned(self) -> bool:
        """Whether there is anything to fit."""
        return any(isinstance(getattr(self, name), Learned) for name in _CLIPPED)

    @property
    def weight_search(self) -> ClipSearch | None:
        """The search that finds where the clips of weights start, if there is one."""
        return self.weights.search if isinstance(self.weights, Learned) else None


UNCLIPPED = Clips()

LEARNED_CLIPS = Clips(weights=Learned(), activations=Learned(), keys=Learned(), values=Learned())
"""All of them learned (FlatQuant, section 3.2, LCT)."""


def clamped(weight: Tensor, ratios: Tensor) -> Tensor:
    """Rows [out, in] cut off at ratios (max, min) [2, out] of their largest and smallest value."""
    highest = ratios[0].to(weight.dtype) * weight.amax(1).clamp_min(0)
    lowest = ratios[1].to(weight.dtype) * weight.amin(1).clamp_max(0)
    return torch.minimum(torch.maximum(weight, lowest[:, None]), highest[:, None])


class Clip(nn.Module):
    """Two ratios in (0, 1], for the maximum and the minimum, as sigmoids of logits.

    One pair per activation site, or one per weight row. The logits are parameters where they
    are learned and a buffer where they are fixed.
    """

    logits: Tensor

    def __init__(self, setting: ClipSetting, rows: int | None = None) -> None:
        super().__init__()
        shape = (2,) if rows is None else (2, rows)
        if isinstance(setting, Learned):
            self.logits = nn.Parameter(torch.full(shape, setting.start))
        else:
            logit = math.log(setting) - math.log1p(-setting) if setting < 1.0 else math.inf
            self.register_buffer("logits", torch.full(shape, logit))

    def ratios(self) -> Tensor:
        """[2] or [2, rows]: (max, min)."""
        return torch.sigmoid(self.logits)

    @torch.no_grad()
    def narrow(self, ratios: Tensor) -> None:
        """Start from these ratios, of the shape of `ratios()`, where they are the narrower."""
        self.logits.copy_(torch.minimum(self.logits, torch.logit(ratios.to(self.logits))))


def make_clip(setting: ClipSetting, rows: int | None = None) -> Clip | None:
    """The clip of a setting; None where it would change nothing."""
    return None if setting == 1.0 else Clip(setting, rows)
