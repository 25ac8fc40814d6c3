"""Scales, matrices and clips that a block learns: formulas in float64, and law 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import flatquant
from flatquant import pipeline
from flatquant.clips import Clips, clamped
from flatquant.methods.learned import affinequant, omniquant
from flatquant.models import FAMILIES, Site
from flatquant.models.spec import LINEAR_SITES
from flatquant.recipe import FitConfig
from flatquant.transforms.matrices import Gradual
from flatquant.transforms.scale import ChannelScale, KeyScale
from flatquant_cuda import packing

from .conftest import build_tiny_model, calibrate_tiny
from .test_laws import CALIBRATION, _Norm64, in_float64, logits

W4A4KV4 = flatquant.Scheme.parse("W4A4KV4")


def moved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put all parameters at random before the merge; the fits come to the list."""
    merge, fits, generator = pipeline.merge_block, [], torch.Generator().manual_seed(0)

    def spy(fit: Any, **options: Any) -> dict[str, Tensor]:
        fit.advance(1.0)
        for parameter in fit.parameters():
            with torch.no_grad():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        fits.append(fit)
        return merge(fit, **options)

    monkeypatch.setattr(pipeline, "merge_block", spy)
    return fits


@pytest.mark.parametrize("kind", [None, "kronecker-svd", "kronecker-gradual"])
@pytest.mark.parametrize("gqa", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_at_every_site_leave_logits_unchanged(
    family: str,
    gqa: bool,
    kind: str | None,
    token_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law 1 with all parameters somewhere else: float64 from end to end, 1e-9 relative."""
    moved(monkeypatch)
    model = in_float64(build_tiny_model(family, gqa, family != "mistral"))
    model.model.norm = _Norm64(model.model.norm)
    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, name):
                setattr(layer.self_attn, name, _Norm64(getattr(layer.self_attn, name)))
    before = logits(model, token_ids)
    # a site that is neither quantized nor transformed has no scale either
    kinds = dict.fromkeys((*LINEAR_SITES, Site.QK_HEAD), "hadamard")
    recipe = flatquant.Recipe(
        method="law",
        scheme=flatquant.Scheme(),
        transforms=dict.fromkeys(kinds, kind) | {Site.V_HEAD: kind} if kind else kinds,
        scales=dict.fromkeys(
            (*LINEAR_SITES, Site.QK_HEAD), flatquant.ScaleConfig(start="smooth", alpha=0.5)
        ),
        fit=FitConfig(epochs=0, inputs="quantized"),
    )
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    flatquant.quantize(model, recipe, flatquant.Scheme(), CALIBRATION, progress=False)
    after = model.state_dict()
    for part in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert not torch.equal(weights[name], after[name])
    assert float((logits(model, token_ids) - before).norm() / before.norm()) < 1e-9


def inputs_of(model: PreTrainedModel, names: dict[str, str]) -> dict[str, Tensor]:
    """Inputs of modules of the first block, [tokens, channels] float64, on the text."""
    seen: dict[str, Tensor] = {}
    handles = []
    for key, name in names.items():

        def hook(module: Any, args: Any, key: str = key) -> None:
            seen[key] = args[0].reshape(-1, args[0].shape[-1]).double()

        module = model.model.layers[0].get_submodule(name)
        handles.append(module.register_forward_pre_hook(hook))
    logits(model, CALIBRATION)
    for handle in handles:
        handle.remove()
    return seen


def smooth(x: Tensor, weights: list[Tensor]) -> Tensor:
    """OmniQuant's start 1/s, s = max|x|^½ / max|w|^½, at geometric mean 1."""
    largest = torch.cat([w.double() for w in weights]).abs().amax(0)
    c = (largest / x.abs().amax(0)).sqrt()
    return c / c.log().mean().exp()


def test_omniquant_merges_the_formulas_of_the_paper() -> None:
    """LET and LWC of the first block, against float64: equations 2, 3 and 5."""
    model = build_tiny_model("llama", gqa=True)
    recipe = omniquant(W4A4KV4)
    recipe = replace(recipe, fit=replace(recipe.fit, epochs=0))
    tensors = calibrate_tiny(model, recipe).blocks[0]
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    seen = inputs_of(
        model, {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.up_proj"}
    )
    heads = [attention.q_proj, attention.k_proj, attention.v_proj]
    c = smooth(seen["qkv"], [linear.weight for linear in heads])
    gamma = block.input_layernorm.weight.double() * c
    torch.testing.assert_close(tensors["input_layernorm.weight"].double(), gamma, rtol=1e-5, atol=0)
    # two query heads read one head of values: both take the geometric mean of their two scales
    out = smooth(seen["o"], [attention.o_proj.weight])
    shared = out.reshape(2, 2, 16).log().mean(1).exp()
    rows = shared.reshape(-1)
    inputs = shared.unsqueeze(1).expand(2, 2, 16).reshape(-1)
    up = smooth(seen["up"], [mlp.gate_proj.weight, mlp.up_proj.weight])
    ratio = torch.sigmoid(torch.tensor(4.0, dtype=torch.float64))
    for name, linear, scale, made in (
        ("self_attn.q_proj", attention.q_proj, c, None),
        ("self_attn.v_proj", attention.v_proj, c, rows),
        ("self_attn.o_proj", attention.o_proj, inputs, None),
        ("mlp.up_proj", mlp.up_proj, up, None),
        ("mlp.down_proj", mlp.down_proj, torch.ones(96), None),
    ):
        weight = linear.weight.double() / scale
        if made is not None:
            weight = made[:, None] * weight
        step = ratio * weight.abs().amax(1, keepdim=True) / 7
        wanted = (weight / step).round().clamp(-8, 7)
        codes = packing.unpack_nibbles(tensors[f"{name}.weight_packed"], linear.in_features)
        off = codes.double() != wanted  # float32 may fall on the other side of a rounding edge
        assert float(off.double().mean()) < 2e-3, name
        torch.testing.assert_close(
            tensors[f"{name}.weight_scale"].double(), step[:, 0], rtol=1e-5, atol=0
        )


def test_key_scale_is_merged_without_touching_a_code() -> None:
    """A learned scale of keys multiplies rows of W_k and divides rows of W_q, RoPE pair by pair."""
    recipe = flatquant.Recipe(
        method="keys",
        scheme=W4A4KV4,
        scales={Site.QK_HEAD: flatquant.ScaleConfig(start="one")},
        fit=FitConfig(epochs=3, scale_lr=0.1, batch_size=2, amp="off"),
    )
    learned = calibrate_tiny(build_tiny_model("llama"), recipe).blocks[0]
    plain = calibrate_tiny(build_tiny_model("llama"), "rtn").blocks[0]
    k = learned["self_attn.k_proj.weight_scale"] / plain["self_attn.k_proj.weight_scale"]
    q = learned["self_attn.q_proj.weight_scale"] / plain["self_attn.q_proj.weight_scale"]
    for part in ("q_proj", "k_proj"):
        name = f"self_attn.{part}.weight_packed"
        assert torch.equal(learned[name], plain[name])
    s = k.reshape(2, 2, 8)
    assert float((s - 1).abs().max()) > 0.01
    torch.testing.assert_close(s[:, 0], s[:, 1], rtol=1e-5, atol=0)
    expanded = k.reshape(2, 1, 16).expand(2, 2, 16).reshape(-1)
    torch.testing.assert_close(q, 1 / expanded, rtol=1e-5, atol=0)


def test_key_scale_goes_into_the_norms_of_heads_where_there_are_any() -> None:
    recipe = replace(omniquant(W4A4KV4), fit=FitConfig(epochs=2, scale_lr=0.1, batch_size=2))
    model = build_tiny_model("qwen3")
    tensors = calibrate_tiny(model, recipe).blocks[0]
    attention = model.model.layers[0].self_attn
    k = tensors["self_attn.k_norm.weight"] / attention.k_norm.weight
    q = tensors["self_attn.q_norm.weight"] / attention.q_norm.weight
    torch.testing.assert_close(q * k, torch.ones(16), rtol=1e-5, atol=0)
    assert float((k.detach() - 1).abs().max()) > 0.01


def test_key_scale_needs_pairs() -> None:
    with pytest.raises(ValueError, match="head_dim=15 must be even"):
        KeyScale(2, 15)


def test_channel_scales_start_where_they_are_told() -> None:
    start = torch.tensor([1.0, 2.0, 4.0, 0.25])
    torch.testing.assert_close(ChannelScale(start, positive=True).scale(), start)
    torch.testing.assert_close(ChannelScale(start, positive=False).scale(), start)
    shared = ChannelScale(start, positive=True, readers=2, head_dim=1)
    torch.testing.assert_close(shared.produced(), torch.tensor([2.0**0.5, 1.0]))
    torch.testing.assert_close(shared.scale(), torch.tensor([2.0**0.5, 2.0**0.5, 1.0, 1.0]))
    assert not list(ChannelScale(start, positive=True, learned=False).parameters())


def test_gradual_mask_widens_and_damps() -> None:
    """AffineQuant's equation 6: a band around the diagonal, times α off the diagonal."""
    matrix = Gradual(5, factor=0.25)
    with torch.no_grad():
        matrix.matrix.fill_(1.0)
        for progress, reach in ((0.0, 0), (0.3, 1), (0.5, 2), (0.99, 3), (1.0, 4)):
            matrix.advance(progress)
            p, p_inv_t = matrix.pair()
            wanted = [
                [1.0 if i == j else 0.25 * (abs(i - j) <= reach) for j in range(5)]
                for i in range(5)
            ]
            assert torch.equal(p, torch.tensor(wanted))
            torch.testing.assert_close(p_inv_t.T @ p, torch.eye(5), atol=1e-6, rtol=0)


def test_affinequant_merges_its_matrix_into_values_and_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W_v' = Pᵀ·diag(c)·W_v and W_o' = W_o·diag(1/c)·P^-T in every head, in float64."""
    model = build_tiny_model("llama", gqa=True).double()
    recipe = replace(
        affinequant(W4A4KV4),
        scheme=flatquant.Scheme(),
        clips=Clips(),
        fit=FitConfig(epochs=0),
    )
    recipe = replace(recipe, transforms=dict(recipe.transforms) | {Site.ATTN_OUT: "hadamard"})
    fits = moved(monkeypatch)
    tensors = calibrate_tiny(model, recipe).blocks[0]
    p = fits[0].values.right.pair()[0].detach().double()
    assert float((p - torch.diag(p.diag())).abs().max()) > 1e-4
    scale = fits[0].groups["attn_out"].scale
    attention = model.model.layers[0].self_attn
    v = tensors["self_attn.v_proj.weight"].reshape(2, 16, 64)
    rows = scale.produced().detach().double()
    wanted = p.T @ (rows[:, None] * attention.v_proj.weight).reshape(2, 16, 64)
    torch.testing.assert_close(v, wanted, rtol=1e-9, atol=1e-12)
    inverse = torch.linalg.inv(p).T
    o = (attention.o_proj.weight / scale.scale().double()).reshape(64, 4, 16) @ inverse
    hadamard = tensors["self_attn.o_proj.left_trans"].double()
    o = torch.einsum("onh,nm->omh", o, torch.linalg.inv(hadamard))
    torch.testing.assert_close(
        tensors["self_attn.o_proj.weight"], o.reshape(64, 64), rtol=1e-6, atol=1e-9
    )


def test_early_clips_cut_weights_before_the_transforms() -> None:
    weight = torch.tensor([[4.0, -2.0, 1.0], [3.0, 1.0, 2.0]])
    ratios = torch.tensor([[0.5, 1.0], [0.5, 0.25]])
    wanted = torch.tensor([[2.0, -1.0, 1.0], [3.0, 1.0, 2.0]])
    assert torch.equal(clamped(weight, ratios), wanted)
    results = [
        calibrate_tiny(build_tiny_model("llama"), name, epochs=2)
        for name in ("flatquant", "flatquant-early-clips")
    ]
    late, early = (result.blocks[0]["mlp.down_proj.weight_packed"] for result in results)
    assert not torch.equal(late, early)
