"""Ranges of inputs whose quantizer is static: found once, when nothing else changes any more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner
from flatquant.fit.block import forward_fit
from flatquant.fit.modules import BlockFit


@torch.no_grad()
def find_spans(block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor) -> None:
    """Set `GroupFit.span` of static inputs to the extremes that the calibration text reaches.

    One pass, with everything before an input quantized; static inputs themselves by the range
    of the sample at hand.

    Args:
        block: the FP block.
        fit: its fitted parts.
        run: calls the block.
        hidden: [samples, tokens, hidden].
    """
    groups = [group for group in fit.groups.values() if group.scheme.activations.static]
    if not groups:
        return
    for group in groups:
        group.span, group.seen = None, torch.zeros(2, device=hidden.device)
    for part in hidden.split(1):
        forward_fit(block, fit, run, part, fit.context.family.attention)
    for group in groups:
        group.span, group.seen = group.seen, None
