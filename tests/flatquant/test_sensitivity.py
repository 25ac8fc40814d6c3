"""Sensitivity: against a model that is quantized in one place, and what is made of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import flatquant
from flatquant import Scheme
from flatquant.sensitivity import Sensitivity, measure_sensitivity, mixed_precision

from .conftest import build_tiny_model


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)


@pytest.mark.parametrize("method", ["rtn", "hadamard"])
@pytest.mark.filterwarnings("ignore:no Hadamard matrix")
def test_it_is_the_divergence_of_a_model_quantized_in_one_place(
    method: str, token_ids: Tensor
) -> None:
    model = build_tiny_model("qwen2", bias=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = measure_sensitivity(model, "W3A4KV4", token_ids, method=method)
    assert len(measured) == 8
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    exact = log_probabilities(model, token_ids)
    if method == "hadamard":  # its transforms stand in all blocks of a quantized model
        assert all(unit.divergence > 0 for unit in measured)
        return
    for unit in measured:
        there = "-".join(f"{linear}@{unit.block}:W3A4" for linear in unit.linears)
        alone = build_tiny_model("qwen2", bias=True)
        flatquant.quantize(alone, "rtn", f"W3A4-*_proj:16-{there}", progress=False)
        found = log_probabilities(alone, token_ids)
        wanted = float((exact.exp() * (exact - found)).sum(-1).mean())
        assert unit.divergence == pytest.approx(wanted, rel=1e-3, abs=1e-6), unit


def test_the_worst_per_parameter_are_spared_within_the_share() -> None:
    measured = [
        Sensitivity(block=b, linears=(name,), parameters=size, divergence=value)
        for b, name, size, value in (
            (0, "mlp.down_proj", 40, 8.0),
            (1, "mlp.down_proj", 40, 2.0),
            (0, "self_attn.o_proj", 10, 1.0),
            (1, "self_attn.o_proj", 10, 0.1),
        )
    ]
    assert str(mixed_precision("W4A4KV4", measured, share=0.5)) == (
        "W4A4KV4-mlp.down_proj@0:8-self_attn.o_proj@0:8"
    )
    everything = mixed_precision("W4A4KV4", measured, "W8A8", share=1.0)
    assert str(everything) == "W4A4KV4-mlp.down_proj@0..1:W8A8-self_attn.o_proj@0..1:W8A8"
    assert mixed_precision("W4A4", measured, share=0.0) == Scheme.parse("W4A4")
    with pytest.raises(ValueError, match=r"share=1\.5 must lie in"):
        mixed_precision("W4A4", measured, share=1.5)


def test_sparing_what_is_sensitive_beats_sparing_what_is_not(token_ids: Tensor) -> None:
    model = build_tiny_model("llama", intermediate_size=96)
    measured = measure_sensitivity(model, "W3A3", token_ids)
    turned = [
        Sensitivity(
            block=u.block, linears=u.linears, parameters=u.parameters, divergence=-u.divergence
        )
        for u in measured
    ]
    exact = log_probabilities(model, token_ids)
    errors = []
    for units in (measured, turned):
        scheme = mixed_precision("W3A3", units, share=0.4)
        found = log_probabilities(
            flatquant.quantize(build_tiny_model("llama"), "rtn", scheme, progress=False), token_ids
        )
        errors.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert errors[0] < errors[1]


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="needs calibration text"):
        measure_sensitivity(build_tiny_model("llama"), "W4A4", None)  # type: ignore[arg-type]
