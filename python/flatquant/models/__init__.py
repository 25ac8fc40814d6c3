"""Model families, as data. A new one is a `FamilySpec` value and a line in `FAMILIES`."""

from __future__ import annotations

from typing import Any

from flatquant.models.llama import LLAMA, MISTRAL
from flatquant.models.qwen import QWEN2, QWEN3
from flatquant.models.spec import FamilySpec, Geometry, Group, Site

FAMILIES: dict[str, FamilySpec] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


def family_of(config: Any) -> FamilySpec:
    """The family of a transformers config.

    Raises:
        ValueError: `config.model_type` is not in `FAMILIES`.
    """
    name = getattr(config, "model_type", None)
    if name not in FAMILIES:
        raise ValueError(f"model_type={name!r} is not supported; known families: {list(FAMILIES)}")
    return FAMILIES[name]


__all__ = ["FAMILIES", "FamilySpec", "Geometry", "Group", "Site", "family_of"]
