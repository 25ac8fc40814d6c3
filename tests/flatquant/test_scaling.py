"""SmoothQuant, OS+ and AWQ against independent float64 writings of their papers' formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import flatquant
from flatquant.models import Site
from flatquant.models.spec import LINEAR_SITES
from flatquant.scales import PowerSearch, ScaleConfig, ThresholdSearch
from flatquant.weights import Rtn
from flatquant_cuda import packing

from .conftest import FAMILIES, build_tiny_model

CALIBRATION = torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(5))
METHODS = ("smoothquant", "os_plus", "awq", "awq-asym", "awq-gptq")
LINEARS = {
    Site.ATTN_IN: ("self_attn", ("q_proj", "k_proj", "v_proj")),
    Site.ATTN_OUT: ("self_attn.o_proj", ("",)),
    Site.MLP_IN: ("mlp", ("gate_proj", "up_proj")),
    Site.MLP_OUT: ("mlp.down_proj", ("",)),
}
NORMS = {Site.ATTN_IN: "input_layernorm", Site.MLP_IN: "post_attention_layernorm"}


def build_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A tiny model in which some channels behind the norms are much larger than others."""
    model = build_tiny_model(family, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in NORMS.values():
                gains = torch.randn(64, generator=generator).mul(1.5).exp()
                layer.get_submodule(norm).weight.mul_(gains)
    return model


def calibrate(
    model: PreTrainedModel, method: str | flatquant.Recipe, scheme: str = "W4A4", **options: Any
) -> flatquant.CalibrationResult:
    return flatquant.calibrate(model, method, scheme, CALIBRATION, progress=False, **options)


def nearest(rows: Tensor, bits: int) -> Tensor:
    """Values of the symmetric grid of every row, float64."""
    scale = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


class Layer:
    """The module in which a site's linears meet, its calls in a forward pass, float64."""

    def __init__(self, model: PreTrainedModel, site: Site) -> None:
        model = copy.deepcopy(model).double()
        where, names = LINEARS[site]
        self.module = model.model.layers[0].get_submodule(where)
        self.weights = [self.module.get_submodule(name).weight for name in names]
        self.before = [weight.detach().clone() for weight in self.weights]
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            model(CALIBRATION, use_cache=False)
        handle.remove()
        ((args, self.kwargs),) = calls
        self.rest = args[1:]
        self.x: Tensor = args[0] if args else self.kwargs.pop("hidden_states")
        self.output = self.run(self.x)

    def run(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.module(x, *self.rest, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def error(self, s: Tensor, w_bits: int, a_bits: int) -> float:
        """Output error with Q(W·s) and Q(x/s)."""
        x = self.x if a_bits == 16 else nearest(self.x / s, a_bits) * s
        with torch.no_grad():
            for weight, before in zip(self.weights, self.before, strict=True):
                weight.copy_(nearest(before * s, w_bits) / s)
            output = self.run(x)
            for weight, before in zip(self.weights, self.before, strict=True):
                weight.copy_(before)
        return float((output - self.output).square().mean())


def proportional(a: Tensor, b: Tensor) -> bool:
    ratio = a.double() / b.double()
    return bool(torch.allclose(ratio, ratio.mean(), rtol=1e-4))


def merged_c(model: PreTrainedModel, result: flatquant.CalibrationResult, site: Site) -> Tensor:
    """c of a site of the first block, read from what took it up."""
    layer, block = model.model.layers[0], result.blocks[0]
    if site in NORMS:
        return block[f"{NORMS[site]}.weight"] / layer.get_submodule(NORMS[site]).weight.detach()
    values = site is Site.ATTN_OUT
    name = "self_attn.v_proj" if values else "mlp.up_proj"
    weight = layer.get_submodule(name).weight.detach()
    weight = weight / merged_c(model, result, Site.ATTN_IN if values else Site.MLP_IN)
    rows = weight.abs().amax(1) / (2 ** (result.plan.scheme.w_bits - 1) - 1)
    return block[f"{name}.weight_scale"] / rows


@pytest.mark.parametrize("site", [Site.ATTN_IN, Site.MLP_IN])
def test_smoothquant_is_its_paper(site: Site) -> None:
    """s_j = max|X_j|^α / max|W_j|^(1−α), X̂ = X/s, Ŵ = s·W (equations 3 and 4), α = 0.5."""
    model = build_model()
    result = calibrate(model, "smoothquant", "W8A8")
    layer = Layer(model, site)
    w_max = torch.cat(layer.before).abs().amax(0)
    s = (layer.x.abs().flatten(0, -2).amax(0) / w_max).sqrt()
    assert proportional(merged_c(model, result, site), 1 / s)
    where, names = LINEARS[site]
    for name, weight in zip(names, layer.before, strict=True):
        rows = weight * s
        codes = nearest(rows, 8) / rows.abs().amax(1, keepdim=True) * 127
        ours = result.blocks[0][f"{where}.{name}.weight_packed"].double()
        assert float((ours - codes.round()).abs().max()) <= 1
        assert float((ours != codes.round()).double().mean()) < 1e-3


def powers(layer: Layer) -> Iterator[Tensor]:
    """AWQ, equation 5: s = s_X^α with s_X the mean magnitude, α on a grid of 20 in [0, 1)."""
    for step in range(20):
        yield layer.x.abs().flatten(0, -2).mean(0) ** (step / 20)


def thresholds(layer: Layer) -> Iterator[Tensor]:
    """OS+, equation 6: s_j = max(1, max|X_j|/t), t from max|X| to 1 in at least 100 steps."""
    x_max = layer.x.abs().flatten(0, -2).amax(0)
    count = max(100, int(float(x_max.max()) / 0.5))
    for t in torch.linspace(float(x_max.max()), 1.0, count + 1, dtype=torch.float64):
        yield (x_max / t).clamp(min=1)


@pytest.mark.parametrize(
    ("method", "grid", "site", "scheme"),
    [
        *(("awq", powers, site, "W3A16") for site in LINEAR_SITES),
        ("awq", powers, Site.MLP_IN, "W4A8"),
        *(("os_plus", thresholds, site, "W6A6") for site in NORMS),
    ],
)
def test_searches_find_what_their_papers_define(
    method: str, grid: Callable[[Layer], Iterator[Tensor]], site: Site, scheme: str
) -> None:
    """The scale whose output error, written out in float64, is the least on the paper's grid."""
    model = build_model(gqa=False)
    recipe = replace(flatquant.METHODS[method](flatquant.Scheme.parse(scheme)), weights=Rtn())
    result = calibrate(model, recipe, scheme)
    layer = Layer(model, site)
    parsed = flatquant.Scheme.parse(scheme)
    candidates = list(grid(layer))
    errors = [layer.error(s, parsed.w_bits, parsed.a_bits) for s in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    assert best > 0, "a search that finds nothing shows nothing"
    c = merged_c(model, result, site)
    assert proportional(c, 1 / candidates[best]), (best, errors[best], errors[0])


@pytest.mark.parametrize(
    ("method", "family", "gqa"),
    [
        *((method, "llama", False) for method in METHODS),
        *((method, family, True) for family in FAMILIES for method in ("smoothquant", "awq")),
        *(("awq", family, False) for family in FAMILIES if family != "llama"),
    ],
)
def test_law_two(method: str, family: str, gqa: bool, token_ids: Tensor) -> None:
    """Fake-quantized logits equal the integer kernels', also where values are scaled."""
    model = build_model(family, gqa=gqa, bias=family != "mistral")
    flatquant.quantize(model, method, "W4A4KV4", CALIBRATION, progress=False)
    with torch.no_grad():
        integer = model(token_ids).logits
        with flatquant.fake_quantized(model):
            assert torch.equal(integer, model(token_ids).logits)
    assert bool(integer.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_runs_repeat_resume_and_survive_disk(
    method: str, tmp_path: Path, token_ids: Tensor
) -> None:
    first = calibrate(build_model(gqa=False), method, "W4A4KV4", work_dir=tmp_path / "run")
    second = calibrate(build_model(gqa=False), method, "W4A4KV4")
    (tmp_path / "run" / "block-00001.safetensors").unlink()
    resumed = calibrate(
        build_model(gqa=False), method, "W4A4KV4", work_dir=tmp_path / "run", resume=True
    )
    for other in (second, resumed):
        for a, b in zip(first.blocks, other.blocks, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    model = flatquant.replace_linear(build_model(gqa=False), transform=first)
    model.save_pretrained(tmp_path / "model")
    loaded = flatquant.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, loaded(token_ids).logits)


@pytest.mark.parametrize(
    ("method", "scheme", "share"),
    [("smoothquant", "W8A8", 0.8), ("os_plus", "W6A6", 0.96), ("awq", "W3A16", 0.8)],
)
def test_scales_help_where_channels_differ(
    method: str, scheme: str, share: float, token_ids: Tensor
) -> None:
    def error(method: str) -> float:
        model = build_model(gqa=False)
        with torch.no_grad():
            before = model(token_ids).logits
            flatquant.quantize(model, method, scheme, CALIBRATION, progress=False)
            return float((model(token_ids).logits - before).norm())

    assert error(method) < share * error("rtn")


def test_what_was_found_stands_in_the_log() -> None:
    result = calibrate(build_model(gqa=True), "awq", "W3A16")
    notes = list(result.log[0]["notes"])
    assert any("attn_in: alpha 0." in note and "of the output error" in note for note in notes)
    assert any(
        "no scale at attn_out: 4 heads read the values of 2 key-value heads" in note
        for note in notes
    )


def test_a_producer_that_is_left_alone_takes_up_nothing(token_ids: Tensor) -> None:
    """up_proj keeps its weights, so down_proj's input cannot be scaled."""
    model = build_model()
    ignore = ("re:.*(up|gate)_proj",)
    result = calibrate(model, "awq", "W8A8", ignore=ignore)
    assert any("mlp.up_proj is left alone" in note for note in result.log[0]["notes"])
    with torch.no_grad():
        before = model(token_ids).logits
        after = flatquant.replace_linear(model, transform=result)(token_ids).logits
    assert float((after - before).norm() / before.norm()) < 0.1


def test_a_shift_is_refused_with_its_reason() -> None:
    recipe = flatquant.METHODS["os_plus"](flatquant.Scheme.parse("W4A4"))
    shifted = {site: replace(config, shift=True) for site, config in recipe.scales.items()}
    with pytest.raises(ValueError, match=r"a bias of input_layernorm, and LlamaRMSNorm has none"):
        calibrate(build_model(), replace(recipe, scales=shifted))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="PowerSearch: steps=0 must be positive"):
        PowerSearch(steps=0)
    with pytest.raises(ValueError, match=r"ThresholdSearch: stride=-1.0 must be positive"):
        ThresholdSearch(stride=-1.0)
    with pytest.raises(ValueError, match="attn_in has a transform"):
        flatquant.Recipe(
            method="mixed",
            scheme=flatquant.Scheme.parse("W4A4"),
            transforms={Site.ATTN_IN: "hadamard"},
            scales={Site.MLP_IN: ScaleConfig(search=PowerSearch())},
        )


def test_the_weights_can_join_the_power_search() -> None:
    """The variant of AWQ's first code: s = x^α / w^(1−α)."""
    model = build_model(gqa=False)
    scale = ScaleConfig(search=PowerSearch(by_weights=True), learned=False)
    recipe = flatquant.Recipe(
        method="awq-v1", scheme=flatquant.Scheme(), scales={Site.MLP_OUT: scale}
    )
    result = calibrate(model, recipe, "W3A16")
    layer = Layer(model, Site.MLP_OUT)
    x, w = layer.x.abs().flatten(0, -2).mean(0), layer.before[0].abs().amax(0)
    grid = [torch.ones_like(x), *(x ** (i / 20) / w ** (1 - i / 20) for i in range(20))]
    errors = [layer.error(s, 3, 16) for s in grid]
    best = min(range(len(grid)), key=errors.__getitem__)
    assert proportional(merged_c(model, result, Site.MLP_OUT), 1 / grid[best])


def test_packed_codes_are_those_of_the_scaled_weight() -> None:
    """down_proj of AWQ holds Q(W·s) on the searched s, without the clip search."""
    model = build_model(gqa=False)
    recipe = replace(flatquant.METHODS["awq"](flatquant.Scheme.parse("W4A16")), weights=Rtn())
    result = calibrate(model, recipe, "W4A16")
    s = 1 / merged_c(model, result, Site.MLP_OUT).double()
    rows = model.model.layers[0].mlp.down_proj.weight.detach().double() * s
    codes = (nearest(rows, 4) / rows.abs().amax(1, keepdim=True) * 7).round()
    packed = result.blocks[0]["mlp.down_proj.weight_packed"]
    ours = packing.unpack_nibbles(packed, 96).double()
    assert float((ours != codes).double().mean()) < 1e-3
