"""Tiny random models of every family, built in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flatquant import CalibrationResult, Recipe, calibrate
from flatquant.runtime.attention import KVQuantizer, activate

_FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(_FAMILIES)


def build_tiny_model(
    family: str = "llama", gqa: bool = True, bias: bool = False, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A seeded float32 model: 2 layers, hidden 64, 4 heads of 16, 2 or 4 key-value heads.

    `bias` makes every bias the family has non-zero (Mistral has none; Qwen2 always has them on
    q, k and v, zero without `bias`). `overrides` go to the config.
    """
    config_class, model_class = _FAMILIES[family]
    options: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if gqa else 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    if family in ("llama", "qwen3"):
        options |= {"attention_bias": bias, "head_dim": 16}
    if family == "llama":
        options["mlp_bias"] = bias
    if family == "mistral":
        options["sliding_window"] = None
    torch.manual_seed(seed)
    model = model_class(config_class(**(options | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if bias and name.endswith("bias"):
                parameter.normal_(std=0.2)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


TEXT = torch.randint(2, 128, (4, 12), generator=torch.Generator().manual_seed(5))
"""Calibration text of the tiny models, int64 [4, 12]."""


def calibrate_tiny(
    model: PreTrainedModel, method: str | Recipe, **options: Any
) -> CalibrationResult:
    """`flatquant.calibrate` on `TEXT`, at the recipe's own scheme, or at W4A4KV4."""
    scheme = method.scheme if isinstance(method, Recipe) else "W4A4KV4"
    return calibrate(model, method, scheme, TEXT, progress=False, **options)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`build_tiny_model`, for tests that need a model."""
    return build_tiny_model


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """int64 [2, 24] tokens of the tiny models' vocabulary; no padding token among them."""
    return torch.randint(2, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def attach_kv_quantizers(
    model: PreTrainedModel, k_bits: int = 4, v_bits: int = 4, transform: bool = True, seed: int = 3
) -> PreTrainedModel:
    """Give every attention module a `kv_quantizer` with a random well-conditioned P_h."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        dim = layer.self_attn.head_dim
        quantizer = KVQuantizer(dim, k_bits, v_bits, transform)
        if transform:
            rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
            matrix = rotation * (0.5 + torch.rand(dim, generator=generator))
            quantizer.k_trans.copy_(matrix)
            quantizer.q_trans.copy_(torch.linalg.inv(matrix.double()).T)
        quantizer.k_clip.fill_(0.98)
        layer.self_attn.kv_quantizer = quantizer
    activate(model)
    return model
