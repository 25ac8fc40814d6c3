"""From a fitted block to the tensors that the runtime modules load: merge, round, pack.

All merging is done in float64, from the matrices as the online ops will see them (rounded to
the model's dtype), so that P and the P^-T inside the weights cancel as well as they can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

import flatquant_cuda as fq
from flatquant.fit.group import GroupFit
from flatquant.fit.linear import LinearFit, transformed_weight
from flatquant.fit.modules import BlockFit
from flatquant.models.spec import Site
from flatquant.scheme import Scheme
from flatquant.transforms.base import FrozenTransform, Transform
from flatquant.weights import QuantizedWeight, WeightTask

HessianOf = Callable[[str], Tensor]
"""Name of a linear -> Σ xᵀx of its quantized inputs, with all earlier weights already rounded."""


def _freeze(transform: Transform | None, dtype: torch.dtype) -> FrozenTransform | None:
    return None if transform is None else transform.freeze(dtype)


@torch.no_grad()
def merge_block(
    fit: BlockFit,
    *,
    dtype: torch.dtype,
    hessian_of: HessianOf | None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Tensors of the finished block, by their names in the runtime block.

    Args:
        fit: the fitted block; its linears keep the rounded weights afterwards.
        dtype: dtype of the model that will run them.
        hessian_of: source of Hessians, for weight quantizers that want one.
        on_note: told what weight quantizers have to say about a weight.

    Raises:
        ValueError: a merged tensor is not finite.
    """
    recipe, family = fit.context.recipe, fit.context.family
    values = _freeze(fit.values, torch.float64)
    outputs = family.group(Site.ATTN_OUT).linears
    tensors: dict[str, Tensor] = {}
    frozen = {
        site: _freeze(group.transform, dtype) or FrozenTransform()
        for site, group in fit.groups.items()
    }
    channels = {
        site: None if group.scale is None else group.scale.scale().detach().double()
        for site, group in fit.groups.items()
    }
    row_scales = _row_scales(fit, channels)
    for name, linear in fit.linears.items():
        site = _site_of(fit, linear)
        weight, bias = transformed_weight(
            linear.weight.double(),
            None if linear.bias is None else linear.bias.double(),
            frozen.get(site, FrozenTransform()),
            channels.get(site),
            values if name == family.value else None,
            values if name in outputs else None,
        )
        _check_finite(f"{fit.name}.{name}.weight", weight)
        if not recipe.scheme.quantizes_linears and site not in frozen:
            tensors[f"{name}.weight"] = weight.to(dtype)
            if bias is not None:
                tensors[f"{name}.bias"] = bias.to(dtype)
            continue
        quantized = _round(fit, name, linear, weight, hessian_of)
        if quantized is not None and on_note is not None:
            for note in quantized.notes:
                on_note(f"{fit.name}.{name}: {note}")
        rows = row_scales.get(name)
        tensors.update(_linear_tensors(name, quantized, weight, bias, rows, recipe.scheme, dtype))
        if linear.online:
            tensors.update(_online_tensors(name, frozen[site], linear.group))
    for name, norm in fit.norms.items():
        site = next(s for s, g in fit.groups.items() if g is norm.group)
        channel = channels[site]
        weight = norm.weight.detach().double()
        merged = weight if channel is None else weight * channel
        tensors[f"{name}.weight"] = merged.to(torch.promote_types(dtype, torch.float32))
        tensors.update(_online_tensors(name, frozen[site], norm.group))
    if fit.heads is not None:
        tensors.update(_head_tensors(fit, dtype))
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            _check_finite(f"{fit.name}.{name}", tensor)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _site_of(fit: BlockFit, linear: LinearFit) -> str:
    return next((site for site, group in fit.groups.items() if group is linear.group), "")


