"""Per-channel scales: c in front of a transform (FlatQuant, section 3.2, PS), and that of keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.recipe import ScaleConfig


class ChannelScale(nn.Module):
    """x → x·c, w → w/c. c is learned as log c unless `positive` is off.

    Args:
        start: c [channels], positive.
        positive: hold log c.
        learned: False: a buffer that no optimiser sees.
        readers: heads of `head_dim` channels that read one produced head (grouped-query
            attention); they share one c, which starts at the geometric mean of theirs.
        head_dim: channels of a head; only read with `readers`.
    """

    value: Tensor

    def __init__(
        self,
        start: Tensor,
        *,
        positive: bool,
        learned: bool = True,
        readers: int = 1,
        head_dim: int = 1,
    ) -> None:
        super().__init__()
        self.positive, self.readers, self.head_dim = positive, readers, head_dim
        value = start.to(torch.float32)
        if readers > 1:
            value = torch.log(value).reshape(-1, readers, head_dim).mean(1).exp().reshape(-1)
        value = torch.log(value) if positive else value.clone()
        if learned:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def produced(self) -> Tensor:
        """c over the outputs of what produces the input, [channels / readers]."""
        return torch.exp(self.value) if self.positive else self.value

    def scale(self) -> Tensor:
        """c over the input, [channels]."""
        produced = self.produced()
        if self.readers == 1:
            return produced
        heads = produced.reshape(-1, 1, self.head_dim)
        return heads.expand(-1, self.readers, -1).reshape(-1)


class KeyScale(nn.Module):
    """k → k·s, q → q/s after RoPE, which turns channels i and i + d/2 together: both share s.

    So s commutes with RoPE and belongs in what comes before it, the rows of W_k and W_q or the
    weights of a norm on keys and queries (OmniQuant, arXiv 2308.13137, equation 5).

    Args:
        heads: key-value heads, each with its own s; 1 where one s serves them all.
        head_dim: even number of channels.
        learned: False: s stays 1.
    """

    value: Tensor

    def __init__(self, heads: int, head_dim: int, *, learned: bool = True) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"KeyScale: head_dim={head_dim} must be even, RoPE turns pairs")
        value = torch.zeros(heads, head_dim // 2)
        if learned:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def scale(self) -> Tensor:
        """s, [heads, head_dim]."""
        return torch.exp(torch.cat((self.value, self.value), dim=-1))


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
