"""Which columns a block keeps: statistics of its inputs in, indices out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner, StatisticsCollector, watching
from flatquant.fakequant import simulate
from flatquant.fit.modules import BlockFit
from flatquant.models.spec import LINEAR_SITES, Site


@torch.no_grad()
def choose_columns(block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor) -> None:
    """Set `GroupFit.kept` from the floating-point inputs of the groups, if the recipe says so.

    Args:
        block: the FP block.
        fit: its learnable parts.
        run: calls the block.
        hidden: [samples, tokens, hidden].
    """
    outliers, family = fit.context.recipe.outliers, fit.context.family
    sites = [site for site in LINEAR_SITES if site.value in fit.groups]
    if outliers is None or not sites:
        return
    seen = {site: StatisticsCollector() for site in sites}
    with watching(block, {family.group(site).linears[0]: seen[site] for site in sites}):
        for part in hidden.split(1):
            run(block, part)
    for site in sites:
        inputs = seen[site].result()
        kept = outliers.columns(inputs.largest, inputs.mean_square, _weight_error(fit, site))
        fit.groups[site.value].kept = kept if len(kept) else None


def _weight_error(fit: BlockFit, site: Site) -> Tensor:
    """Σ (w − ŵ)² by input channel, ŵ rounded to nearest, over all linears of a group."""
    linears = [fit.linears[name] for name in fit.context.family.group(site).linears]
    errors = [
        (linear.weight - simulate(linear.weight, linear.scheme.weights)).square().sum(0)
        for linear in linears
    ]
    return torch.stack(errors).sum(0)
