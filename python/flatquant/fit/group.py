"""What the linears of one group share while a block is fitted, and the norm in front of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.clips import Clip
from flatquant.fakequant import simulate_around
from flatquant.fit.precision import transform_rows
from flatquant.models.spec import norm_epsilon
from flatquant.scheme import Scheme
from flatquant.transforms.base import FrozenTransform, Transform
from flatquant.transforms.scale import ChannelScale

IDENTITY = FrozenTransform()


class GroupFit(nn.Module):
    """Transform, scale and clip that the linears of one group share.

    `scaled` says that the input arrives multiplied by the scale already, because the linear
    that produces it holds c in its rows while the block is fitted. `span` is the range (max,
    −min) of a static input, known when the fit is over; until then every batch has its own.
    `seen`, where it is not None, collects that range (fit/spans.py). `kept` are the columns that
    stay in floating point (fit/columns.py).
    """

    def __init__(
        self,
        transform: Transform | None,
        clip: Clip | None,
        scheme: Scheme,
        *,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.transform = transform
        self.scale: ChannelScale | None = None
        self.clip = clip
        self.scheme = scheme
        self.now = IDENTITY
        self.channel: Tensor | None = None
        self.span: Tensor | None = None
        self.seen: Tensor | None = None
        self.kept: Tensor | None = None

    def refresh(self) -> None:
        """Compute matrices and scale from the parameters."""
        self.now = IDENTITY if self.transform is None else self.transform.matrices()
        self.channel = None if self.scale is None else self.scale.scale()

    def basis(self, x: Tensor, *, scaled: bool) -> Tensor:
        """x in the basis of the weights; `scaled`: it is multiplied by c already."""
        if self.channel is not None and not scaled:
            x = x * self.channel
        return transform_rows(x, self.now)

    def activation(self, x: Tensor) -> Tensor:
        """Fake-quantized input of the group's linears, in the transformed basis."""
        x = self.basis(x, scaled=self.scaled)
        if self.seen is not None:
            dense = x if self.kept is None else x.index_fill(-1, self.kept, 0.0)
            ends = torch.stack((dense.amax(), -dense.amin())).detach().float()
            self.seen = torch.maximum(self.seen, ends)
        clip = None if self.clip is None else self.clip.ratios()
        return simulate_around(x, self.kept, self.scheme.activations, clip, self.span)


class NormFit(nn.Module):
    """RMSNorm followed by the group's fake-quantized transform; `learned` frees its weight."""

    weight: Tensor
    group: GroupFit

    def __init__(self, norm: nn.Module, group: GroupFit, *, learned: bool = False) -> None:
        super().__init__()
        self.eps = norm_epsilon(norm)
        self.group = group
        weight = norm.get_parameter("weight").detach().clone()
        if learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def plain(self, x: Tensor) -> Tensor:
        """The norm alone."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        return self.group.activation(self.plain(x))
