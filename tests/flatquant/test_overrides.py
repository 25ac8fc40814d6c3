"""The grammar of schemes beyond plain integers, and exceptions to a scheme."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatquant
from flatquant import Scheme
from flatquant.overrides import Override

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (4, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "text",
    [
        "W4A4KV4",
        "W4A4KV4-asym-g32-ag32-kvg8-head8",
        "WE4M3AE4M3KVE5M2",
        "WMXFP4AMXFP6KE4M3V4",
        "WNVFP4ANVFP4-static",
        "W3A16-wasym-g64",
        "W8A8-wtensor-static",
        "WE4M3XA16-g128",
        "W4A4KV4-down_proj:8",
        "W4A4KV4-o_proj@0,27..29:W8A16-self_attn@0:KV8-mlp.*:WMXFP4AMXFP4",
        "W16A16-*.up_proj:W4A16",
    ],
)
def test_every_scheme_round_trips(text: str) -> None:
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert Scheme.parse(str(scheme)) == scheme


def test_formats_imply_their_widths() -> None:
    scheme = Scheme.parse("WE2M1AE3M2KE4M3VNVFP4")
    assert (scheme.w_bits, scheme.a_bits, scheme.k_bits, scheme.v_bits) == (4, 6, 8, 4)
    assert Scheme(w_format="MXFP4").w_bits == 4
    assert Scheme.parse("WMXFP4A16").weights.block == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("WE9M9A4", "expected a form like"),
        ("WE4M3AE4M3-asym", "E4M3 has no zero point"),
        ("WE4M3A16-wasym", "E4M3 has no zero point"),
        ("WMXFP4AMXFP4-g64", "MXFP4 has blocks of 32"),
        ("W4AMXFP4-ag16", "MXFP4 has blocks of 32"),
        ("W4A16-g32-wtensor", "groups have their own"),
        ("WMXFP4A16-wtensor", "groups have their own"),
        ("W4A4-ag16-static", "no groups"),
        ("W4A16-static", "a_static=True needs a_bits below 16"),
        ("W4AMXFP4-static", "made at run time"),
        ("W4A16-ag16", "needs a_bits below 16"),
        ("W4A4-kvg8", "kv_group=8 needs"),
        ("W4A4-g128", "one weight scale per output channel"),
        ("W4A16-g0", "must be at least 1"),
        ("W4A16-g128-down_proj:8", "one weight scale per output channel|8"),
        ("W4A4-down_proj:", "expected PATTERN:NUMBERS"),
        ("W4A4-down_proj:9", "w_bits=9 must be 2..8"),
        ("W4A4-down_proj:fast", "must be a number or a form like W8A8"),
        ("W4A4-down_proj@x:8", "expected PATTERN"),
    ],
)
def test_contradictions_are_refused_by_name(text: str, message: str) -> None:
    if text == "W4A16-g128-down_proj:8":  # weights alone are quantized, so this one is fine
        assert Scheme.parse(text).at("model.layers.0.mlp.down_proj").w_bits == 8
        return
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


def test_the_last_override_that_applies_wins() -> None:
    scheme = Scheme.parse("W4A4KV4-down_proj:8-down_proj@1..2:E4M3-mlp.*@2:16-self_attn@0:K8V2")

    def at(name: str, block: int) -> str:
        return str(scheme.at(f"model.layers.{block}.{name}"))

    assert at("mlp.down_proj", 0) == "W8A8KV4"
    assert at("mlp.down_proj", 1) == "WE4M3AE4M3KV4"
    assert at("mlp.down_proj", 2) == "KV4"
    assert at("mlp.up_proj", 0) == "W4A4KV4"
    assert at("self_attn", 0) == "W4A4K8V2"
    assert at("self_attn.q_proj", 0) == "W4A4KV4"
    assert at("self_attn", 12) == "W4A4KV4"
    override = Override(pattern="o_proj", numbers="8", blocks=(0, 1, 2, 7))
    assert str(override) == "o_proj@0..2,7:8" and Override.parse(str(override)) == override
    assert not Override.parse("down_proj:8").matches("model.layers.0.mlp.up_down_proj")


@pytest.mark.parametrize("method", ["rtn", "flatquant"])
@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [
        ("W4A4KV4-down_proj:8", {"gemm_w4a4": 12, "gemm_w8a8": 2}),
        ("W4A4KV4-q_proj@1:W8", {"gemm_w4a4": 11, "gemm_w8a8": 1, "gemm_w4a8": 2}),
        ("W4A4KV4-asym-self_attn@0:K8V2", {"gemm_w4a4": 14}),
        ("W4A4-mlp.*:W4A8", {"gemm_w4a4": 8, "gemm_w4a8": 6}),
        ("W4A4-down_proj@0:MXFP4", {"gemm_w4a4": 13, "simulated": 1}),
        ("W16A16-down_proj:W4A8", {"gemm_w4a8": 2}),
    ],
)
def test_mixed_precision(
    scheme: str, kernels: dict[str, int], method: str, token_ids: Tensor, tmp_path: Path
) -> None:
    model = build_tiny_model("llama")
    with torch.no_grad():
        before = model(token_ids, use_cache=False).logits
    flatquant.quantize(model, method, scheme, CALIBRATION, epochs=1, progress=False)
    with torch.no_grad():
        after = model(token_ids, use_cache=False).logits
        with flatquant.fake_quantized(model):
            simulated = model(token_ids, use_cache=False).logits
    assert torch.equal(after, simulated)
    assert 0 < float((after - before).norm() / before.norm()) < 1.0
    found = flatquant.report(model)
    used = Counter(entry.kernel for entry in found.linears)
    if scheme.startswith("W16"):  # transforms replace linears too, which then run simulated
        used["simulated"] = 0
    assert used == Counter(kernels)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = flatquant.load(tmp_path)(token_ids, use_cache=False).logits
    assert torch.equal(after, again)


def test_a_module_at_full_precision_is_left_alone(token_ids: Tensor) -> None:
    model = build_tiny_model("llama")
    flatquant.quantize(model, "rtn", "W4A4-down_proj@0:16", progress=False)
    found = flatquant.report(model)
    assert len(found.linears) == 13
    assert "does not quantize" in found.left_alone["model.layers.0.mlp.down_proj"]
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    with torch.no_grad():
        assert torch.isfinite(model(token_ids).logits).all()


def test_linears_that_share_an_input_cannot_disagree_about_it() -> None:
    with pytest.raises(ValueError, match="an override of A must cover both"):
        flatquant.quantize(build_tiny_model("llama"), "rtn", "W4A4-k_proj:W8A8", progress=False)


def test_overrides_bring_down_the_error(token_ids: Tensor) -> None:
    errors = []
    for scheme in ("W3A3", "W3A3-down_proj:8", "W3A3-mlp.*:8", "W8A8"):
        model = build_tiny_model("llama")
        with torch.no_grad():
            before = model(token_ids).logits
            flatquant.quantize(model, "rtn", scheme, progress=False)
            errors.append(float((model(token_ids).logits - before).norm()))
    assert errors == sorted(errors, reverse=True)
