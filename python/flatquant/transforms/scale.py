"""The learned per-channel scale c that precedes a transform (FlatQuant, section 3.2, PS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.recipe import ScaleConfig


class ChannelScale(nn.Module):
    """x → x·c, w → w/c. c is learned as log c unless `positive` is off."""

    def __init__(self, start: Tensor, *, positive: bool) -> None:
        super().__init__()
        self.positive = positive
        value = start.to(torch.float32)
        self.value = nn.Parameter(torch.log(value) if positive else value.clone())

    def scale(self) -> Tensor:
        """c, [channels]."""
        return torch.exp(self.value) if self.positive else self.value


def start_scale(
    config: ScaleConfig, weight_max: Tensor, weight_square: Tensor, x_max: Tensor, x_square: Tensor
) -> Tensor:
    """Start value of c, normalised to geometric mean 1 (a common factor changes nothing).

    Args:
        config: which formula.
        weight_max: [channels] largest |w| over the columns of the group's weights.
        weight_square: [channels] Σ_j w_j² over the group's rows.
        x_max: [channels] largest |x|.
        x_square: [channels] mean of x².
    """
    if config.start == "one":
        return torch.ones_like(x_max)
    if config.start == "smooth":
        ratio = weight_max.clamp_min(1e-5) ** (1 - config.alpha)
        c = ratio / x_max.clamp_min(1e-5) ** config.alpha
    else:
        c = (weight_square.clamp_min(1e-12) / x_square.clamp_min(1e-12)) ** 0.25
    c = c.clamp_min(1e-5)
    return c / torch.exp(torch.log(c).mean())
