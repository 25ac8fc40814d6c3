"""Where per-channel scales start: a formula of statistics, or a search over a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flatquant.capture import (
    BlockRunner,
    Call,
    InputStatistics,
    StatisticsCollector,
    recording,
    watching,
)
from flatquant.fit.group import GroupFit
from flatquant.fit.linear import LinearFit
from flatquant.fit.modules import BlockFit
from flatquant.models.spec import Group, Site
from flatquant.scales import ChannelStatistics, ScaleConfig, ScaleSearch
from flatquant.surgery import swapped
from flatquant.transforms.scale import ChannelScale, start_scale


@torch.no_grad()
def set_scales(block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor) -> list[str]:
    """Give every site of the recipe its scale, from the floating-point inputs of its linears.

    Args:
        block: the FP block; unchanged.
        fit: its learnable parts; their groups get a `scale`.
        run: calls the block.
        hidden: [samples, tokens, hidden].

    Returns:
        One sentence for every search, and for every site that cannot have a scale.

    Raises:
        ValueError: a shift that no bias can take up.
    """
    notes, sites = [], {}
    for site, config in fit.context.recipe.scales.items():
        if site.value not in fit.groups:
            continue
        obstacle = _obstacle(fit, site, config)
        if obstacle is None:
            if config.shift:
                _check_shift(block, fit, site)
            sites[site] = config
        else:
            notes.append(f"{fit.name}: no scale at {site.value}: {obstacle}")
    if not sites:
        return notes
    seen = _statistics(block, fit, run, hidden, list(sites))
    for site, config in sites.items():
        if config.search is None:
            start = _start(config, seen[site])
        else:
            start, note = _search(block, fit, run, hidden, site, config.search, seen[site])
            notes.append(f"{fit.name}: {site.value}: {note}")
        fit.groups[site.value].scale = ChannelScale(
            start,
            positive=config.positive,
            learned=config.learned,
            readers=_readers(fit, site),
            head_dim=fit.context.geometry.head_dim,
        )
    return notes


def _start(config: ScaleConfig, seen: ChannelStatistics) -> Tensor:
    return start_scale(
        config,
        weight_max=seen.w_max,
        weight_square=seen.w_square,
        x_max=seen.x_max,
        x_square=seen.x_square,
    )


def _obstacle(fit: BlockFit, site: Site, config: ScaleConfig) -> str | None:
    """Why nothing can take up a scale of the input at a site, or None."""
    group = fit.context.family.group(site)
    if group.norm is not None:
        return None
    if group.scaled_by not in fit.linears:
        return f"{group.scaled_by} is left alone"
    geometry = fit.context.geometry
    if config.search is not None and _readers(fit, site) > 1:  # AWQ's code has this rule
        return (
            f"{geometry.heads} heads read the values of {geometry.kv_heads} key-value heads, and "
            "a search wants each channel for itself"
        )
    return None


def _readers(fit: BlockFit, site: Site) -> int:
    """Input channels that one channel of the producer serves (grouped-query attention)."""
    geometry = fit.context.geometry
    return geometry.heads // geometry.kv_heads if fit.groups[site.value].scaled else 1


def _check_shift(block: nn.Module, fit: BlockFit, site: Site) -> None:
    """Refuse a shift: OS+ puts it into the bias of the norm, and an RMSNorm has none."""
    norm = fit.context.family.group(site).norm
    if norm is None:
        raise ValueError(f"{fit.name}: a shift at {site.value}: no norm makes this input")
    if getattr(block.get_submodule(norm), "bias", None) is None:
        kind = type(block.get_submodule(norm)).__name__
        raise ValueError(
            f"{fit.name}: a shift at {site.value} needs a bias of {norm}, and {kind} has none: "
            "nothing can add the constant that the linears behind it take off again"
        )
    raise ValueError(f"{fit.name}: a shift at {site.value}: norms with a bias are not supported")


def _statistics(
    block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor, sites: list[Site]
) -> dict[Site, ChannelStatistics]:
    """Statistics of the FP inputs of sites, and of the weights that read them."""
    groups = {site: fit.context.family.group(site) for site in sites}
    collectors = {site: StatisticsCollector() for site in sites}
    with watching(block, {groups[site].linears[0]: collectors[site] for site in sites}):
        for part in hidden.split(1):
            run(block, part)
    return {
        site: _with_weights(collectors[site].result(), fit, group) for site, group in groups.items()
    }


def _with_weights(inputs: InputStatistics, fit: BlockFit, group: Group) -> ChannelStatistics:
    weights = torch.cat([fit.linears[name].weight.float() for name in group.linears])
    return ChannelStatistics(
        x_max=inputs.largest,
        x_mean=inputs.mean_size,
        x_square=inputs.mean_square,
        w_max=weights.abs().amax(0),
        w_square=weights.square().sum(0),
    )


def _search(
    block: nn.Module,
    fit: BlockFit,
    run: BlockRunner,
    hidden: Tensor,
    site: Site,
    search: ScaleSearch,
    seen: ChannelStatistics,
) -> tuple[Tensor, str]:
    """The candidate with the least error, and what there is to say about it."""
    group, shared = fit.context.family.group(site), fit.groups[site.value]
    where = _meeting_place(fit, group)
    with recording(block, (where,)) as calls:
        for part in hidden[: math.ceil(search.tokens / hidden.shape[1])].split(1):
            run(block, part)
    linears = {name: fit.linears[name] for name in group.linears}
    errors, best, winner, label = [], math.inf, None, ""
    with swapped(block, dict(linears)), _alone(shared, list(linears.values())):
        for text, c in search.candidates(seen):
            shared.scale = ChannelScale(c, positive=True, learned=False)
            shared.refresh()
            for linear in linears.values():
                linear.refresh()
            errors.append(_error(block.get_submodule(where), calls[where]))
            if winner is None or errors[-1] < best:
                best, winner, label = errors[-1], c, text
    assert winner is not None  # the first candidate is always there
    share = best / errors[0] if errors[0] > 0 else 1.0
    return winner, f"{label}, with {share:.3f} of the output error without a scale"


def _meeting_place(fit: BlockFit, group: Group) -> str:
    """The smallest module in which the outputs of all linears of a group come together."""
    if len(group.linears) == 1:
        return group.linears[0]
    family = fit.context.family
    inside = all(name.startswith(family.attention + ".") for name in group.linears)
    return family.attention if inside else family.mlp


@contextmanager
def _alone(shared: GroupFit, linears: list[LinearFit]) -> Iterator[None]:
    """Linears that scale and quantize their own input, whoever does it later, in float32.

    Clips that are yet to be learned are off: a search is for the whole range of the weights.
    """
    scaled, before = shared.scaled, [(fit.online, fit.amp, fit.clip) for fit in linears]
    shared.scaled = False
    for linear in linears:
        linear.online, linear.amp, linear.clip = True, False, None
    try:
        yield
    finally:
        shared.scaled = scaled
        for linear, (online, amp, clip) in zip(linears, before, strict=True):
            linear.online, linear.amp, linear.clip = online, amp, clip


def _error(module: nn.Module, calls: list[Call]) -> float:
    """Mean squared difference between what the module gives now and what it gave."""
    errors = [
        (call.repeat(module).to(call.output.dtype) - call.output).square().mean() for call in calls
    ]
    return float(torch.stack(errors).double().mean())
