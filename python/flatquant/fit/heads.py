"""Queries, keys and values while a block is fitted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.clips import Clips, make_clip
from flatquant.fakequant import fake_quantize
from flatquant.fit.group import IDENTITY
from flatquant.scheme import Scheme
from flatquant.transforms.base import Transform


class HeadsFit(nn.Module):
    """Fake-quantized keys and values, and the basis of queries and keys."""

    def __init__(
        self, transform: Transform | None, scheme: Scheme, clips: Clips, *, amp: bool
    ) -> None:
        super().__init__()
        self.transform = transform
        self.scheme = scheme
        self.amp = amp
        self.k_clip = make_clip(clips.keys) if scheme.k_bits < 16 else None
        self.v_clip = make_clip(clips.values) if scheme.v_bits < 16 else None
        self.now = IDENTITY

    def refresh(self) -> None:
        """Compute the matrices."""
        self.now = IDENTITY if self.transform is None else self.transform.matrices()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: [batch, heads, tokens, head_dim] after RoPE; same shapes out."""
        q, k = self.now.apply_inverse_t(q), self.now.apply(k)
        clips = [None if c is None else c.ratios() for c in (self.k_clip, self.v_clip)]
        k = fake_quantize(k, self.scheme.k_bits, clips[0], symmetric=False)
        v = fake_quantize(v, self.scheme.v_bits, clips[1], symmetric=False)
        if self.amp and q.dtype == torch.float32:
            return q.bfloat16(), k.bfloat16(), v.bfloat16()
        return q, k, v
