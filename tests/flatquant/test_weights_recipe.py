"""Weight quantizers as part of a recipe: names and values, data, notes, what a run keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatquant
from flatquant.pipeline import calibrate
from flatquant.weights import (
    AwqClip,
    Gptq,
    HessianCollector,
    Hqq,
    MseClip,
    Rtn,
    WeightQuantizer,
    WeightTask,
)

from .conftest import build_tiny_model

RTN = flatquant.METHODS["rtn"]


def text(samples: int = 8) -> Tensor:
    return torch.randint(2, 128, (samples, 32), generator=torch.Generator().manual_seed(3))


def run(weights: str | WeightQuantizer, scheme: str = "W3A16", **more: object) -> list[dict]:
    recipe = replace(RTN(flatquant.Scheme.parse(scheme)), weights=weights)
    tokens = text() if recipe.needs_data else None
    result = calibrate(
        build_tiny_model("llama"),
        recipe,
        scheme,
        tokens,
        progress=False,
        **more,  # type: ignore[arg-type]
    )
    return [dict(block) for block in result.blocks]


def same(a: list[dict], b: list[dict]) -> bool:
    return all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


def test_a_recipe_takes_a_name_or_a_value() -> None:
    assert same(run("gptq"), run(Gptq()))
    assert not same(run("gptq"), run(Gptq(act_order=False)))
    scheme = flatquant.Scheme.parse("W4A16")
    with pytest.raises(ValueError, match=r"weights='nearest' is unknown; known: \['rtn'"):
        replace(RTN(scheme), weights="nearest")


def test_only_what_reads_inputs_needs_text() -> None:
    scheme = flatquant.Scheme.parse("W4A16")
    needs = {
        weights: replace(RTN(scheme), weights=weights).needs_data
        for weights in (Rtn(), Rtn(clip=MseClip()), Rtn(clip=AwqClip()), Hqq(), Gptq())
    }
    assert list(needs.values()) == [False, False, True, False, True]
    assert not replace(RTN(flatquant.Scheme.parse("KV4")), weights="gptq").needs_data


def test_linears_that_share_an_input_share_its_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v; o; gate, up; down: four a block."""
    made: list[HessianCollector] = []

    class Counted(HessianCollector):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr("flatquant.fit.hessians.HessianCollector", Counted)
    run("gptq")
    assert len(made) == 2 * 4


def test_queries_and_keys_are_known_to_the_clip_search() -> None:
    plain, clipped = run("rtn"), run("rtn-awq")
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"self_attn.{name}.weight_scale"
        unchanged = torch.equal(plain[0][key], clipped[0][key])
        assert unchanged == (name != "v_proj")


@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A8KV4", "W3A16-g32", "W2A16", "W8A8"])
@pytest.mark.parametrize("weights", ["gptq-mse", "hqq"])
def test_the_runtime_serves_every_rounding(scheme: str, weights: str, token_ids: Tensor) -> None:
    model = build_tiny_model("llama")
    flatquant.quantize(model, "rtn", scheme, text(), weights=weights, progress=False)
    with torch.no_grad():
        logits = model(token_ids).logits
        with flatquant.fake_quantized(model):
            simulated = model(token_ids).logits
    assert bool(logits.isfinite().all())
    assert torch.allclose(logits, simulated, rtol=1e-4, atol=1e-4)


def test_what_happened_to_the_weights_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """32 tokens cannot fill a Hessian of 96 channels: undamped, it is singular."""
    recipe = replace(RTN(flatquant.Scheme.parse("W3A16")), weights=Gptq(damp=0.0))
    with caplog.at_level("INFO", logger="flatquant"):
        result = calibrate(
            build_tiny_model("llama"), recipe, "W3A16", text(2)[:, :16], progress=False
        )
    notes = [note for entry in result.log for note in entry["notes"]]
    assert any("mlp.down_proj: damping grew from 0 to" in note for note in notes)
    assert set(notes) <= set(caplog.messages)


def test_a_rounding_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    first = run(Gptq(), work_dir=tmp_path)
    assert same(first, run("gptq", work_dir=tmp_path, resume=True))
    with pytest.raises(ValueError, match="recipe differ"):
        run(Gptq(damp=0.1), work_dir=tmp_path, resume=True)


def test_a_quantizer_made_elsewhere_is_enough() -> None:
    """A new rounding is a class; no other part has to know it."""

    class Signs(WeightQuantizer):
        def quantize(self, task: WeightTask) -> flatquant.weights.QuantizedWeight:
            scale = task.weight.abs().mean(1).float()
            codes = task.weight.sign().to(torch.int8).clamp(-2, 1)
            return flatquant.weights.QuantizedWeight(codes, scale)

    blocks = run(Signs(), "W2A16")
    assert blocks[0]["mlp.up_proj.weight_scale"].shape == (96,)
