"""compressed-tensors `pack-quantized`, which vLLM and transformers read without our package.

The format has no Kronecker transform: it holds methods whose transforms are all merged (round to
nearest, GPTQ, AWQ, SmoothQuant and the like). Layout, after compressed-tensors 0.20: codes plus
2^(b-1), in words of 32 bits, least significant bits first, the last word of a row padded with 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatquant.export.folder import plain_tensors, preparer, quantized_linears, write
from flatquant.formats import INTEGER
from flatquant.runtime.activation import InputQuantizer
from flatquant.runtime.linear import QuantizedLinear
from flatquant.scheme import OFF, Scheme


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int8 [out, in] in −2^(b−1)..2^(b−1)−1 -> int32 [out, ceil(in·b/32)].

    Code j of a row takes the bits j·b up to (j+1)·b of that row, which may span two words.
    """
    out, width = codes.shape
    shifted = (codes.to(torch.int32) + 2 ** (bits - 1)).unsqueeze(-1)
    stream = (shifted >> torch.arange(bits, dtype=torch.int32, device=codes.device)) & 1
    stream = stream.reshape(out, width * bits)
    stream = torch.nn.functional.pad(stream, (0, -(width * bits) % 32)).reshape(out, -1, 32)
    weights = 1 << torch.arange(32, dtype=torch.int64, device=codes.device)
    words = (stream.to(torch.int64) * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def to_compressed_tensors(model: Any, folder: Path, tokenizer: Any = None) -> list[str]:
    """Write the folder; see `flatquant.export.export`.

    Raises:
        ValueError: an online transform, a clipped activation grid, or a grid the format lacks.
    """
    scheme: Scheme = model.flatquant_plan.scheme
    if not scheme.quantizes_weights:
        raise ValueError(f"compressed-tensors: scheme {scheme} leaves the weights in 16 bits")
    if scheme.overrides:
        raise ValueError(f"compressed-tensors: scheme {scheme} differs between layers")
    if model.flatquant_plan.kept:
        raise ValueError("compressed-tensors: the format has no columns in floating point")
    kinds = (scheme.w_format, scheme.a_format)
    if kinds != (INTEGER, INTEGER) or scheme.a_static or scheme.a_group or scheme.w_tensor:
        raise ValueError(
            f"compressed-tensors: scheme {scheme}: only integers with one scale for a channel or "
            "group of weights and for a token of inputs are written"
        )
    linears = quantized_linears(model)
    tensors = plain_tensors(model)
    for name, linear in linears.items():
        _check(name, preparer(model, name))
        tensors |= _packed(name, linear, model.dtype)
    ignored = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    write(model, folder, tensors, _config(scheme, ignored), tokenizer)
    notes = []
    if scheme.quantizes_activations and scheme.a_symmetric:
        notes.append(
            "the reader quantizes activations on its own grid, absmax / (2^(b-1) - 1/2); ours is "
            "absmax / (2^(b-1) - 1)"
        )
    if scheme.quantizes_cache:
        notes.append("the format does not describe 4-bit keys and values: the reader keeps 16 bits")
    return notes


def _check(name: str, holder: InputQuantizer) -> None:
    if holder.left_trans is not None or holder.right_trans is not None:
        raise ValueError(
            f"compressed-tensors: the input of {name} has an online transform, which the format "
            "cannot hold; use a method whose transforms are merged, or the flatquant format"
        )
    clip = holder.clip_ratio
    if clip is not None and bool((clip != 1).any()):
        ratios = [round(float(ratio), 4) for ratio in clip]
        raise ValueError(
            f"compressed-tensors: the activations of {name} are clipped at {ratios}, "
            "which the format cannot hold"
        )


def _packed(name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    scale, zero = linear.weight_scale, linear.weight_zero
    assert scale is not None
    tensors = {
        f"{name}.weight_packed": pack_words(linear.weight_codes(), linear.w_bits),
        f"{name}.weight_scale": scale.reshape(len(scale), -1).to(dtype),
        f"{name}.weight_shape": torch.tensor([linear.out_features, linear.in_features]),
    }
    if zero is not None:
        if bool((zero != zero.round()).any()):
            raise ValueError(f"compressed-tensors: the zero points of {name} are no integers")
        codes = zero.reshape(len(zero), -1).to(torch.int8)
        # packed along the output channels
        tensors[f"{name}.weight_zero_point"] = pack_words(codes.mT, linear.w_bits).mT
    return tensors


def _config(scheme: Scheme, ignored: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.w_bits,
        "type": "int",
        "symmetric": scheme.w_symmetric,
        "strategy": "channel" if scheme.w_group is None else "group",
        "group_size": scheme.w_group,
        "dynamic": False,
    }
    activations = None
    if scheme.a_bits != OFF:
        activations = {
            "num_bits": scheme.a_bits,
            "type": "int",
            "symmetric": scheme.a_symmetric,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
