"""Calibration end to end on tiny models: it learns, resumes exactly, and refuses bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatquant
from flatquant import pipeline
from flatquant.clips import LEARNED_CLIPS
from flatquant.fit import FitDivergedError

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(5))


def calibrate(model: object, **options: object) -> flatquant.CalibrationResult:
    arguments: dict[str, object] = {"epochs": 2, "progress": False} | options
    return flatquant.calibrate(model, "flatquant", "W4A4KV4", CALIBRATION, **arguments)  # type: ignore[arg-type]


def same(a: flatquant.CalibrationResult, b: flatquant.CalibrationResult) -> bool:
    return a.plan == b.plan and all(
        left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
        for left, right in zip(a.blocks, b.blocks, strict=True)
    )


def test_fitting_lowers_the_error_of_every_block() -> None:
    result = calibrate(build_tiny_model("llama"), epochs=8)
    for entry in result.log:
        assert entry["end"] < entry["start"]


def test_the_model_is_not_changed() -> None:
    model = build_tiny_model("qwen2", bias=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    calibrate(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config._attn_implementation == attention


def test_a_run_is_reproducible_and_the_seed_matters() -> None:
    first, second = (calibrate(build_tiny_model("llama")) for _ in range(2))
    assert same(first, second)
    recipe = flatquant.METHODS["flatquant-paper"](flatquant.Scheme.parse("W4A4KV4"))
    seeds = [
        flatquant.calibrate(
            build_tiny_model("llama"),
            recipe,
            "W4A4KV4",
            CALIBRATION,
            epochs=1,
            seed=seed,
            progress=False,
        )
        for seed in (0, 1)
    ]
    assert not same(*seeds)


def test_resume_equals_no_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed inside the second block continues to the very same bits."""
    whole = calibrate(build_tiny_model("llama"))
    fit_block = pipeline.fit_block
    calls = []

    def killed(block, fit, *rest, **options):  # type: ignore[no-untyped-def]
        calls.append(fit.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit_block(block, fit, *rest, **options)

    monkeypatch.setattr(pipeline, "fit_block", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(build_tiny_model("llama"), work_dir=tmp_path)
    assert [file.name for file in tmp_path.glob("block-*.safetensors")] == [
        "block-00000.safetensors"
    ]
    resumed = calibrate(build_tiny_model("llama"), work_dir=tmp_path, resume=True)
    assert calls[2:] == ["model.layers.1"]
    assert same(whole, resumed)
    assert same(whole, calibrate(build_tiny_model("llama"), work_dir=tmp_path, resume=True))


def test_a_damaged_block_is_fitted_again(tmp_path: Path) -> None:
    whole = calibrate(build_tiny_model("llama"), work_dir=tmp_path)
    file = tmp_path / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"block-00001.safetensors is unreadable"):
        resumed = calibrate(build_tiny_model("llama"), work_dir=tmp_path, resume=True)
    assert same(whole, resumed)


def test_a_work_dir_of_another_run_is_refused(tmp_path: Path) -> None:
    calibrate(build_tiny_model("llama"), work_dir=tmp_path)
    with pytest.raises(ValueError, match="pass resume=True"):
        calibrate(build_tiny_model("llama"), work_dir=tmp_path)
    with pytest.raises(ValueError, match="seed differ"):
        calibrate(build_tiny_model("llama"), work_dir=tmp_path, resume=True, seed=1)
    with pytest.raises(ValueError, match="model differ"):
        calibrate(build_tiny_model("llama", seed=9), work_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="needs work_dir"):
        calibrate(build_tiny_model("llama"), resume=True)


def test_results_round_trip_through_disk(tmp_path: Path, token_ids: Tensor) -> None:
    model = build_tiny_model("qwen3")
    result = calibrate(model)
    result.save(tmp_path)
    loaded = flatquant.CalibrationResult.load(tmp_path)
    assert same(result, loaded)
    flatquant.replace_linear(model, transform=loaded)
    other = flatquant.replace_linear(build_tiny_model("qwen3"), transform=result)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, other(token_ids).logits)
    (tmp_path / "block-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"block-00001.safetensors is missing"):
        flatquant.CalibrationResult.load(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "needs calibration text"),
        (torch.zeros(4, dtype=torch.int64), r"expected int64 token ids \[samples, seqlen\]"),
        (torch.zeros(2, 4), r"got torch.float32 \[2, 4\]"),
        (torch.zeros(0, 16, dtype=torch.int64), "0 samples of 16 tokens"),
        (torch.zeros(3, 1, dtype=torch.int64), "3 samples of 1 tokens"),
        (torch.full((2, 8), 128), r"span 128\.\.128, the vocabulary is 0\.\.127"),
    ],
)
def test_unusable_calibration_text(tokens: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatquant.calibrate(build_tiny_model("llama"), calibration=tokens, progress=False)


def test_crops_of_a_short_text_are_refused() -> None:
    with pytest.raises(ValueError, match="has 10 tokens, one sample needs 17"):
        flatquant.random_crops(torch.arange(10), 4, 16)
    crops = flatquant.random_crops(torch.arange(100), 4, 16, seed=1)
    assert crops.shape == (4, 16)
    assert torch.equal(crops, flatquant.random_crops(torch.arange(100), 4, 16, seed=1))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight: 1 of \d+ values"):
        calibrate(model)


def test_divergence_names_block_epoch_and_remedy() -> None:
    recipe = flatquant.METHODS["flatquant"](flatquant.Scheme.parse("W4A4KV4"))
    wild = flatquant.Recipe(
        method="wild",
        scheme=recipe.scheme,
        transforms=recipe.transforms,
        scales=recipe.scales,
        clips=LEARNED_CLIPS,
        fit=flatquant.FitConfig(epochs=3, lr=1e30),
    )
    with pytest.raises(FitDivergedError, match=r"model.layers.0, epoch \d.*Remedy: amp='off'"):
        flatquant.calibrate(build_tiny_model("llama"), wild, "W4A4KV4", CALIBRATION, progress=False)


def test_unknown_names_are_refused() -> None:
    model = build_tiny_model("llama")
    with pytest.raises(ValueError, match="method 'best' is unknown"):
        flatquant.calibrate(model, "best", "W4A4", CALIBRATION)
    with pytest.raises(ValueError, match="weights='nearest' is unknown"):
        flatquant.calibrate(model, "rtn", "W4A4", weights="nearest")
    with pytest.raises(ValueError, match="transform='fft' must be one of"):
        flatquant.replace_linear(model, transform="fft")
    model.config.model_type = "bloom"
    with pytest.raises(ValueError, match="model_type='bloom' is not supported"):
        flatquant.calibrate(model, "rtn", "W4A4")


def test_gradient_accumulation_takes_fewer_steps() -> None:
    recipe = flatquant.METHODS["flatquant"](flatquant.Scheme.parse("W4A4"))
    accumulated = flatquant.Recipe(
        method="flatquant",
        scheme=recipe.scheme,
        transforms=recipe.transforms,
        scales=recipe.scales,
        clips=LEARNED_CLIPS,
        fit=flatquant.FitConfig(epochs=4, batch_size=2, accumulate=2),
    )
    result = flatquant.calibrate(
        build_tiny_model("llama"), accumulated, "W4A4", CALIBRATION, progress=False
    )
    assert all(entry["end"] < entry["start"] for entry in result.log)
