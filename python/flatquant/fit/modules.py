"""A decoder block in learnable form: what is swapped into the model while a block is fitted.

Everything that one forward pass shares (matrices, fake-quantized weights) is computed once in
`BlockFit.refresh` and read by the modules that stand in for norms, linears and attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from flatquant.capture import InputStatistics
from flatquant.clips import LearnedClip
from flatquant.fakequant import fake_quantize
from flatquant.fit.precision import linear, transform_rows
from flatquant.models.spec import FamilySpec, Geometry, Group, Site, norm_epsilon
from flatquant.plan import QuantizationPlan
from flatquant.recipe import Recipe
from flatquant.scheme import Scheme
from flatquant.transforms import TRANSFORMS
from flatquant.transforms.base import FrozenTransform, Transform
from flatquant.transforms.scale import ChannelScale, start_scale

IDENTITY = FrozenTransform()


class GroupFit(nn.Module):
    """Transform, scale and clip that the linears of one group share."""

    def __init__(
        self, transform: Transform | None, clip: LearnedClip | None, scheme: Scheme
    ) -> None:
        super().__init__()
        self.transform = transform
        self.scale: ChannelScale | None = None
        self.clip = clip
        self.scheme = scheme
        self.now = IDENTITY
        self.channel: Tensor | None = None

    def refresh(self) -> None:
        """Compute matrices and scale from the parameters."""
        self.now = IDENTITY if self.transform is None else self.transform.matrices()
        self.channel = None if self.scale is None else self.scale.scale()

    def activation(self, x: Tensor) -> Tensor:
        """Fake-quantized input of the group's linears, in the transformed basis."""
        if self.channel is not None:
            x = x * self.channel
        x = transform_rows(x, self.now)
        clip = None if self.clip is None else self.clip.ratios()
        return fake_quantize(x, self.scheme.a_bits, clip, symmetric=self.scheme.a_symmetric)


class NormFit(nn.Module):
    """RMSNorm followed by the group's fake-quantized transform."""

    weight: Tensor
    group: GroupFit

    def __init__(self, norm: nn.Module, group: GroupFit) -> None:
        super().__init__()
        self.eps = norm_epsilon(norm)
        self.group = group
        self.register_buffer("weight", norm.get_parameter("weight").detach().clone())

    def plain(self, x: Tensor) -> Tensor:
        """The norm alone."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        return self.group.activation(self.plain(x))


def transformed_weight(
    weight: Tensor,
    bias: Tensor | None,
    matrices: FrozenTransform,
    channel: Tensor | None,
    output: FrozenTransform | None,
    input_right: FrozenTransform | None,
) -> tuple[Tensor, Tensor | None]:
    """W' and b' of a linear whose input and output change basis.

    Args:
        weight: [out, in].
        bias: [out] or None.
        matrices: transform of the input.
        channel: per-channel scale c of the input [in], or None.
        output: P_v, for v_proj: W' = P_vᵀ·W in every head, b' likewise.
        input_right: P_v, for o_proj: the right factor of its input's transform, merged in v_proj.
    """
    if output is not None and output.right is not None:
        right = output.right.to(weight.dtype)
        head_dim = right.shape[0]
        shape = weight.shape
        weight = (right.mT @ weight.reshape(-1, head_dim, shape[1])).reshape(shape)
        if bias is not None:
            bias = (bias.reshape(-1, head_dim) @ right).reshape(-1)
    if channel is not None:
        weight = weight / channel
    if input_right is not None:
        matrices = FrozenTransform(
            left_inv_t=matrices.left_inv_t, right_inv_t=input_right.right_inv_t
        )
    return transform_rows(weight, matrices, inverse=True), bias


class LinearFit(nn.Module):
    """A linear with a learnable input basis, output basis (v_proj) and weight clip."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, module: nn.Linear, group: GroupFit, *, online: bool, clip: bool, amp: bool
    ) -> None:
        super().__init__()
        self.register_buffer("weight", module.weight.detach().clone())
        self.register_buffer("bias", None if module.bias is None else module.bias.detach().clone())
        self.group = group
        self.online = online
        self.amp = amp
        scheme = group.scheme
        scheme.check_width(module.in_features)
        rows = module.out_features
        self.clip = LearnedClip(rows) if clip and scheme.quantizes_weights else None
        self.input_right: FrozenTransform | None = None
        self.output: FrozenTransform | None = None
        self.effective: Tensor | None = None
        self.effective_bias: Tensor | None = None
        self.fixed: Tensor | None = None

    def transformed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the bases of input and output, before quantization."""
        group = self.group
        return transformed_weight(
            self.weight, self.bias, group.now, group.channel, self.output, self.input_right
        )

    def refresh(self) -> None:
        """Compute the fake-quantized weight for the next forward pass."""
        weight, self.effective_bias = self.transformed()
        if self.fixed is not None:
            self.effective = self.fixed
            return
        scheme = self.group.scheme
        clip = None if self.clip is None else self.clip.ratios()
        if scheme.w_group is None:
            self.effective = fake_quantize(weight, scheme.w_bits, clip, symmetric=True)
            return
        groups = weight.reshape(-1, scheme.w_group)
        if clip is not None:
            clip = clip.repeat_interleave(weight.shape[1] // scheme.w_group, dim=1)
        self.effective = fake_quantize(groups, scheme.w_bits, clip, symmetric=True).reshape(
            weight.shape
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: the group's fake-quantized input, or the raw input where this linear is alone."""
        x = x.to(self.weight.dtype)  # attention may have run in bfloat16
        if self.online:
            x = self.group.activation(x)
        if self.effective is None:
            raise RuntimeError("LinearFit: refresh() must run before forward()")
        return linear(x, self.effective, self.effective_bias, amp=self.amp)


class HeadsFit(nn.Module):
    """Fake-quantized keys and values, and the basis of queries and keys."""

    def __init__(
        self, transform: Transform | None, scheme: Scheme, *, clip: bool, amp: bool
    ) -> None:
        super().__init__()
        self.transform = transform
        self.scheme = scheme
        self.amp = amp
        self.k_clip = LearnedClip() if clip and scheme.k_bits < 16 else None
        self.v_clip = LearnedClip() if clip and scheme.v_bits < 16 else None
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
        clips = recipe.learned_clips
        for group in family.groups:
            if not plan.quantizes_group(name, group):
                continue
            clip = LearnedClip() if clips and recipe.scheme.quantizes_activations else None
            shared = GroupFit(self._transform(group.site, generator), clip, recipe.scheme)
            self.groups[group.site.value] = shared
            self._add_group(block, group, shared, clips)
        self.heads: HeadsFit | None = None
        if recipe.scheme.quantizes_cache or Site.QK_HEAD in plan.sites:
            self.heads = HeadsFit(
                self._transform(Site.QK_HEAD, generator),
                recipe.scheme,
                clip=clips,
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

    def _add_group(self, block: nn.Module, group: Group, shared: GroupFit, clips: bool) -> None:
        for linear_name in group.linears:
            module = block.get_submodule(linear_name)
            if not isinstance(module, nn.Linear):
                raise TypeError(
                    f"{self.name}.{linear_name} is a {type(module).__name__}, not nn.Linear"
                )
            self.linears[linear_name] = LinearFit(
                module, shared, online=group.norm is None, clip=clips, amp=self.context.amp
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
            self.linears[name] = LinearFit(
                module, neutral, online=False, clip=False, amp=self.context.amp
            )

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
            for kind, owned in (("scales", ChannelScale), ("clips", LearnedClip))
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
