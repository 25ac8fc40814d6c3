"""A decoder block in learnable form: what is swapped into the model while a block is fitted.

Everything that one forward pass shares (matrices, fake-quantized weights) is computed once in
`BlockFit.refresh` and read by the modules that stand in for norms, linears and attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Generator, Tensor, nn

from flatquant.clips import Clip, make_clip
from flatquant.fit.group import GroupFit, NormFit
from flatquant.fit.heads import HeadsFit
from flatquant.fit.linear import LinearFit
from flatquant.fit.rounding import SoftRounding
from flatquant.models.spec import FamilySpec, Geometry, Group, Site
from flatquant.plan import QuantizationPlan
from flatquant.recipe import Recipe
from flatquant.scheme import Scheme
from flatquant.transforms import TRANSFORMS
from flatquant.transforms.base import Transform
from flatquant.transforms.matrices import InvertibleMatrix
from flatquant.transforms.scale import ChannelScale, KeyScale
from flatquant.weights import WeightTask

BEFORE_ROUNDING = ("transforms", "scales", "clips", "roundings")
"""Kinds of parameters that are fitted while weights are only fake-quantized."""

AFTER_ROUNDING = ("norms",)
"""Kinds that are fitted to weights as they have been rounded."""

_OWNERS = (
    ("scales", (ChannelScale, KeyScale)),
    ("clips", (Clip,)),
    ("roundings", (SoftRounding,)),
    ("norms", (NormFit,)),
)


@dataclass(frozen=True, kw_only=True)
class FitContext:
    """What every block of a run has in common.

    `given` holds transforms that are known before a block is fitted, by block name and site.
    """

    recipe: Recipe
    plan: QuantizationPlan
    family: FamilySpec
    geometry: Geometry
    amp: bool
    given: Mapping[tuple[str, Site], Transform] = field(default_factory=dict)


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
            local = plan.input_scheme(name, group)
            clip = make_clip(clips.activations) if local.quantizes_activations else None
            shared = GroupFit(
                self._transform(group.site, generator),
                clip,
                local,
                scaled=group.scaled_by == family.value,
            )
            self.groups[group.site.value] = shared
            self._add_group(block, group, shared)
        self.heads: HeadsFit | None = None
        cache = plan.scheme_of(f"{name}.{family.attention}")
        if cache.quantizes_cache or Site.QK_HEAD in plan.sites:
            self.heads = HeadsFit(
                self._transform(Site.QK_HEAD, generator),
                cache,
                clips,
                amp=context.amp,
                scale=self._key_scale(),
            )
        self.head_norms = {
            norm: block.get_parameter(f"{norm}.weight").detach().double()
            for norm in (family.query_norm, family.key_norm)
            if norm is not None
        }
        self.values = self._transform(Site.V_HEAD, generator)
        outputs = family.group(Site.ATTN_OUT).linears
        if self.values is not None and family.value not in self.linears:
            self._add_merged_only(block, (family.value, *outputs))
        if self.key_scale is not None and family.key_norm is None:
            self._add_merged_only(block, (family.query, family.key))
        if self.heads is not None and not set(outputs) <= set(self.linears):
            self.heads.amp = False  # a plain linear takes no bfloat16 from the attention
        if recipe.rounding.prunes:
            names = [name for group in family.groups for name in group.linears]
            kept = tuple(n for n in names if not plan.ignores(f"{self.name}.{n}"))
            self._add_merged_only(block, kept)
        # what is learned; the dictionaries above are for finding it
        self.learned = nn.ModuleList(self.groups.values())
        self.learned.extend(fit.clip for fit in self.linears.values() if fit.clip is not None)
        self.learned.extend(self.norms.values())

    def _transform(self, site: Site, generator: Generator) -> Transform | None:
        context = self.context
        if not context.plan.has(site, self.name, context.family):
            return None
        if (self.name, site) in context.given:
            return context.given[self.name, site]
        kind = context.recipe.transforms[site]
        return TRANSFORMS[kind](site, context.geometry, generator)

    @property
    def key_scale(self) -> KeyScale | None:
        """The scale of keys, if there is one."""
        return None if self.heads is None else self.heads.scale

    def _key_scale(self) -> KeyScale | None:
        context, family = self.context, self.context.family
        alone = any(context.plan.ignores(f"{self.name}.{n}") for n in (family.query, family.key))
        if Site.QK_HEAD not in context.recipe.scales or alone:
            return None
        heads = context.geometry.kv_heads if family.key_norm is None else 1
        return KeyScale(heads, context.geometry.head_dim)

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
                early_clip=self.context.recipe.clips.early_weights,
                amp=self.context.amp,
                scheme=self.context.plan.scheme_of(f"{self.name}.{linear_name}"),
            )
        if group.norm is not None:
            self.norms[group.norm] = NormFit(
                block.get_submodule(group.norm), shared, learned=self.context.recipe.tweak_norms
            )

    def _add_merged_only(self, block: nn.Module, names: tuple[str, ...]) -> None:
        """These stay linears, but P_v or a scale is merged into them, or some weights are 0."""
        neutral = GroupFit(None, None, Scheme())
        for name in names:
            if name in self.linears:
                continue
            module = block.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise TypeError(f"{self.name}.{name} is a {type(module).__name__}, not nn.Linear")
            self.linears[name] = LinearFit(module, neutral, online=False, amp=self.context.amp)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Learnable parameters by kind, in the order of `BEFORE_ROUNDING`, `AFTER_ROUNDING`."""
        kinds: dict[str, list[nn.Parameter]] = {
            kind: [] for kind in BEFORE_ROUNDING + AFTER_ROUNDING
        }
        owner = {
            id(parameter): kind
            for module in self.modules()
            for kind, owned in _OWNERS
            if isinstance(module, owned)
            for parameter in module.parameters(recurse=False)
        }
        for parameter in self.parameters():
            kinds[owner.get(id(parameter), "transforms")].append(parameter)
        return kinds

    def weight_task(self, name: str, weight: Tensor, *, clipped: bool = True) -> WeightTask:
        """The rounding of a linear's merged weight [out, in], without a Hessian.

        `clipped`: with the clip ratios as they are now.
        """
        linear, family = self.linears[name], self.context.family
        scheme, clip = linear.scheme, linear.late_clip() if clipped else None
        return WeightTask(
            name=f"{self.name}.{name}",
            weight=weight,
            bits=scheme.w_bits,
            group=scheme.weights.block,
            clip=None if clip is None else clip.detach().reshape(2, len(weight), -1),
            symmetric=scheme.w_symmetric,
            makes_scores=name in (family.query, family.key),
            kind=scheme.w_format,
            per_tensor=scheme.weights.per_tensor,
        )

    def advance(self, progress: float) -> None:
        """Tell what changes with the epochs how far the fit is, 0 in the first, 1 in the last."""
        for module in self.modules():
            if isinstance(module, InvertibleMatrix | SoftRounding):
                module.advance(progress)

    def refresh(self) -> None:
        """Recompute everything the forward pass shares."""
        family = self.context.family
        for group in self.groups.values():
            group.refresh()
        if self.heads is not None:
            self.heads.refresh()
        values = None if self.values is None else self.values.matrices()
        produced = self.value_rows()
        for name, fit in self.linears.items():
            if name == family.value:
                fit.output, fit.rows = values, produced
            elif name in family.group(Site.ATTN_OUT).linears:
                fit.input_right = values
            fit.refresh()

    def value_rows(self) -> Tensor | None:
        """c of the attention's output, which the rows of v_proj absorb, [kv_heads·head_dim]."""
        group = self.groups.get(Site.ATTN_OUT.value)
        if group is None or group.scale is None or not group.scaled:
            return None
        return group.scale.produced()

    def replacements(self) -> dict[str, nn.Module]:
        """Module name -> stand-in, for `surgery.swapped`."""
        return {**self.linears, **self.norms}
