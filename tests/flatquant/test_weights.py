"""Weight quantizers: the registry, rounding to nearest, the Hessian, and a whole model."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

import flatquant
import flatquant_cuda as fq
from flatquant.weights import (
    WEIGHT_QUANTIZERS,
    HessianCollector,
    WeightQuantizer,
    WeightTask,
    weight_quantizer,
)

from .conftest import build_tiny_model


def make_task(
    bits: int = 4,
    group: int | None = None,
    seed: int = 0,
    *,
    rows: int = 24,
    width: int = 64,
    symmetric: bool = True,
) -> WeightTask:
    """A random weight and the Hessian of correlated inputs of unequal power, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    mix = mix * torch.rand(width, generator=generator, dtype=torch.float64).add(0.1)
    x = torch.randn(8 * width, width, generator=generator, dtype=torch.float64) @ mix
    return WeightTask(
        name="w",
        weight=weight,
        bits=bits,
        group=group,
        clip=None,
        hessian=x.T @ x,
        symmetric=symmetric,
    )


def layer_error(task: WeightTask, quantizer: str | WeightQuantizer) -> float:
    """tr(Δ·H·Δᵀ)."""
    result = weight_quantizer(quantizer).quantize(task)
    delta = task.weight - result.dequantize().double()
    assert task.hessian is not None
    return float(((delta @ task.hessian) * delta).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_round_to_nearest_is_the_reference(bits: int, group: int | None) -> None:
    task = make_task(bits, group)
    ours = WEIGHT_QUANTIZERS["rtn"].quantize(task)
    codes, scale = fq.reference.quantize_weight(task.weight.float(), bits, group)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, scale)
    assert ours.zero is None


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_asymmetric_round_to_nearest_is_the_formula(bits: int, group: int | None) -> None:
    """docs/numerics.md: lo, hi, s, z, q; codes are stored 2^(b−1) lower, and so is z."""
    task = make_task(bits, group, symmetric=False)
    task = replace(task, weight=task.weight + 0.7)
    ours = WEIGHT_QUANTIZERS["rtn"].quantize(task)
    rows = task.weight.float().reshape(24, -1, group or 64).numpy().astype("float64")
    low, high = rows.min(-1, keepdims=True).clip(max=0), rows.max(-1, keepdims=True).clip(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round().clip(0, 2**bits - 1)
    codes = ((rows / scale).round() + zero).clip(0, 2**bits - 1)
    values = torch.from_numpy((codes - zero) * scale).reshape(24, 64)
    assert ours.zero is not None and ours.zero.shape == ours.scale.shape
    assert ours.codes.dtype == torch.int8
    assert torch.equal(
        ours.codes.double(), torch.from_numpy(codes).reshape(24, 64) - 2 ** (bits - 1)
    )
    assert torch.allclose(ours.dequantize().double(), values, rtol=1e-6, atol=1e-6)


def test_clip_ratios_narrow_the_grid() -> None:
    task = make_task()
    clipped = replace(task, clip=torch.full((2, 24), 0.5))
    wide, narrow = (WEIGHT_QUANTIZERS["rtn"].quantize(x).scale for x in (task, clipped))
    assert torch.equal(narrow, wide / 2)


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_quantizer_keeps_the_format(name: str, group: int | None, symmetric: bool) -> None:
    task = make_task(3, group, symmetric=symmetric)
    task = replace(task, clip=torch.full((2, 24), 0.9))
    before = task.weight.clone()
    result = WEIGHT_QUANTIZERS[name].quantize(task)
    assert result.codes.dtype == torch.int8 and result.codes.shape == (24, 64)
    assert result.codes.is_contiguous() and result.scale.is_contiguous()
    assert int(result.codes.min()) >= -4 and int(result.codes.max()) <= 3
    assert result.scale.dtype == torch.float32
    assert result.scale.shape == ((24,) if group is None else (24, 2))
    assert (result.zero is None) == symmetric
    assert torch.equal(task.weight, before)
    assert float((result.dequantize() - task.weight).abs().mean()) < 1.0


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_quantizers_are_values(name: str) -> None:
    value = WEIGHT_QUANTIZERS[name]
    assert dataclasses.is_dataclass(value)
    assert value == type(value)(**vars(value))
    assert hash(value) == hash(replace(value))
    assert weight_quantizer(name) is weight_quantizer(value) is value
    with pytest.raises(ValueError, match="weights='nearest' is unknown"):
        weight_quantizer("nearest")


@pytest.mark.parametrize("name", [n for n, q in WEIGHT_QUANTIZERS.items() if q.needs_hessian])
def test_a_missing_or_broken_hessian_is_named(name: str) -> None:
    task = make_task()
    with pytest.raises(ValueError, match=r"w needs the Hessian of its inputs"):
        WEIGHT_QUANTIZERS[name].quantize(replace(task, hessian=None))
    assert task.hessian is not None
    broken = task.hessian.clone()
    broken[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"the Hessian of w holds NaN or Inf"):
        WEIGHT_QUANTIZERS[name].quantize(replace(task, hessian=broken))


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_and_constant_rows_survive(name: str, symmetric: bool) -> None:
    task = make_task(symmetric=symmetric)
    weight = task.weight.clone()
    weight[3], weight[4] = 0.0, 0.25
    result = WEIGHT_QUANTIZERS[name].quantize(replace(task, weight=weight))
    assert torch.equal(result.dequantize()[3], torch.zeros(64))
    assert bool(result.dequantize().isfinite().all())


@pytest.mark.parametrize(
    ("precision", "kept", "bound"),
    [
        ("float32", torch.float32, 1e-6),
        ("mixed", torch.float64, 1e-6),
        ("float64", torch.float64, 1e-14),
    ],
)
def test_the_hessian_is_the_sum_over_any_batching(
    precision: str, kept: torch.dtype, bound: float
) -> None:
    x = torch.randn(5, 1000, 24, generator=torch.Generator().manual_seed(0))
    exact = x.reshape(-1, 24).double().T @ x.reshape(-1, 24).double()
    collector = HessianCollector(precision)
    for part in (x[:1], x[1], x[2:]):
        collector(part)
    assert collector.hessian is not None
    assert collector.hessian.dtype == kept
    assert collector.count == 5000
    assert float((collector.hessian - exact).abs().max() / exact.diagonal().max()) < bound
    assert torch.allclose(collector.hessian, collector.hessian.T, rtol=1e-5, atol=1e-2)
    half = HessianCollector(precision)
    half(x.bfloat16())
    assert half.hessian is not None and half.hessian.dtype == kept


def test_the_hessian_keeps_nothing_but_itself() -> None:
    """What is held after any number of batches: H, and one product in "mixed"."""
    for precision, matrices in (("float32", 1), ("mixed", 2), ("float64", 1)):
        collector = HessianCollector(precision)
        for _ in range(4):
            collector(torch.ones(3000, 16))
        held = [v for v in vars(collector).values() if isinstance(v, torch.Tensor)]
        assert [tuple(v.shape) for v in held] == [(16, 16)] * matrices
        assert collector.hessian is not None
        assert torch.equal(collector.hessian.double(), torch.full((16, 16), 12000.0).double())
    with pytest.raises(ValueError, match="precision='half' must be one of"):
        HessianCollector("half")


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
