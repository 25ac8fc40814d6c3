"""The two laws that guard everything: equivalence and deployment (docs/numerics.md)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import flatquant
from flatquant.models import FAMILIES, Site
from flatquant.transforms import TRANSFORMS
from flatquant.transforms.rotation import ROTATIONS

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (4, 12), generator=torch.Generator().manual_seed(5))
MODELS = [
    pytest.param(family, gqa, bias, id=f"{family}-{'gqa' if gqa else 'mha'}{'-bias' * bias}")
    for family in FAMILIES
    for gqa in (True, False)
    for bias in (False, True)
    if not (bias and family == "mistral")
]
BLOCK_SITES = [site for site in Site if site is not Site.RESIDUAL]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no Hadamard matrix")
        yield


class _Norm64(nn.Module):
    """RMSNorm without the detour through float32 that transformers takes in every dtype."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * scale)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    model = model.double()
    model.model.norm = _Norm64(model.model.norm)
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, _Norm64(getattr(layer, name)))
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens, use_cache=False).logits
    return result


@pytest.mark.parametrize("kind", list(TRANSFORMS))
@pytest.mark.parametrize(("family", "gqa", "bias"), MODELS)
def test_transforms_leave_logits_unchanged(
    family: str, gqa: bool, bias: bool, kind: str, token_ids: Tensor
) -> None:
    """Law 1: every transform at every site of a block, scales, no quantizer: 1e-9 relative."""
    model = in_float64(build_tiny_model(family, gqa, bias))
    before = logits(model, token_ids)
    recipe = flatquant.Recipe(
        method="law",
        scheme=flatquant.Scheme(),
        transforms=dict.fromkeys(BLOCK_SITES, kind),
        scales=dict.fromkeys(
            (Site.ATTN_IN, Site.MLP_IN, Site.MLP_OUT), flatquant.ScaleConfig(start="smooth")
        ),
        fit=flatquant.FitConfig(epochs=1, lr=0.05, amp="off"),
    )
    flatquant.quantize(model, recipe, flatquant.Scheme(), CALIBRATION, progress=False)
    after = logits(model, token_ids)
    assert float((after - before).norm() / before.norm()) < 1e-9


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", list(ROTATIONS))
@pytest.mark.parametrize(("family", "gqa", "bias"), MODELS)
def test_rotations_of_the_residual_stream_leave_logits_unchanged(
    family: str, gqa: bool, bias: bool, kind: str, tied: bool, token_ids: Tensor
) -> None:
    """Law 1 for the whole model, alone and with scales and transforms within the blocks."""
    model = in_float64(build_tiny_model(family, gqa, bias, tie_word_embeddings=tied))
    before = logits(model, token_ids)
    for within in ({}, dict.fromkeys(BLOCK_SITES, "kronecker-svd")):
        recipe = flatquant.Recipe(
            method="law",
            scheme=flatquant.Scheme(),
            transforms={**within, Site.RESIDUAL: kind},
            scales=dict.fromkeys(
                [site for site in (Site.ATTN_IN, Site.MLP_OUT) if site in within],
                flatquant.ScaleConfig(start="smooth"),
            ),
            fit=flatquant.FitConfig(epochs=1, lr=0.05, amp="off"),
        )
        turned = copy.deepcopy(model)
        flatquant.quantize(turned, recipe, flatquant.Scheme(), CALIBRATION, progress=False)
        after = logits(turned, token_ids)
        assert float((after - before).norm() / before.norm()) < 1e-9
        rows = [found.get_input_embeddings().weight.detach() for found in (turned, model)]
        assert float((rows[0] - rows[1]).norm()) > 1


SCHEMES = ("W4A4KV4", "W4A4KV4-asym", "W4A8KV4", "W3A4K4V2", "W4A6", "W2A8KV8")
SCHEMES += ("W8A8", "W6A4KV4-asym")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("family", "gqa", "bias"), MODELS)
def test_fake_quantized_logits_equal_the_integer_kernels(
    family: str, gqa: bool, bias: bool, scheme: str, token_ids: Tensor
) -> None:
    """Law 2, float32 on the CPU: bit for bit."""
    model = build_tiny_model(family, gqa, bias)
    flatquant.quantize(model, "flatquant", scheme, CALIBRATION, epochs=1, progress=False)
    integer = logits(model, token_ids)
    with flatquant.fake_quantized(model):
        simulated = logits(model, token_ids)
    assert torch.equal(integer, simulated)
    assert torch.isfinite(integer).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rtn", "hadamard", "flatquant"])
def test_law_two_holds_in_half_precision(
    method: str, dtype: torch.dtype, token_ids: Tensor
) -> None:
    model = build_tiny_model("qwen2", True, True).to(dtype)
    flatquant.quantize(model, method, "W4A4KV4", CALIBRATION, epochs=1, progress=False)
    integer = logits(model, token_ids)
    with flatquant.fake_quantized(model):
        assert torch.equal(integer, logits(model, token_ids))


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16-g16", "W2A16-g32"])
def test_weight_only_models_agree_with_their_simulation(scheme: str, token_ids: Tensor) -> None:
    """Floating-point inputs accumulate in another order: close, not equal."""
    model = build_tiny_model("llama", True, False)
    flatquant.quantize(model, "flatquant", scheme, CALIBRATION, epochs=1, progress=False)
    packed = logits(model, token_ids)
    with flatquant.fake_quantized(model):
        simulated = logits(model, token_ids)
    assert torch.allclose(packed, simulated, rtol=1e-4, atol=1e-5)


def test_calibration_sees_what_deployment_runs(token_ids: Tensor) -> None:
    """The differentiable block and the deployed one differ only where rounding is on an edge."""
    from flatquant import pipeline
    from flatquant.fit import block as fit_block_module

    seen: list[Tensor] = []
    original = pipeline.merge_block

    model = build_tiny_model("llama", True, True)
    states: list[tuple[object, ...]] = []

    def spy(fit, **kwargs):  # type: ignore[no-untyped-def]
        states.append((fit,))
        return original(fit, **kwargs)

    pipeline.merge_block = spy
    try:
        result = flatquant.calibrate(
            model, "flatquant", "W4A4KV4", CALIBRATION, epochs=2, progress=False
        )
    finally:
        pipeline.merge_block = original
    fit = states[0][0]
    family = fit.context.family  # type: ignore[attr-defined]
    with pipeline._attention(model), torch.no_grad():
        hidden, run = pipeline.first_block_inputs(model, family, token_ids, 2)
        block = model.model.layers[0]
        for linear in fit.linears.values():  # type: ignore[attr-defined]
            linear.fixed, linear.amp = None, False
        fit.heads.amp = False  # type: ignore[attr-defined]
        seen.append(fit_block_module.forward_fit(block, fit, run, hidden, family.attention))
    result.apply(model)
    with torch.no_grad():
        deployed = run(model.model.layers[0], hidden)
    error = (deployed - seen[0]).norm() / seen[0].norm()
    assert float(error) < 0.02
