"""What all formats share: plain tensors of a quantized model, and a folder around them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from flatquant.folder import replacing
from flatquant.models import family_of
from flatquant.runtime.activation import InputQuantizer
from flatquant.runtime.linear import QuantizedLinear
from flatquant.runtime.norm import QuantizedNorm
from flatquant.scheme import OFF
from flatquant.transforms.base import kronecker_product


def quantized_linears(model: Any) -> dict[str, QuantizedLinear]:
    """Name -> module, in the order of the model.

    Raises:
        ValueError: the head is quantized, which no format here can say.
    """
    if model.flatquant_plan.scheme.head_bits != OFF:
        raise ValueError("export: the model's head is in 8 bits (scheme -head8)")
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def preparer(model: Any, name: str) -> InputQuantizer:
    """What transforms and quantizes the input of a linear: itself, or the norm in front.

    Raises:
        ValueError: the linear does neither itself, and no norm prepares its input.
    """
    linear = model.get_submodule(name)
    assert isinstance(linear, QuantizedLinear)
    if linear.online:
        return linear
    family = family_of(model.config)
    index, _, inner = name.removeprefix(f"{family.blocks}.").partition(".")
    for group in family.groups:
        if inner in group.linears and group.norm is not None:
            norm = model.get_submodule(f"{family.blocks}.{index}.{group.norm}")
            assert isinstance(norm, QuantizedNorm)
            return norm
    raise ValueError(f"export: no norm prepares the input of {name}")


def original_weight(model: Any, name: str) -> Tensor:
    """The rounded weight in the basis of the linear's plain input, float64 [out, in].

    y = (x·P)·W'ᵀ = x·(W'·Pᵀ)ᵀ, and Pᵀ = P1ᵀ ⊗ P2ᵀ.
    """
    linear = model.get_submodule(name)
    assert isinstance(linear, QuantizedLinear)
    holder = preparer(model, name)
    left, right = holder.left_trans, holder.right_trans
    weight = linear.dequantized_weight(torch.float64)
    left_t = None if left is None else left.double()
    return kronecker_product(weight, left_t, None if right is None else right.double().mT)


def plain_tensors(model: Any) -> dict[str, Tensor]:
    """Everything but the quantized linears' own weights: embeddings, norms, head, biases.

    Norms' weights hold the per-channel scales c, in the model's dtype.
    """
    dtype = model.dtype
    tensors: dict[str, Tensor] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            inside |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)}
            bias: Tensor | None = module.bias
            if bias is not None:
                tensors[f"{name}.bias"] = bias.to(dtype)
        elif isinstance(module, QuantizedNorm):
            inside |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)}
            tensors[f"{name}.weight"] = module.weight.to(dtype)
    for name, tensor in model.state_dict().items():
        if name not in inside and ".kv_quantizer." not in name:
            tensors[name] = tensor
    return tensors


def write(
    model: Any,
    folder: Path,
    tensors: Mapping[str, Tensor],
    quantization: Mapping[str, Any] | None,
    tokenizer: Any,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """A checkpoint folder: safetensors in shards, config.json, generation config, tokenizer.

    Args:
        model: gives config and generation config.
        folder: replaced whole, or left as it was.
        tensors: name -> tensor, on any device.
        quantization: `quantization_config`, or None for a plain model.
        tokenizer: saved along unless None.
        extra: name of a further JSON file -> its content.
    """
    with replacing(
        folder, lambda name: name.endswith((".safetensors", ".safetensors.index.json"))
    ) as staging:
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if model.config.tie_word_embeddings:
            ready.pop("lm_head.weight", None)
        save_torch_state_dict(ready, staging, metadata={"format": "pt"})
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        if quantization is not None:
            config["quantization_config"] = dict(quantization)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(str(staging))
        for name, content in (extra or {}).items():
            (staging / name).write_text(json.dumps(content, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))


def _is_weight(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))
