"""Round to nearest with the contract's symmetric scale."""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.weights.base import QuantizedWeight, WeightTask


def weight_scale(task: WeightTask) -> Tensor:
    """Scale of every row or group, float32 [out] or [out, groups] (docs/numerics.md)."""
    rows = task.weight.to(torch.float32)
    clip = task.clip
    if task.group is not None:
        rows = rows.reshape(rows.shape[0], -1, task.group)
        clip = None if clip is None else clip.unsqueeze(-1)
    high, low = rows.amax(-1).clamp_min(0), (-rows.amin(-1)).clamp_min(0)
    if clip is not None:
        high, low = high * clip[0].float(), low * clip[1].float()
    scale = torch.maximum(high, low) / (2 ** (task.bits - 1) - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def round_to_nearest(task: WeightTask) -> QuantizedWeight:
    """Every weight to the nearest code."""
    scale = weight_scale(task)
    qmax = 2 ** (task.bits - 1) - 1
    wide = scale if scale.dim() == 2 else scale.unsqueeze(-1)
    rows = task.weight.to(torch.float32).reshape(*wide.shape, -1)
    codes = (rows / wide.unsqueeze(-1)).round().clamp(-qmax - 1, qmax)
    return QuantizedWeight(codes.to(torch.int8).reshape(task.weight.shape), scale)
