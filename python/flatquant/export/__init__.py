"""Quantized models in other programs' formats. A new one is a file and a line in `EXPORTERS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flatquant.export.ascend import to_ascend
from flatquant.export.compressed_tensors import to_compressed_tensors
from flatquant.export.floating import to_floating

EXPORTERS: dict[str, Callable[..., list[str]]] = {
    "compressed-tensors": to_compressed_tensors,
    "float": to_floating,
    "ascend": to_ascend,
}
"""Format -> exporter (model, folder, tokenizer) -> what the reader of the folder must know."""


def export(model: Any, kind: str, directory: str | Path, tokenizer: Any = None) -> list[str]:
    """Write a quantized model for another program; an existing folder is replaced whole or not.

    Args:
        model: a quantized Hugging Face model.
        kind: a name in `EXPORTERS`.
        directory: the folder to write.
        tokenizer: saved along, if given.

    Returns:
        Differences from the model as it runs here, one sentence each.

    Raises:
        ValueError: unknown format, a model that is not quantized, or one that the format cannot
            hold; the message says what stands in the way.
    """
    if kind not in EXPORTERS:
        raise ValueError(f"export: format {kind!r} is unknown; known: {list(EXPORTERS)}")
    if getattr(model, "flatquant_plan", None) is None:
        raise ValueError("export: the model is not quantized (it has no flatquant_plan)")
    return EXPORTERS[kind](model, Path(directory), tokenizer)


__all__ = ["EXPORTERS", "export", "to_ascend", "to_compressed_tensors", "to_floating"]
