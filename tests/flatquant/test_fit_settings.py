"""What a block is fitted on, how long, by which error: FitConfig, and Norm Tweaking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flatquant
from flatquant import pipeline
from flatquant.clips import Clips, Learned
from flatquant.fit.block import LOSSES, learning_rate
from flatquant.methods.learned import affinequant, norm_tweaking, omniquant
from flatquant.models import FAMILIES
from flatquant.recipe import FitConfig

from .conftest import build_tiny_model, calibrate_tiny
from .test_laws import CALIBRATION, logits

W4A4KV4 = flatquant.Scheme.parse("W4A4KV4")


def same(a: flatquant.CalibrationResult, b: flatquant.CalibrationResult) -> bool:
    return all(
        left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
        for left, right in zip(a.blocks, b.blocks, strict=True)
    )


def test_quantized_inputs_are_what_the_quantized_blocks_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs, and targets half way between the original's two outputs, block by block."""
    model = build_tiny_model("llama")
    recipe = replace(omniquant(W4A4KV4), fit=replace(omniquant(W4A4KV4).fit, epochs=1))
    seen: list[tuple[Tensor, Tensor]] = []
    fit_block = pipeline.fit_block

    def spy(block: Any, fit: Any, run: Any, inputs: Tensor, targets: Tensor, *rest: Any, **k: Any):  # type: ignore[no-untyped-def]
        seen.append((inputs, targets))
        return fit_block(block, fit, run, inputs, targets, *rest, **k)

    monkeypatch.setattr(pipeline, "fit_block", spy)
    result = calibrate_tiny(model, recipe)
    with torch.no_grad(), pipeline._attention(model):
        family = FAMILIES["llama"]
        hidden, run = pipeline.first_block_inputs(model, family, CALIBRATION, 4)
        first, second = model.model.layers
        exact = run(first, hidden)
        torch.testing.assert_close(seen[0][1], exact)
    other = flatquant.replace_linear(build_tiny_model("llama"), transform=result)
    with torch.no_grad():
        quantized = torch.cat([run(other.model.layers[0], part) for part in hidden.split(1)])
        assert torch.equal(seen[1][0], quantized)
        with pipeline._attention(model):
            wanted = (run(second, exact) + run(second, quantized)) / 2
    torch.testing.assert_close(seen[1][1], wanted)


def test_resume_with_quantized_inputs_equals_no_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**options: Any) -> flatquant.CalibrationResult:
        return calibrate_tiny(build_tiny_model("llama"), affinequant(W4A4KV4), epochs=2, **options)

    whole = run()
    fit_block = pipeline.fit_block
    calls: list[str] = []

    def killed(block: Any, fit: Any, *rest: Any, **options: Any) -> Any:
        calls.append(fit.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit_block(block, fit, *rest, **options)

    monkeypatch.setattr(pipeline, "fit_block", killed)
    with pytest.raises(KeyboardInterrupt):
        run(work_dir=tmp_path)
    assert same(whole, run(work_dir=tmp_path, resume=True))
    assert calls[2:] == ["model.layers.1"]


@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
def test_learning_beats_the_start(method: str) -> None:
    recipe = flatquant.METHODS[method](W4A4KV4)
    recipe = replace(recipe, fit=replace(recipe.fit, batch_size=2, inputs="float", augmented=False))
    result = calibrate_tiny(build_tiny_model("llama"), recipe, epochs=25)
    for entry in result.log:
        assert entry["end"] < entry["start"]


def test_norm_tweaking_changes_norms_only_and_moves_the_moments() -> None:
    recipe = norm_tweaking(flatquant.Scheme.parse("W3A16"))
    still = calibrate_tiny(build_tiny_model("llama"), replace(recipe, tweak_norms=False))
    recipe = replace(recipe, fit=replace(recipe.fit, epochs=20, batch_size=4, lr=2e-3))
    tweaked = calibrate_tiny(build_tiny_model("llama"), recipe)
    first, plain = tweaked.blocks[0], still.blocks[0]
    changed = {key for key in first if not torch.equal(first[key], plain[key])}
    assert changed == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert all(entry["end"] < entry["start"] for entry in tweaked.log)


def test_moments_are_those_of_the_paper() -> None:
    """Equation 2 of Norm Tweaking in float64, channel by channel."""
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    wanted = 0.0
    for channel in range(4):
        a, b = output[..., channel].flatten(), target[..., channel].flatten()
        wanted += abs(float(a.mean() - b.mean()))
        wanted += abs(float(((a - a.mean()) ** 2).mean() - ((b - b.mean()) ** 2).mean()))
    assert float(LOSSES["moments"](output, target)) == pytest.approx(wanted / 4, rel=1e-12)


@pytest.fixture
def config() -> Iterator[FitConfig]:
    yield FitConfig(epochs=2, schedule="constant", warmup_steps=2)


def test_schedules(config: FitConfig) -> None:
    rates = [learning_rate(step, 10, 1.0, config) for step in range(5)]
    assert rates == pytest.approx([0.01, 0.505, 1.0, 1.0, 1.0])
    cosine = replace(config, schedule="cosine", min_lr=0.0, warmup_steps=0)
    assert learning_rate(5, 10, 1.0, cosine) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "schedule='step' must be one of"),
        ({"inputs": "noisy"}, "inputs='noisy' must be one of"),
        ({"loss": "kl"}, "loss='kl' must be one of"),
        ({"augmented": True}, "augmented needs inputs='quantized'"),
    ],
)
def test_impossible_fits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitConfig(**options)


@pytest.mark.parametrize(
    "method", ["omniquant", "affinequant", "awq-omniquant", "norm_tweaking", "tesseraq"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_two_holds_for_learned_methods(family: str, method: str, token_ids: Tensor) -> None:
    model = build_tiny_model(family, gqa=family != "mistral", bias=family != "mistral")
    recipe = flatquant.METHODS[method](W4A4KV4)
    recipe = replace(recipe, fit=replace(recipe.fit, batch_size=2))
    flatquant.replace_linear(model, transform=calibrate_tiny(model, recipe, epochs=1))
    integer = logits(model, token_ids)
    with flatquant.fake_quantized(model):
        assert torch.equal(integer, logits(model, token_ids))


def test_paper_settings() -> None:
    """What the authors' scripts for LLaMA say (main.py and scripts/llama of OmniQuant)."""
    both = omniquant(W4A4KV4)
    assert (both.fit.epochs, both.fit.batch_size, both.fit.weight_decay) == (20, 1, 0.0)
    assert (both.fit.scale_lr, both.fit.clip_lr) == (5e-3, 1e-2)
    assert both.fit.inputs == "quantized" and both.fit.augmented
    assert both.clips == Clips(weights=Learned(start=4.0))
    weights = omniquant(flatquant.Scheme.parse("W3A16-g128"))
    assert not weights.scales and not weights.fit.augmented
    assert omniquant(flatquant.Scheme.parse("W2A16-g128")).fit.epochs == 40


@pytest.mark.parametrize("method", ["affinequant", "tesseraq"])
def test_learned_models_come_back_from_disk(method: str, tmp_path: Path, token_ids: Tensor) -> None:
    """Qwen3 holds the scale of keys in its norms of heads, outside of every runtime module."""
    model = build_tiny_model("qwen3")
    flatquant.replace_linear(model, transform=calibrate_tiny(model, method, epochs=2))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, token_ids), logits(flatquant.load(tmp_path), token_ids))
