"""Second moments of what the linears of a fitted block read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner, watching
from flatquant.fit.block import forward_fit
from flatquant.fit.modules import BlockFit
from flatquant.weights import HessianCollector


def hessians(
    block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor
) -> Callable[[str], Tensor]:
    """Source of Hessians for `merge_block`: name of a linear -> Σ xᵀx of its quantized inputs.

    They come in the order of the forward pass, when the weights of earlier groups are rounded.

    Args:
        block: the FP block.
        fit: its fitted parts.
        run: calls the block.
        hidden: [samples, tokens, hidden].
    """
    family = fit.context.family
    cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def hessian_of(name: str) -> Tensor:
        group = next(g for g in family.groups if name in g.linears)
        if group.site.value not in cache:
            collector = HessianCollector()
            linear = fit.linears[group.linears[0]]
            shared = linear.group

            def see(x: Tensor) -> None:
                x = x.to(linear.weight.dtype)
                collector(shared.activation(x) if linear.online else x)

            # the stand-in is in the block only during the forward pass, so it is watched itself
            with watching(nn.ModuleDict({"linear": linear}), {"linear": see}):
                for part in hidden.split(fit.context.recipe.fit.batch_size):
                    forward_fit(block, fit, run, part, family.attention)
            if collector.hessian is None:
                raise RuntimeError(f"{name}: no input was seen")
            cache.clear()  # groups come one after the other: one K² at a time
            cache[group.site.value] = collector.hessian
        return cache[group.site.value]

    return hessian_of
