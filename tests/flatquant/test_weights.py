"""Weight quantizers: scales, codes, and GPTQ against its float64 definition."""

from __future__ import annotations

import pytest
import torch

import flatquant
import flatquant_cuda as fq
from flatquant.weights import WEIGHT_QUANTIZERS, WeightTask

from .conftest import build_tiny_model


def task(bits: int = 4, group: int | None = None, seed: int = 0, **more: object) -> WeightTask:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 64, generator=generator, dtype=torch.float64)
    mix = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(512, 64, generator=generator, dtype=torch.float64) @ mix
    return WeightTask(
        name="w", weight=weight, bits=bits, group=group, clip=None, hessian=x.T @ x, **more
    )  # type: ignore[arg-type]


def loss(t: WeightTask, quantizer: str) -> float:
    delta = t.weight - WEIGHT_QUANTIZERS[quantizer].quantize(t).dequantize().double()
    assert t.hessian is not None
    return float(((delta @ t.hessian) * delta).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_round_to_nearest_is_the_reference(bits: int, group: int | None) -> None:
    t = task(bits, group)
    ours = WEIGHT_QUANTIZERS["rtn"].quantize(t)
    codes, scale = fq.reference.quantize_weight(t.weight.float(), bits, group)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, scale)


def test_clip_ratios_narrow_the_grid() -> None:
    t = task()
    clipped = WeightTask(
        name="w", weight=t.weight, bits=4, group=None, clip=torch.full((2, 24), 0.5)
    )
    wide, narrow = (WEIGHT_QUANTIZERS["rtn"].quantize(x).scale for x in (t, clipped))
    assert torch.equal(narrow, wide / 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gptq_never_loses_to_rtn(bits: int, group: int | None, seed: int) -> None:
    t = task(bits, group, seed)
    assert loss(t, "gptq") < loss(t, "rtn")


def test_gptq_is_its_definition() -> None:
    """Against the plain formula: after each column, the optimal update of those to come."""
    t = task()
    assert t.hessian is not None
    scale = WEIGHT_QUANTIZERS["rtn"].quantize(t).scale.double()
    h = t.hessian + 0.01 * t.hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    weight = t.weight.clone()
    codes = torch.zeros_like(weight)
    for j in range(64):
        inverse = torch.linalg.inv(h[j:, j:])
        codes[:, j] = (weight[:, j] / scale).round().clamp(-8, 7)
        error = (weight[:, j] - codes[:, j] * scale) / inverse[0, 0]
        weight[:, j:] -= torch.outer(error, inverse[0])
    found = WEIGHT_QUANTIZERS["gptq"].quantize(t).codes
    assert float((found != codes).double().mean()) < 1e-3


def test_gptq_needs_data_and_helps_a_model(token_ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="needs calibration text"):
        flatquant.calibrate(build_tiny_model("llama"), "rtn", "W4A16", weights="gptq")
    text = torch.randint(2, 128, (16, 32), generator=torch.Generator().manual_seed(3))
    errors = {}
    with torch.no_grad():
        before = build_tiny_model("llama")(text).logits
        for weights in ("rtn", "gptq"):
            model = build_tiny_model("llama")
            flatquant.quantize(model, "rtn", "W3A16", text, weights=weights, progress=False)
            errors[weights] = float((model(text).logits - before).square().mean())
    assert errors["gptq"] < errors["rtn"]
