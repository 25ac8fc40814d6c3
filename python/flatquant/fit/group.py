"""What the linears of one group share while a block is fitted, and the norm in front of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.clips import Clip
from flatquant.fakequant import fake_quantize
from flatquant.fit.precision import transform_rows
from flatquant.models.spec import norm_epsilon
from flatquant.scheme import Scheme
from flatquant.transforms.base import FrozenTransform, Transform
from flatquant.transforms.scale import ChannelScale

IDENTITY = FrozenTransform()


class GroupFit(nn.Module):
    """Transform, scale and clip that the linears of one group share."""

    def __init__(self, transform: Transform | None, clip: Clip | None, scheme: Scheme) -> None:
        super().__init__()
        self.transform = transform
        self.scale: ChannelScale | None = None
        self.clip = clip
        self.scheme = scheme
        self.now = IDENTITY
        self.channel: Tensor | None = None

    def refresh(self) -> None:
        """Compute matrices and scale from the parameters."""
        self.now = IDENTITY if self.transform is None else self.transform.matrices()
        self.channel = None if self.scale is None else self.scale.scale()

    def activation(self, x: Tensor) -> Tensor:
        """Fake-quantized input of the group's linears, in the transformed basis."""
        if self.channel is not None:
            x = x * self.channel
        x = transform_rows(x, self.now)
        clip = None if self.clip is None else self.clip.ratios()
        return fake_quantize(x, self.scheme.a_bits, clip, symmetric=self.scheme.a_symmetric)


class NormFit(nn.Module):
    """RMSNorm followed by the group's fake-quantized transform."""

    weight: Tensor
    group: GroupFit

    def __init__(self, norm: nn.Module, group: GroupFit) -> None:
        super().__init__()
        self.eps = norm_epsilon(norm)
        self.group = group
        self.register_buffer("weight", norm.get_parameter("weight").detach().clone())

    def plain(self, x: Tensor) -> Tensor:
        """The norm alone."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        return self.group.activation(self.plain(x))
