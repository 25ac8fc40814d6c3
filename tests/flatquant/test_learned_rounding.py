"""Where clips of weights start, and rounding that is learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flatquant
from flatquant import pipeline
from flatquant.clips import Clips, Learned
from flatquant.fit.rounding import SoftRounding
from flatquant.methods.learned import omniquant, tesseraq
from flatquant.models import Site
from flatquant.recipe import FitConfig
from flatquant.weights import WeightTask
from flatquant.weights.progressive import Progressive

from .conftest import build_tiny_model, calibrate_tiny

W4A4KV4 = flatquant.Scheme.parse("W4A4KV4")


def test_clips_of_grouped_weights_are_one_pair_a_group() -> None:
    """Nothing learned yet: every group of 16 ends at σ(4) of its own largest weight."""
    model = build_tiny_model("llama")
    recipe = omniquant(flatquant.Scheme.parse("W3A16-g16"))
    fits: list[Any] = []
    merge = pipeline.merge_block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "merge_block", lambda fit, **k: fits.append(fit) or merge(fit, **k))
        tensors = calibrate_tiny(model, recipe, epochs=0).blocks[0]
    assert fits[0].linears["mlp.down_proj"].clip.logits.shape == (2, 64 * 6)
    groups = model.model.layers[0].mlp.down_proj.weight.double().reshape(64, 6, 16)
    wanted = torch.sigmoid(torch.tensor(4.0)).double() * groups.abs().amax(-1) / 3
    torch.testing.assert_close(
        tensors["mlp.down_proj.weight_scale"].double(), wanted, rtol=1e-5, atol=0
    )


def test_awq_omniquant_starts_at_the_scales_and_clips_of_awq() -> None:
    """Values come first in the block, so AWQ's own run saw the same inputs for them."""
    scheme = flatquant.Scheme.parse("W3A16-g16")
    scales = {}
    for name, recipe in {
        "awq": flatquant.METHODS["awq"](scheme),
        "unclipped": replace(flatquant.METHODS["awq"](scheme), weights="rtn"),
        "ours": flatquant.METHODS["awq-omniquant"](scheme),
    }.items():
        tensors = calibrate_tiny(build_tiny_model("llama", gqa=False), recipe, epochs=0).blocks[0]
        scales[name] = tensors["self_attn.v_proj.weight_scale"]
        norm = tensors["input_layernorm.weight"]
        assert torch.equal(norm, scales.setdefault("norm", norm))
    widest = torch.sigmoid(torch.tensor(4.0)) * scales["unclipped"]
    assert bool((scales["awq"] < widest).any())
    torch.testing.assert_close(
        scales["ours"], torch.minimum(scales["awq"], widest), rtol=1e-5, atol=0
    )


def test_a_clip_search_of_outputs_needs_text() -> None:
    recipe = flatquant.METHODS["awq-omniquant"](flatquant.Scheme.parse("W3A16-g16"))
    assert replace(recipe, scales={}, fit=FitConfig(epochs=0)).needs_data
    assert not replace(recipe, scales={}, clips=Clips(), fit=FitConfig(epochs=0)).needs_data


def rounding_task(symmetric: bool = True) -> WeightTask:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return WeightTask(name="w", weight=weight, bits=3, group=16, clip=None, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
def test_soft_rounding_starts_at_the_weight_and_ends_at_codes(symmetric: bool) -> None:
    """Before a step ŵ = w; undisturbed, it hardens to the nearest code, by the shares given."""
    task = rounding_task(symmetric)
    rounding = SoftRounding(task, Progressive(shares=(0.5, 0.25)))
    step, zero = rounding.grid.scale.unsqueeze(-1), rounding.grid.zero.unsqueeze(-1)
    ends = [(code - zero) * step for code in (rounding.lowest, rounding.highest)]
    inside = task.rows().clamp(*ends).reshape(6, 32)
    torch.testing.assert_close(rounding().detach(), inside, rtol=0, atol=1e-5)
    for progress, share in ((0.0, 0.5), (0.6, 0.25), (1.0, 0.25)):
        rounding.advance(progress)
        decided = rounding.up.abs() == 100.0
        assert float(decided.float().mean()) == pytest.approx(1 - share, abs=0.02)
    result = rounding.hardened()
    nearest = rounding.grid.stored(rounding.grid.codes(task.rows()), task)
    assert torch.equal(result.codes, nearest.codes)
    torch.testing.assert_close(result.scale, nearest.scale)


def test_soft_rounding_is_the_formula_of_the_paper() -> None:
    """ŵ = 2σ(v)·s·(⌊w/s⌋ + clip(1.2σ(ν) − 0.1, 0, 1)) in float64."""
    task = rounding_task()
    rounding = SoftRounding(task, Progressive())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        rounding.up.copy_(torch.randn(rounding.up.shape, generator=generator))
        rounding.stretch.copy_(torch.randn(rounding.stretch.shape, generator=generator) * 0.1)
    rows = task.weight.reshape(6, 2, 16)
    s = rows.abs().amax(-1, keepdim=True) / 3
    h = (1.2 * torch.sigmoid(rounding.up.double()) - 0.1).clamp(0, 1)
    codes = ((rows / s).floor() + h).clamp(-4, 3)
    wanted = 2 * torch.sigmoid(rounding.stretch.double()).unsqueeze(-1) * s * codes
    torch.testing.assert_close(
        rounding().detach().double(), wanted.reshape(6, 32), rtol=1e-5, atol=1e-6
    )


def test_learned_rounding_beats_the_nearest() -> None:
    """On the same scales and clips; without a step it is AWQ's rounding, code by code."""
    recipe = tesseraq(flatquant.Scheme.parse("W2A16-g16"))
    results = {}
    for lr in (1e-30, 0.05):
        fit = replace(recipe.fit, epochs=40, lr=lr, inputs="float")
        results[lr] = calibrate_tiny(build_tiny_model("llama"), replace(recipe, fit=fit))
    for still, learned in zip(results[1e-30].log, results[0.05].log, strict=True):
        assert learned["end"] < 0.9 * still["end"]
    awq = calibrate_tiny(build_tiny_model("llama"), flatquant.METHODS["awq"](recipe.scheme))
    name = "self_attn.v_proj.weight_packed"
    assert torch.equal(results[1e-30].blocks[0][name], awq.blocks[0][name])


@pytest.mark.parametrize(
    "change",
    [{"clips": Clips(weights=Learned())}, {"transforms": {Site.MLP_IN: "kronecker-svd"}}],
)
def test_rounding_is_learned_of_weights_that_stand_still(change: dict[str, Any]) -> None:
    recipe = replace(tesseraq(W4A4KV4), scales={})
    with pytest.raises(ValueError, match="the weight itself stands still"):
        replace(recipe, **change)
    with pytest.raises(ValueError, match=r"shares=.* must fall"):
        Progressive(shares=(0.5, 0.6))
