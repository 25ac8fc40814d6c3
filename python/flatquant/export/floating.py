"""A floating-point checkpoint of the rounded weights, for converters such as llama.cpp's.

Every weight is dequantized and taken back to the plain basis of its input, so the folder is an
ordinary model of the original architecture: what it loses is what rounding the weights lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatquant.export.folder import original_weight, plain_tensors, quantized_linears, write


def to_floating(model: Any, folder: Path, tokenizer: Any = None) -> list[str]:
    """Write the folder; see `flatquant.export.export`."""
    tensors = plain_tensors(model)
    for name in quantized_linears(model):
        tensors[f"{name}.weight"] = original_weight(model, name).to(model.dtype)
    write(model, folder, tensors, None, tokenizer)
    scheme = model.flatquant_plan.scheme
    notes = []
    if scheme.quantizes_activations:
        notes.append("activations are not quantized by a reader of this folder")
    if scheme.quantizes_cache:
        notes.append("keys and values are not quantized by a reader of this folder")
    if scheme.quantizes_weights:
        notes.append(
            "a converter that quantizes again rounds a second time, to other grids: compare "
            "perplexities before relying on it"
        )
    return notes
