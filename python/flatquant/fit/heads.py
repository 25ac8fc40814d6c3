"""Queries, keys and values while a block is fitted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.clips import Clips, make_clip
from flatquant.fakequant import simulate
from flatquant.fit.group import IDENTITY
from flatquant.scheme import Scheme
from flatquant.transforms.base import Transform
from flatquant.transforms.scale import KeyScale


class HeadsFit(nn.Module):
    """Fake-quantized keys and values, and the scale and the basis of queries and keys."""

    def __init__(
        self,
        transform: Transform | None,
        scheme: Scheme,
        clips: Clips,
        *,
        amp: bool,
        scale: KeyScale | None = None,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.scale = scale
        self.scheme = scheme
        self.amp = amp
        self.k_clip = make_clip(clips.keys) if scheme.k_bits < 16 else None
        self.v_clip = make_clip(clips.values) if scheme.v_bits < 16 else None
        self.now = IDENTITY
        self.channel: Tensor | None = None

    def refresh(self) -> None:
        """Compute the matrices and the scale."""
        self.now = IDENTITY if self.transform is None else self.transform.matrices()
        self.channel = None if self.scale is None else self.scale.scale()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: [batch, heads, tokens, head_dim] after RoPE; same shapes out."""
        if self.channel is not None:
            readers = q.shape[1] // self.channel.shape[0]
            q = q / self.channel.repeat_interleave(readers, dim=0).unsqueeze(1)
            k = k * self.channel.unsqueeze(1)
        q, k = self.now.apply_inverse_t(q), self.now.apply(k)
        clips = [None if c is None else c.ratios() for c in (self.k_clip, self.v_clip)]
        k = simulate(k, self.scheme.keys, clips[0])
        v = simulate(v, self.scheme.values, clips[1])
        if self.amp and q.dtype == torch.float32:
            return q.bfloat16(), k.bfloat16(), v.bfloat16()
        return q, k, v
