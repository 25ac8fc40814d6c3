"""Tensors of vllm-ascend's `W4A4_FLATQUANT_DYNAMIC` layers (its w4a4_flatquant_dynamic.py).

Each linear carries its own pair of factors: `left_trans` is P1 (the loader transposes it), of the
sizes that the loader derives from the width; `right_trans` is P2; `clip_ratio` is one number, where
ours has one for the maximum and one for the minimum. The loader takes neither a transform of
queries and keys, which cancels, nor a quantized KV cache.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatquant.export.folder import plain_tensors, preparer, quantized_linears, write
from flatquant.runtime.linear import QuantizedLinear
from flatquant.scheme import Scheme

KIND = "W4A4_FLATQUANT_DYNAMIC"


def factor_sizes(width: int) -> tuple[int, int]:
    """(n1, n2) as the loader computes them: the factors of width that lie closest together.

    It looks for a² − width = b², so n1 = a − b and n2 = a + b have the same parity.
    """
    a = math.isqrt(width - 1) + 1
    while math.isqrt(a * a - width) ** 2 != a * a - width:
        a += 1
    b = math.isqrt(a * a - width)
    return a - b, a + b


def to_ascend(model: Any, folder: Path, tokenizer: Any = None) -> list[str]:
    """Write the folder; see `flatquant.export.export`.

    Raises:
        ValueError: another scheme than W4A4 with symmetric activations; a width that is no multiple
            of 8; factors of other sizes than the loader's.
    """
    scheme: Scheme = model.flatquant_plan.scheme
    plain = Scheme(w_bits=4, a_bits=4)
    if scheme.overrides or (scheme.weights, scheme.activations) != (
        plain.weights,
        plain.activations,
    ):
        raise ValueError(f"ascend: {KIND} layers are W4A4 with symmetric activations, not {scheme}")
    if model.flatquant_plan.kept:
        raise ValueError("ascend: the loader knows no columns in floating point")
    linears = quantized_linears(model)
    tensors = plain_tensors(model)
    widest = 0.0
    for name, linear in linears.items():
        ratios, made = _layer(model, name, linear)
        widest = max(widest, abs(float(ratios[0] - ratios[1])))
        tensors |= made
    kinds = {name: "FLOAT" for name in plain_tensors(model)}
    kinds |= {name: KIND for name in tensors if name not in kinds}
    description = {"model_quant_type": KIND, **kinds}
    write(model, folder, tensors, None, tokenizer, {"quant_model_description.json": description})
    notes = [f"pairs of clip ratios became their means; the widest pair was {widest:.3g} apart"]
    if scheme.quantizes_cache:
        notes.append("the loader keeps keys and values in 16 bits")
    return notes


def _layer(model: Any, name: str, linear: QuantizedLinear) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip ratios (max, min) and the layer's tensors."""
    width = linear.in_features
    if width % 8:
        raise ValueError(f"ascend: {name} has {width} input channels; they must divide by 8")
    sizes = factor_sizes(width)
    holder = preparer(model, name)
    factors = []
    for factor, size, side in (
        (holder.left_trans, sizes[0], "left"),
        (holder.right_trans, sizes[1], "right"),
    ):
        if factor is not None and factor.shape[0] != size:
            raise ValueError(
                f"ascend: the {side} factor of {name} has size {factor.shape[0]}; the loader "
                f"expects {sizes[0]}x{sizes[1]} for {width} channels"
            )
        factors.append(torch.eye(size) if factor is None else factor)
    ratios = holder.clip_ratio
    assert ratios is not None and linear.weight_scale is not None
    scale = linear.weight_scale.reshape(-1, 1)
    return ratios, {
        f"{name}.weight": linear.weight_codes(),
        f"{name}.weight_scale": scale.float(),
        f"{name}.weight_offset": torch.zeros_like(scale, dtype=torch.float32),
        f"{name}.left_trans": factors[0].mT.to(model.dtype),
        f"{name}.right_trans": factors[1].to(model.dtype),
        f"{name}.clip_ratio": ratios.mean().float().reshape(1),
    }
