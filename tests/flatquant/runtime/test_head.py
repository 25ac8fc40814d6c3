"""The 8-bit head (scheme option "head8") and the embedding that shares its rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import flatquant
from flatquant.runtime.head import SharedEmbedding, install_head
from flatquant.runtime.linear import QuantizedLinear
from flatquant_cuda import head as native

from ..conftest import FAMILIES, build_tiny_model


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def quantized(scheme: str = "W4A8KV4-head8", tied: bool = True, **options: Any) -> PreTrainedModel:
    model = build_tiny_model(tie_word_embeddings=tied, **options)
    return flatquant.replace_linear(model, scheme, transform="hadamard")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_close(family, tied, token_ids):
    model = build_tiny_model(family, tie_word_embeddings=tied)
    expected = model(token_ids).logits
    flatquant.replace_linear(model, "W16A16-head8", transform="identity")
    assert type(model.lm_head) is QuantizedLinear
    assert (type(model.model.embed_tokens) is SharedEmbedding) is tied
    error = model(token_ids).logits - expected
    assert 0 < error.std() < 0.03 * expected.std()


def test_rows_are_rounded_once(token_ids):
    """Embedding and head hold the same codes; nothing is stored twice."""
    original = build_tiny_model(tie_word_embeddings=True)
    model = flatquant.replace_linear(copy.deepcopy(original), "KV4-head8")
    rows = model.lm_head.dequantized_weight(torch.float32)
    assert torch.equal(model.model.embed_tokens(token_ids), rows[token_ids])
    step = model.lm_head.weight_scale.unsqueeze(1)
    assert ((rows - original.lm_head.weight).abs() <= step * 0.5000001).all()
    names = [name for name in model.state_dict() if "embed" in name or "head" in name]
    assert names == ["lm_head.clip_ratio", "lm_head.weight_packed", "lm_head.weight_scale"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_law_two_holds(dtype, token_ids):
    model = quantized().to(dtype)
    integer = model(token_ids, use_cache=False).logits
    assert integer.dtype == dtype
    with flatquant.fake_quantized(model):
        assert torch.equal(model(token_ids, use_cache=False).logits, integer)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tied, tmp_path, token_ids):
    model = quantized(tied=tied)
    expected = model(token_ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    for loaded in (flatquant.load(tmp_path), copy.deepcopy(model)):
        assert torch.equal(loaded(token_ids, use_cache=False).logits, expected)
        loaded.tie_weights()
        assert torch.equal(loaded(token_ids, use_cache=False).logits, expected)
    result = flatquant.calibrate(build_tiny_model(), "rtn", "W4A8KV4-head8")
    result.save(tmp_path / "result")
    again = flatquant.CalibrationResult.load(tmp_path / "result").apply(build_tiny_model())
    assert type(again.lm_head) is QuantizedLinear


def test_a_copy_has_its_own_rows(token_ids):
    model = quantized()
    twin = copy.deepcopy(model)
    twin.lm_head.weight_scale.mul_(2)
    assert torch.equal(twin.model.embed_tokens(token_ids), 2 * model.model.embed_tokens(token_ids))
    assert twin.to(torch.bfloat16).model.embed_tokens(token_ids).dtype == torch.bfloat16
    assert twin.lm_head.weight_scale.dtype == torch.float32


def test_generate_with_and_without_the_fast_path(token_ids):
    model = quantized()
    options = {"do_sample": False, "max_new_tokens": 8}
    fast = model.generate(token_ids, **options)
    flatquant.fast_path(model, False)
    assert torch.equal(model.generate(token_ids, **options), fast)


def test_report_and_perplexity_know_it():
    report = flatquant.report(quantized())
    head = [linear for linear in report.linears if linear.name == "lm_head"]
    assert head[0].kernel == "gemm_w8a8" and report.left_alone == {}
    text = torch.randint(0, 128, (200,), generator=torch.Generator().manual_seed(1))
    assert flatquant.perplexity(quantized(), text, window=50, progress=False) > 1


def test_scheme_option():
    scheme = flatquant.Scheme.parse("W4A4KV4-asym-head8")
    assert scheme.head_bits == 8 and str(scheme) == "W4A4KV4-asym-head8"
    assert flatquant.Scheme.parse("W4A4KV4").head_bits == 16
    with pytest.raises(ValueError, match="head_bits=4 must be 8, or 16 for off"):
        flatquant.Scheme.parse("W4A4-head4")
    with pytest.raises(ValueError, match="unknown option 'foot8'; known: asym, "):
        flatquant.Scheme.parse("W4A4-foot8")


def test_a_head_that_is_no_linear_is_refused():
    model = build_tiny_model()
    model.lm_head = nn.Identity()
    with pytest.raises(TypeError, match=r"head is a Identity, not nn.Linear"):
        install_head(model, 8)


# ---- the head as it is, in bfloat16 --------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the calls of our op."""
    if not native.available():
        pytest.skip("no native head")
    found: list[int] = []
    original = native.head

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(x.numel() // x.shape[-1])
        return original(x, *rest)

    monkeypatch.setattr(native, "head", counted)
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_few_tokens_run_on_our_op(calls, tied, token_ids):
    model = quantized("W4A8KV4", tied).bfloat16()
    reference = nn.functional.linear
    hidden = model.model(token_ids[:1, :3]).last_hidden_state
    logits = model(token_ids[:1, :3]).logits
    assert calls == [3]
    wanted = reference(hidden.double(), model.lm_head.weight.double())
    assert (logits.double() - wanted).abs().max() <= 2.0**-8 * wanted.abs().max()
    flatquant.fast_path(model, False)
    assert torch.equal(model(token_ids[:1, :3]).logits, logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not twin(token_ids[:1, :3]).logits.any() and len(calls) == 3
    assert torch.equal(model(token_ids[:1, :3]).logits, logits)


def test_everything_else_is_left_to_torch(calls, token_ids):
    model = quantized("W4A8KV4").bfloat16()
    few = token_ids[:1, :2]
    assert model(token_ids).logits.shape[:2] == token_ids.shape  # many tokens
    with torch.autocast("cpu", torch.bfloat16):
        model(few)
    with torch.enable_grad():
        assert model(few).logits.requires_grad
    model.float()(few)
    assert not calls
    model.bfloat16()(few)
    assert calls == [2]
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0)
    assert not model(few).logits.any()


def test_the_device_is_found_at_once():
    """`generate` asks for it at every token: no block is gone through for a parameter."""
    model = quantized()
    seen = []
    for name, module in model.named_modules():
        seen.append(name)
        if module._parameters:
            break
    assert not any(".layers." in name for name in seen)
    assert [name for name, _ in model.model.named_children()][-1] == "layers"
