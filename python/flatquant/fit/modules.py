"""A decoder block in learnable form: what is swapped into the model while a block is fitted.

Everything that one forward pass shares (matrices, fake-quantized weights) is computed once in
`BlockFit.refresh` and read by the modules that stand in for norms, linears and attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, nn

from flatquant.capture import InputStatistics
from flatquant.clips import Clip, make_clip
from flatquant.fit.group import GroupFit, NormFit
from flatquant.fit.heads import HeadsFit
from flatquant.fit.linear import LinearFit
from flatquant.models.spec import FamilySpec, Geometry, Group, Site
from flatquant.plan import QuantizationPlan
from flatquant.recipe import Recipe
from flatquant.transforms import TRANSFORMS
from flatquant.transforms.base import Transform
from flatquant.transforms.scale import ChannelScale, start_scale


@dataclass(frozen=True, kw_only=True)
class FitContext:
    """What every block of a run has in common."""

    recipe: Recipe
    plan: QuantizationPlan
    family: FamilySpec
    geometry: Geometry
    amp: bool


class BlockFit(nn.Module):
    """All learnable parts of one decoder block."""

    def __init__(
        self, block: nn.Module, name: str, context: FitContext, generator: Generator
    ) -> None:
        super().__init__()
        self.name = name
        self.context = context
        recipe, plan, family = context.recipe, context.plan, context.family
        self.groups: dict[str, GroupFit] = {}
        self.linears: dict[str, LinearFit] = {}
        self.norms: dict[str, NormFit] = {}
        clips = recipe.clips
        for group in family.groups:
            if not plan.quantizes_group(name, group):
                continue
            clip = make_clip(clips.activations) if recipe.scheme.quantizes_activations else None
            shared = GroupFit(self._transform(group.site, generator), clip, recipe.scheme)
            self.groups[group.site.value] = shared
            self._add_group(block, group, shared)
        self.heads: HeadsFit | None = None
        if recipe.scheme.quantizes_cache or Site.QK_HEAD in plan.sites:
            self.heads = HeadsFit(
                self._transform(Site.QK_HEAD, generator),
                recipe.scheme,
                clips,
                amp=context.amp,
            )
        self.values = self._transform(Site.V_HEAD, generator)
        if self.values is not None and family.value not in self.linears:
            self._add_merged_only(block)
        # what is learned; the dictionaries above are for finding it
        self.learned = nn.ModuleList(self.groups.values())
        self.learned.extend(fit.clip for fit in self.linears.values() if fit.clip is not None)

    def _transform(self, site: Site, generator: Generator) -> Transform | None:
        context = self.context
        if not context.plan.has(site, self.name, context.family):
            return None
        kind = context.recipe.transforms[site]
        return TRANSFORMS[kind](site, context.geometry, generator)

    def _add_group(self, block: nn.Module, group: Group, shared: GroupFit) -> None:
        for linear_name in group.linears:
            module = block.get_submodule(linear_name)
            if not isinstance(module, nn.Linear):
                raise TypeError(
                    f"{self.name}.{linear_name} is a {type(module).__name__}, not nn.Linear"
                )
            self.linears[linear_name] = LinearFit(
                module,
                shared,
                online=group.norm is None,
                clip=self.context.recipe.clips.weights,
                amp=self.context.amp,
            )
        if group.norm is not None:
            self.norms[group.norm] = NormFit(block.get_submodule(group.norm), shared)

    def _add_merged_only(self, block: nn.Module) -> None:
        """KV-only schemes: v_proj and o_proj stay linears, but P_v is merged into them."""
        family = self.context.family
        neutral = GroupFit(None, None, self.context.recipe.scheme)
        for name in (family.value, *family.group(Site.ATTN_OUT).linears):
            module = block.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise TypeError(f"{self.name}.{name} is a {type(module).__name__}, not nn.Linear")
            self.linears[name] = LinearFit(module, neutral, online=False, amp=self.context.amp)

    def start_scales(self, statistics: Mapping[Site, InputStatistics]) -> None:
        """Create the per-channel scales, started from statistics of the groups' inputs."""
        for site, config in self.context.recipe.scales.items():
            if site.value not in self.groups:
                continue
            group = self.context.family.group(site)
            weights = torch.cat([self.linears[n].weight.float() for n in group.linears])
            seen = statistics[site]
            start = start_scale(
                config,
                weight_max=weights.abs().amax(0),
                weight_square=weights.square().sum(0),
                x_max=seen.largest,
                x_square=seen.mean_square,
            )
            shared = self.groups[site.value]
            shared.scale = ChannelScale(start, positive=config.positive)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Learnable parameters by kind: "transforms", "scales" and "clips"."""
        kinds: dict[str, list[nn.Parameter]] = {"transforms": [], "scales": [], "clips": []}
        owner = {
            id(parameter): kind
            for module in self.modules()
            for kind, owned in (("scales", ChannelScale), ("clips", Clip))
            if isinstance(module, owned)
            for parameter in module.parameters()
        }
        for parameter in self.parameters():
            kinds[owner.get(id(parameter), "transforms")].append(parameter)
        return kinds

    def refresh(self) -> None:
        """Recompute everything the forward pass shares."""
        family = self.context.family
        for group in self.groups.values():
            group.refresh()
        if self.heads is not None:
            self.heads.refresh()
        values = None if self.values is None else self.values.matrices()
        for name, fit in self.linears.items():
            if name == family.value:
                fit.output = values
            elif name in family.group(Site.ATTN_OUT).linears:
                fit.input_right = values
            fit.refresh()

    def replacements(self) -> dict[str, nn.Module]:
        """Module name -> stand-in, for `surgery.swapped`."""
        return {**self.linears, **self.norms}
