"""Exports: what a reader of each format computes is what the quantized model computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flatquant
from flatquant.export import EXPORTERS, export
from flatquant.export.ascend import factor_sizes
from flatquant.export.compressed_tensors import pack_words
from flatquant.runtime.linear import QuantizedLinear

from .conftest import build_tiny_model


def _quantized(scheme: str, transform: str = "identity", **options: Any) -> Any:
    return flatquant.replace_linear(build_tiny_model(**options), scheme, transform=transform)


@torch.no_grad()
def assert_same_logits(one: Any, other: Any, ids: torch.Tensor) -> None:
    logits = [model(ids, use_cache=False).logits for model in (one, other)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", ["identity", "random"])
@pytest.mark.parametrize("tied", [False, True])
def test_floating_point_folder_computes_the_same(tmp_path, token_ids, transform, tied):
    model = _quantized("W4A16KV16", transform, tie_word_embeddings=tied)
    assert export(model, "float", tmp_path / "f")[0].startswith("a converter")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "f")
    assert type(read).__name__ == "LlamaForCausalLM"
    assert getattr(read.config, "quantization_config", None) is None
    assert_same_logits(read, model, token_ids)


@pytest.mark.parametrize("bias", [False, True])
def test_biases_and_norms_are_exported(tmp_path, token_ids, bias):
    model = _quantized("W8A16", "hadamard", family="qwen2", bias=bias)
    export(model, "float", tmp_path / "f")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "f")
    assert_same_logits(read, model, token_ids)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_hold_the_codes(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 37), dtype=torch.int8)
    words = pack_words(codes, bits)
    assert words.shape == (3, -(-37 * bits // 32))
    stream = [sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(row)) for row in words]
    for row, big in zip(codes.tolist(), stream, strict=True):
        assert row == [(big >> (j * bits)) % 2**bits - 2 ** (bits - 1) for j in range(37)]


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors"
)
@pytest.mark.parametrize(
    "scheme", ["W4A16", "W4A16-g32", "W3A16-g32", "W8A8", "W4A4", "W4A16-wasym", "W4A16-g32-wasym"]
)
def test_compressed_tensors_reads_the_weights_back(tmp_path, scheme):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = _quantized(scheme)
    export(model, "compressed-tensors", tmp_path / "ct")
    block = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(block)
    assert config.ignore == ["lm_head"]
    (group,) = config.config_groups.values()
    stored = load_file(tmp_path / "ct/model.safetensors")
    for name, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear):
            parts = {
                key.removeprefix(f"{name}."): value
                for key, value in stored.items()
                if key.startswith(f"{name}.weight")
            }
            weight = PackedQuantizationCompressor.decompress(parts, group)["weight"]
            torch.testing.assert_close(weight, linear.dequantized_weight(torch.float32))


def test_compressed_tensors_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r"q_proj has an online transform"):
        export(_quantized("W4A4", "hadamard"), "compressed-tensors", tmp_path / "x")
    clipped = _quantized("W4A4")
    clipped.model.layers[1].mlp.down_proj.clip_ratio.fill_(0.9)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj are clipped at \[0.9, 0.9\]"):
        export(clipped, "compressed-tensors", tmp_path / "x")
    with pytest.raises(ValueError, match="only integers with one scale"):
        export(_quantized("WMXFP4A16"), "compressed-tensors", tmp_path / "x")
    with pytest.raises(ValueError, match="KV4 leaves the weights in 16 bits"):
        export(_quantized("KV4"), "compressed-tensors", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("width", "sizes"), [(576, (24, 24)), (1536, (32, 48)), (11008, (86, 128))]
)
def test_ascend_sizes_are_ours(width, sizes):
    from flatquant.transforms import kronecker_split

    assert factor_sizes(width) == sizes == kronecker_split(width)


def test_ascend_layers_compute_the_same(tmp_path):
    # 8 heads of 8: the loader's split of 64 channels is 8x8, so P_o fits too
    model = _quantized(
        "W4A4KV4", "random", num_attention_heads=8, num_key_value_heads=4, head_dim=8
    )
    notes = export(model, "ascend", tmp_path / "a")
    assert "0 apart" in notes[0] and "16 bits" in notes[1]
    stored = load_file(tmp_path / "a/model.safetensors")
    kinds = json.loads((tmp_path / "a/quant_model_description.json").read_text())
    assert kinds["model.layers.0.mlp.down_proj.left_trans"] == "W4A4_FLATQUANT_DYNAMIC"
    assert kinds["model.norm.weight"] == "FLOAT"
    linear = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.down_proj"
    left, right = stored[f"{name}.left_trans"], stored[f"{name}.right_trans"]
    # what the loader and its op do: transpose P1, then P1ᵀ·X·P2, absmax over 7, round
    rows = (left.mT @ x.reshape(3, left.shape[0], right.shape[0]) @ right).reshape(3, -1)
    scale = rows.abs().amax(1, keepdim=True) * stored[f"{name}.clip_ratio"] / 7
    codes = (rows / scale).round().clamp(-8, 7)
    weight = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"]
    torch.testing.assert_close((codes * scale) @ weight.mT, linear(x), rtol=1e-3, atol=1e-3)


def test_ascend_refuses_what_its_loader_cannot_read(tmp_path):
    with pytest.raises(ValueError, match="not W4A8KV4"):
        export(_quantized("W4A8KV4", "random"), "ascend", tmp_path / "x")
    with pytest.raises(ValueError, match=r"left factor of .*o_proj has size 4.*expects 8x8"):
        export(_quantized("W4A4", "random"), "ascend", tmp_path / "x")


@pytest.mark.parametrize("kind", EXPORTERS)
def test_bad_input(tmp_path, kind):
    with pytest.raises(ValueError, match="not quantized"):
        export(build_tiny_model(), kind, tmp_path / "x")
    with pytest.raises(ValueError, match="head is in 8 bits"):
        export(_quantized("W4A4-head8"), kind, tmp_path / "x")
    with pytest.raises(ValueError, match=r"'gguf' is unknown; known: \['compressed-tensors'"):
        export(_quantized("W4A4"), "gguf", tmp_path / "x")


def test_command(tmp_path, capsys):
    from flatquant.cli import main

    from .word_tokenizer import word_tokenizer

    folder = Path(tmp_path / "q")
    _quantized("W4A16").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    target = tmp_path / "ct"
    arguments = ["export", str(folder), "--output", str(target), "--format"]
    assert main([*arguments, "compressed-tensors"]) == 0
    assert (target / "tokenizer.json").exists() and str(target) in capsys.readouterr().out
    assert main([*arguments, "gguf"]) == 2