def _row_scales(fit: BlockFit, channels: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """c of an input that no norm produces goes into the rows of the linear that does."""
    scales = {}
    for group in fit.context.family.groups:
        channel = channels.get(group.site.value)
        if channel is not None and group.norm is None:
            if group.scaled_by is None:
                raise ValueError(f"{group.site.value}: nothing can absorb a per-channel scale")
            scales[group.scaled_by] = channel
    return scales


def _round(
    fit: BlockFit, name: str, linear: LinearFit, weight: Tensor, hessian_of: HessianOf | None
) -> QuantizedWeight | None:
    scheme = linear.group.scheme
    if not scheme.quantizes_weights:
        return None
    quantizer, family = fit.context.recipe.rounding, fit.context.family
    task = WeightTask(
        name=f"{fit.name}.{name}",
        weight=weight,
        bits=scheme.w_bits,
        group=scheme.w_group,
        clip=None if linear.clip is None else linear.clip.ratios().detach(),
        makes_scores=name in (family.query, family.key),
    )
    if quantizer.needs_hessian:
        if hessian_of is None:
            raise ValueError(f"{fit.context.recipe.weights}: {name} needs calibration text")
        task = replace(task, hessian=hessian_of(name))
    result = quantizer.quantize(task)
    linear.fixed = result.dequantize().to(linear.weight.dtype)
    return result


def _linear_tensors(
    name: str,
    quantized: QuantizedWeight | None,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Weight codes and scales, bias; `rows` multiplies every output (its scale, not its codes)."""
    tensors: dict[str, Tensor] = {}
    if quantized is None:
        tensors[f"{name}.weight"] = (weight if rows is None else rows[:, None] * weight).to(dtype)
    else:
        scale = quantized.scale.double()
        if rows is not None:
            scale = scale * (rows if scale.dim() == 1 else rows[:, None])
        codes = quantized.codes
        if scheme.w_bits > 4:
            packed = codes
        elif scheme.w_bits == 2 and not scheme.quantizes_activations:
            packed = fq.packing.pack(codes, 2)
        else:
            packed = fq.packing.pack_nibbles(codes)
        tensors[f"{name}.weight_packed"] = packed
        tensors[f"{name}.weight_scale"] = scale.float()
        if scheme.quantizes_activations and not scheme.a_symmetric:
            tensors[f"{name}.weight_colsum"] = codes.sum(1, dtype=torch.int32)
    if bias is not None:
        tensors[f"{name}.bias"] = (bias if rows is None else bias * rows).to(dtype)
    return tensors


def _online_tensors(name: str, matrices: FrozenTransform, group: GroupFit) -> dict[str, Tensor]:
    """left_trans = P1ᵀ, right_trans = P2, clip_ratio = (max, min), all float32."""
    tensors: dict[str, Tensor] = {}
    if matrices.left is not None:
        tensors[f"{name}.left_trans"] = matrices.left.mT.float()
    if matrices.right is not None:
        tensors[f"{name}.right_trans"] = matrices.right.float()
    if group.scheme.quantizes_activations:
        clip = torch.ones(2) if group.clip is None else group.clip.ratios().detach()
        tensors[f"{name}.clip_ratio"] = clip.float()
    return tensors


def _head_tensors(fit: BlockFit, dtype: torch.dtype) -> dict[str, Tensor]:
    heads = fit.heads
    if heads is None:
        return {}
    name = f"{fit.context.family.attention}.kv_quantizer"
    tensors: dict[str, Tensor] = {}
    for part, clip in (("k_clip", heads.k_clip), ("v_clip", heads.v_clip)):
        tensors[f"{name}.{part}"] = (
            torch.ones(2) if clip is None else clip.ratios().detach().float()
        )
    frozen = _freeze(heads.transform, dtype)
    if frozen is not None and frozen.right is not None and frozen.right_inv_t is not None:
        tensors[f"{name}.k_trans"] = frozen.right.float()
        tensors[f"{name}.q_trans"] = frozen.right_inv_t.float()
    return tensors


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are NaN or Inf after merging")
