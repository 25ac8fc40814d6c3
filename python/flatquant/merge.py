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
from flatquant.scheme import OFF, Scheme
from flatquant.transforms.base import FrozenTransform, Transform
from flatquant.weights import QuantizedWeight
from flatquant.weights.columns import quantize_around

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
    family = fit.context.family
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
    produced = fit.value_rows()
    for name, linear in fit.linears.items():
        site = _site_of(fit, linear)
        weight, bias = transformed_weight(
            linear.early(linear.weight.double()),
            None if linear.bias is None else linear.bias.double(),
            frozen.get(site, FrozenTransform()),
            channels.get(site),
            values if name == family.value else None,
            values if name in outputs else None,
            produced.double() if produced is not None and name == family.value else None,
        )
        rows = row_scales.get(name)
        _check_finite(f"{fit.name}.{name}.weight", weight)
        stays = site not in frozen  # an nn.Linear
        quantized = None
        if not stays or fit.context.recipe.rounding.prunes:
            quantized = _round(fit, name, linear, weight, hessian_of)
        if quantized is None and linear.fixed is not None:
            weight = linear.fixed.double()  # pruned
        if linear.group.kept is not None:
            columns = weight[:, linear.group.kept] if quantized is None else linear.kept_weight
            assert columns is not None
            columns = columns if rows is None else rows[:, None] * columns
            tensors[f"{name}.kept_weight"] = columns.to(dtype)
            tensors[f"{name}.kept"] = linear.group.kept.clone()
        if stays:
            tensors.update(_linear_tensors(name, None, weight, bias, rows, linear.scheme, dtype))
            continue
        if quantized is not None and on_note is not None:
            for note in quantized.notes:
                on_note(f"{fit.name}.{name}: {note}")
        tensors.update(_linear_tensors(name, quantized, weight, bias, rows, linear.scheme, dtype))
        if linear.online:
            tensors.update(_online_tensors(name, frozen[site], linear.group))
    for name, norm in fit.norms.items():
        site = next(s for s, g in fit.groups.items() if g is norm.group)
        tensors.update(_online_tensors(name, frozen[site], norm.group))
    tensors.update(norm_weights(fit, model_dtype=dtype))
    if fit.heads is not None:
        tensors.update(_head_tensors(fit, dtype))
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            _check_finite(f"{fit.name}.{name}", tensor)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def norm_weights(fit: BlockFit, *, model_dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the block's norms times c, by their names in the runtime block."""
    tensors = {}
    for name, norm in fit.norms.items():
        weight, scale = norm.weight.detach().double(), norm.group.scale
        merged = weight if scale is None else weight * scale.scale().double()
        tensors[f"{name}.weight"] = merged.to(torch.promote_types(model_dtype, torch.float32))
    return tensors


def _site_of(fit: BlockFit, linear: LinearFit) -> str:
    return next((site for site, group in fit.groups.items() if group is linear.group), "")


def _row_scales(fit: BlockFit, channels: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Scales that rows of linears take over after rounding, which they commute with.

    That is c of an input that a linear produces, and that of keys (inverse, for queries). c of
    the attention's output has gone into W_v before, because P_v may mix the rows.
    """
    scales = {}
    for group in fit.context.family.groups:
        channel = channels.get(group.site.value)
        if channel is not None and group.norm is None:
            if group.scaled_by is None:
                raise ValueError(f"{group.site.value}: nothing can absorb a per-channel scale")
            if not fit.groups[group.site.value].scaled:
                scales[group.scaled_by] = channel
    family, keys = fit.context.family, fit.key_scale
    if keys is not None and family.key_norm is None:
        geometry = fit.context.geometry
        scale = keys.scale().detach().double()
        scales[family.key] = scale.reshape(-1)
        readers = geometry.heads // geometry.kv_heads
        scales[family.query] = 1 / scale.repeat_interleave(readers, dim=0).reshape(-1)
    return scales


def _round(
    fit: BlockFit, name: str, linear: LinearFit, weight: Tensor, hessian_of: HessianOf | None
) -> QuantizedWeight | None:
    scheme = linear.scheme
    quantizer = fit.context.recipe.rounding
    if not scheme.quantizes_weights and not quantizer.prunes:
        return None
    task = fit.weight_task(name, weight)
    if quantizer.needs_hessian:
        if hessian_of is None:
            raise ValueError(f"{fit.context.recipe.weights}: {name} needs calibration text")
        task = replace(task, hessian=hessian_of(name))
    if not scheme.quantizes_weights:
        keep = quantizer.keeps(task)
        linear.fixed = weight if keep is None else weight * keep
        linear.fixed = linear.fixed.to(linear.weight.dtype)
        return None
    if linear.rounding is not None:
        result = linear.rounding.hardened()
        linear.fixed = result.dequantize().to(linear.weight.dtype)
        return result
    columns = linear.group.kept
    if columns is None:
        result = quantizer.quantize(task)
        linear.fixed = result.dequantize().to(linear.weight.dtype)
        return result
    result, linear.kept_weight = quantize_around(quantizer, task, columns)
    whole = result.dequantize().index_copy(1, columns, linear.kept_weight.float())
    linear.fixed = whole.to(linear.weight.dtype)
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
        if quantized.zero is not None:
            tensors[f"{name}.weight_zero"] = quantized.zero
        if scheme.activations.by_row and scheme.a_bits < OFF and not scheme.a_symmetric:
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
    if group.kept is not None:
        tensors[f"{name}.kept"] = group.kept.clone()
    if group.span is not None:
        tensors[f"{name}.span"] = group.span
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
    family = fit.context.family
    if heads.scale is not None and family.key_norm and family.query_norm:
        scale = heads.scale.scale().detach().double()[0]
        for norm, factor in ((family.key_norm, scale), (family.query_norm, 1 / scale)):
            tensors[f"{norm}.weight"] = (fit.head_norms[norm] * factor).to(dtype)
    frozen = _freeze(heads.transform, dtype)
    if frozen is not None and frozen.right is not None and frozen.right_inv_t is not None:
        tensors[f"{name}.k_trans"] = frozen.right.float()
        tensors[f"{name}.q_trans"] = frozen.right_inv_t.float()
    return tensors


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are NaN or Inf after merging")
