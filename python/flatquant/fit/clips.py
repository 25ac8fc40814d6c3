"""Where learned clips and roundings of weights start: often at the end of a clip search."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner, watching
from flatquant.fit.modules import BlockFit
from flatquant.fit.rounding import SoftRounding
from flatquant.models.spec import Group
from flatquant.transforms.base import FrozenTransform
from flatquant.weights import HessianCollector
from flatquant.weights.search import ends_of


@torch.no_grad()
def start_clips(block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor) -> None:
    """Put clips of weights where the recipe's search ends, and make learned roundings.

    The weights are those of the transforms and scales as they are now, the inputs those of the
    floating-point block in the same basis.

    Args:
        block: the FP block; unchanged.
        fit: its learnable parts.
        run: calls the block.
        hidden: [samples, tokens, hidden].
    """
    recipe = fit.context.recipe
    progressive, search = recipe.progressive, recipe.clips.weight_search
    if progressive is not None:
        search = progressive.clip
    elif search is None:
        return
    fit.refresh()
    for group in fit.context.family.groups:
        linears = [name for name in group.linears if name in fit.linears]
        linears = [name for name in linears if fit.linears[name].scheme.quantizes_weights]
        if not linears:
            continue
        asks = search is not None and search.needs_hessian
        hessian = _hessian(block, fit, run, hidden, group) if asks else None
        for name in linears:
            linear = fit.linears[name]
            weight = linear.transformed()[0].double()
            if linear.group.kept is not None:
                weight = weight.index_fill(1, linear.group.kept, 0.0)
            task = replace(fit.weight_task(name, weight, clipped=False), hessian=hessian)
            if progressive is not None:
                with torch.enable_grad():
                    linear.rounding = SoftRounding(task, progressive)
                fit.learned.append(linear.rounding)
                continue
            assert search is not None
            share = search.find(task) / ends_of(task).clamp_min(torch.finfo(torch.float32).tiny)
            if linear.clip is not None:
                linear.clip.narrow(share.clamp(0.0, 1.0).reshape(2, -1))


def _hessian(
    block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor, group: Group
) -> Tensor:
    """Σ xᵀx of the group's FP inputs in the basis of its weights, float64."""
    collector, shared = HessianCollector(), fit.groups[group.site.value]
    values = fit.linears[group.linears[0]].input_right

    def see(x: Tensor) -> None:
        x = shared.basis(x, scaled=False)
        collector(x if values is None else FrozenTransform(right=values.right).apply(x))

    with watching(block, {group.linears[0]: see}):
        for part in hidden.split(1):
            run(block, part)
    if collector.hessian is None:
        raise RuntimeError(f"{fit.name}.{group.linears[0]}: no input was seen")
    return collector.hessian
