"""Models as commands name them: a checkpoint folder or a .gguf file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DTYPES: dict[str, Any] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(path: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint folder (quantized or not) or a GGUF file.

    Raises:
        ValueError: an unknown dtype, or a folder without a config.json.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flatquant.integrations.gguf import load_gguf
    from flatquant.integrations.hf import register

    register()
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    if path.suffix == ".gguf":
        return load_gguf(path, torch.float32 if dtype == "auto" else DTYPES[dtype])
    if not (path / "config.json").is_file():
        raise ValueError(f"model is {str(path)!r}: it must be a folder with a config.json")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
    return model.eval(), AutoTokenizer.from_pretrained(path)
