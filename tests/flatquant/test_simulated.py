"""Schemes that no integer kernel serves: simulated from calibration to generation, and said so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatquant
from flatquant.runtime.linear import QuantizedLinear

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (4, 12), generator=torch.Generator().manual_seed(5))
SCHEMES = (
    "WE2M1AE2M1KVE2M1",
    "WE4M3AE4M3",
    "WE4M3XAE5M2X-static",
    "WE3M2A16-g16",
    "WMXFP4AMXFP4",
    "WNVFP4ANVFP4KVNVFP4",
    "WNVFP4ANVFP4-static",
    "W4A4KV4-ag16-kvg8",
    "W4A4KV4-asym-static",
    "W4A4-wasym-g16",
    "W3A16-wasym-g16",
    "W2A16-wasym",
    "W8A8-wasym-wtensor-static",
    "W4A4K16VE4M3",
)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens, use_cache=False).logits
    return result


@pytest.mark.parametrize("method", ["rtn", "flatquant"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_simulated_scheme_works_and_says_so(
    scheme: str, method: str, token_ids: Tensor, tmp_path: Path
) -> None:
    model = build_tiny_model("qwen2", True, True)
    before = logits(model, token_ids)
    flatquant.quantize(model, method, scheme, CALIBRATION, epochs=1, progress=False)
    after = logits(model, token_ids)
    assert 0 < float((after - before).norm() / before.norm()) < 1.5
    found = flatquant.report(model)
    assert found.scheme == scheme
    assert found.ops["simulated"] == "reference" and not found.native
    assert "all blocks as one op" not in found.decoding
    with flatquant.fake_quantized(model):
        assert torch.equal(after, logits(model, token_ids))
    model.save_pretrained(tmp_path)
    assert torch.equal(after, logits(flatquant.load(tmp_path), token_ids))


@pytest.mark.parametrize("scheme", ["W4A4KVE4M3", "W4A4KE2M1V4", "KVNVFP4", "KV4-kvg8"])
def test_generation_reads_what_perplexity_reads(scheme: str, token_ids: Tensor) -> None:
    """Simulated keys and values in the cache: the same numbers as in one pass without it."""
    model = build_tiny_model("llama")
    flatquant.quantize(model, "flatquant", scheme, CALIBRATION, epochs=1, progress=False)
    whole = logits(model, token_ids)
    with torch.no_grad():
        first = model(token_ids[:, :10], use_cache=True)
        parts = [first.logits]
        cache = first.past_key_values
        for position in range(10, token_ids.shape[1]):
            step = model(token_ids[:, position : position + 1], past_key_values=cache)
            parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)
    out = model.generate(token_ids[:1, :6], max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 12)


def test_a_cache_of_simulated_states_spreads_nan_to_those_who_attend(token_ids: Tensor) -> None:
    model = build_tiny_model("llama")
    flatquant.quantize(model, "rtn", "KVE4M3", progress=False)
    with torch.no_grad():
        clean = logits(model, token_ids)
        model.model.embed_tokens.weight[int(token_ids[0, 20])] = float("nan")
        poisoned = logits(model, token_ids)
    first = int((token_ids[0] == token_ids[0, 20]).nonzero()[0])
    assert torch.equal(poisoned[0, :first], clean[0, :first])
    assert poisoned[0, first:].isnan().all()


@pytest.mark.parametrize("scheme", ["WMXFP4AMXFP4", "W4A4-ag16", "W8A8-static", "WE4M3A16"])
def test_a_token_does_not_depend_on_its_batch(scheme: str, token_ids: Tensor) -> None:
    model = build_tiny_model("llama").to(torch.bfloat16)
    flatquant.quantize(model, "rtn", scheme, CALIBRATION, progress=False)
    together, alone = logits(model, token_ids), logits(model, token_ids[1:])
    assert together.dtype == torch.bfloat16
    assert torch.allclose(together[1:], alone, rtol=2e-2, atol=2e-2)
    codes = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all(m.kernel == "simulated" for m in codes)


def test_a_weight_grid_of_one_scale_runs_on_the_integer_kernels(token_ids: Tensor) -> None:
    model = build_tiny_model("llama")
    flatquant.quantize(model, "rtn", "W4A4KV4-wtensor", progress=False)
    found = flatquant.report(model)
    assert {entry.kernel for entry in found.linears} == {"gemm_w4a4"}
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all(len(m.weight_scale.unique()) == 1 for m in linears)  # type: ignore[union-attr]
    integer = logits(model, token_ids)
    with flatquant.fake_quantized(model):
        assert torch.equal(integer, logits(model, token_ids))


def test_static_ranges_are_those_of_the_calibration_text(token_ids: Tensor) -> None:
    model = build_tiny_model("llama")
    seen: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):

        def hook(module, args, output, index=index):  # type: ignore[no-untyped-def]
            seen.setdefault(str(index), []).append(output)

        layer.input_layernorm.register_forward_hook(hook)
    logits(model, CALIBRATION)
    result = flatquant.calibrate(model, "rtn", "W16A8-static", CALIBRATION, progress=False)
    x = torch.cat(seen["0"])
    span = result.blocks[0]["input_layernorm.span"]
    assert torch.allclose(span, torch.stack((x.max(), -x.min())), rtol=1e-5)
    with pytest.raises(ValueError, match="needs calibration text"):
        flatquant.calibrate(build_tiny_model("llama"), "rtn", "W8A8-static", progress=False)


def test_blocks_must_divide_the_layer() -> None:
    for scheme in ("WMXFP4A16", "W4A4-ag48"):
        with pytest.raises(ValueError, match="does not divide the layer's"):
            flatquant.quantize(
                build_tiny_model("llama", intermediate_size=72), "rtn", scheme, progress=False
            )
    with pytest.raises(ValueError, match="k_group=12 does not divide"):
        flatquant.quantize(build_tiny_model("llama"), "rtn", "KV4-kvg12", progress=False)
