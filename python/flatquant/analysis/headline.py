"""The first numbers anyone asks for: perplexity, agreement, size, speed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from flatquant.compare.agreement import AgreementMeter, Reference, capture
from flatquant.evaluate import measure_speed, perplexity
from flatquant.report.size import bits_per_weight


def reference_of(
    model: Any, ids: Tensor, folder: Path, window: int, windows: int
) -> tuple[Reference, dict[str, float]]:
    """What a floating-point model predicts, kept in a folder, and its perplexity."""
    value = capture(model, ids, folder, window, windows)
    return Reference.of(folder, model), {"perplexity": value}


def against(
    reference: Reference, model: Any, ids: Tensor, window: int, windows: int, progress: bool
) -> dict[str, float]:
    """Perplexity of another model, and its distance to the reference."""
    meter = AgreementMeter(reference)
    value = perplexity(model, ids, window, windows, progress=progress, observe=meter)
    return {"perplexity": value, **asdict(meter.result())}


def speed_of(fp: Any, quantized: Any) -> dict[str, dict[str, float]]:
    """Tokens a second of both models, prefill and decode."""
    return {
        name: asdict(measure_speed(model)) for name, model in (("fp", fp), ("quantized", quantized))
    }


def size_of(fp: Any, quantized: Any) -> dict[str, float | None]:
    """Bytes of the models' tensors, and bits of a quantized weight (None without any)."""
    sizes: dict[str, float | None] = {
        "fp_bytes": _bytes(fp),
        "quantized_bytes": _bytes(quantized),
    }
    try:
        sizes["bits_per_weight"] = bits_per_weight(quantized)
    except ValueError:
        sizes["bits_per_weight"] = None
    return sizes


def _bytes(model: Any) -> int:
    """Of what a checkpoint stores; shared tensors count once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
