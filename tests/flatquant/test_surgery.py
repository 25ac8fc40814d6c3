"""Model surgery: what is replaced, what is left alone and why, what the report says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flatquant
import flatquant_cuda as fq
from flatquant.runtime.linear import QuantizedLinear

from .conftest import build_tiny_model


@pytest.mark.parametrize("transform", ["identity", "hadamard", "random"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore:no Hadamard matrix")
def test_replace_linear_without_data(family: str, transform: str, token_ids: Tensor) -> None:
    model = build_tiny_model(family)
    with torch.no_grad():
        before = model(token_ids).logits
    assert flatquant.replace_linear(model, "W4A8", transform=transform) is model
    with torch.no_grad():
        after = model(token_ids).logits
    error = float((after - before).norm() / before.norm())
    assert 0 < error < 0.7
    found = flatquant.report(model)
    assert len(found.linears) == 14
    assert found.left_alone == {"lm_head": "listed in ignore"}
    assert {entry.kernel for entry in found.linears} == {"gemm_w4a8"}
    share = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)
    )
    total = sum(p.numel() for p in build_tiny_model(family).parameters())
    assert found.quantized_share == pytest.approx(share / total, abs=0.01)


def test_report_says_native_only_where_it_is() -> None:
    model = flatquant.replace_linear(build_tiny_model("llama"), "W4A4KV4")
    found = flatquant.report(model)
    assert found.ops["gemm_w4a4"] == fq.backend("gemm_w4a4", "cpu")
    assert found.native == all(fq.backend(op, "cpu") == "native" for op in found.ops)
    for scheme in ("W8A8", "W6A4"):
        wide = flatquant.report(flatquant.replace_linear(build_tiny_model("llama"), scheme))
        assert {entry.kernel for entry in wide.linears} == {"gemm_w8a8"}
    simulated = flatquant.replace_linear(build_tiny_model("llama"), "W8A16")
    assert flatquant.report(simulated).ops["simulated"] == "reference"
    assert not flatquant.report(simulated).native
    assert "simulated: reference" in str(flatquant.report(simulated))


def test_ignored_linears_are_named_with_the_reason(token_ids: Tensor) -> None:
    model = build_tiny_model("llama")
    flatquant.replace_linear(
        model, "W4A4", ignore=("lm_head", r"re:.*layers\.0\.self_attn\.k_proj")
    )
    shared = "shares its input with a linear that is listed in ignore"
    left = flatquant.report(model).left_alone
    assert left == {
        "lm_head": "listed in ignore",
        "model.layers.0.self_attn.k_proj": "listed in ignore",
        "model.layers.0.self_attn.q_proj": shared,
        "model.layers.0.self_attn.v_proj": shared,
    }
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    with torch.no_grad():
        assert torch.isfinite(model(token_ids).logits).all()


def test_surgery_logs_its_report(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flatquant"):
        model = flatquant.replace_linear(build_tiny_model("llama"), "W4A4")
    assert str(flatquant.report(model)) in caplog.text
    assert "left alone: lm_head (listed in ignore)" in caplog.text


def test_an_ignored_name_that_matches_nothing_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="ignore='down_proj' matches no linear"):
        flatquant.calibrate(build_tiny_model("llama"), "rtn", "W4A4", ignore="down_proj")


def test_inputs_are_quantized_once_per_group(
    token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k, v share one quantized input, gate and up another: four a block."""
    model = flatquant.replace_linear(build_tiny_model("llama"), "W4A4")
    calls = []
    original = fq.ops.kronecker_quantize

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(fq.ops, "kronecker_quantize", counted)
    with torch.no_grad():
        model(token_ids)
    assert len(calls) == 4 * 2


def test_quantizing_twice_is_refused() -> None:
    model = flatquant.replace_linear(build_tiny_model("llama"), "W4A4")
    with pytest.raises((ValueError, TypeError), match=r"quantized already|not nn.Linear"):
        flatquant.replace_linear(model, "W4A4")


def test_a_result_of_another_model_is_refused() -> None:
    result = flatquant.calibrate(build_tiny_model("llama"), "rtn", "W4A4")
    with pytest.raises(ValueError, match="2 blocks, the model has 3"):
        result.apply(build_tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match="the result has shape"):
        result.apply(build_tiny_model("llama", intermediate_size=128))


def test_sizes_that_contradict_each_other_are_refused() -> None:
    model = build_tiny_model("llama")
    model.config.intermediate_size = 100
    with pytest.raises(ValueError, match="in_features=96, the config implies 100"):
        flatquant.replace_linear(model, "W4A4", transform="identity")
    model = build_tiny_model("llama")
    model.config.head_dim = None
    model.config.num_attention_heads = 5
    with pytest.raises(ValueError, match="64 is not divisible by num_attention_heads=5"):
        flatquant.replace_linear(model, "W4A4")


def test_groups_must_divide_the_layer() -> None:
    with pytest.raises(ValueError, match="w_group=48 does not divide the layer's 64"):
        flatquant.replace_linear(build_tiny_model("llama"), "W4A16-g48", transform="identity")


def test_kv_only_keeps_the_linears(token_ids: Tensor) -> None:
    model = build_tiny_model("llama")
    flatquant.replace_linear(model, "KV4")
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    found = flatquant.report(model)
    assert found.linears == ()
    assert "kv_quantize_append" in found.ops
    assert found.left_alone["model.layers.0.mlp.up_proj"] == "scheme KV4 does not quantize linears"


def test_fake_quantized_needs_a_quantized_model() -> None:
    with (
        pytest.raises(ValueError, match="the model is not quantized"),
        flatquant.fake_quantized(build_tiny_model("llama")),
    ):
        pass


@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A16"])
def test_casting_a_quantized_model_keeps_its_scales(scheme: str, token_ids: Tensor) -> None:
    model = flatquant.replace_linear(build_tiny_model("qwen2", bias=True), scheme)
    before = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith(("_scale", "_trans", "_clip", "clip_ratio", "layernorm.weight"))
    }
    assert before
    model.to(torch.bfloat16)
    assert all(torch.equal(model.get_buffer(name), value) for name, value in before.items())
    with torch.no_grad():
        logits = model(token_ids).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
