"""Methods are values: a new one is a few lines, and schemes alone make cache-only methods."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import flatquant
from flatquant.clips import Clips
from flatquant.methods.sites import NORM_SITES, everywhere
from flatquant.weights import Gptq, MseClip

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (4, 16), generator=torch.Generator().manual_seed(5))


def smooth_rotated(scheme: flatquant.Scheme) -> flatquant.Recipe:
    """SmoothQuant's scales, then Hadamard matrices, fixed clips and GPTQ."""
    scale = flatquant.ScaleConfig(start="smooth", alpha=0.5, learned=False)
    return flatquant.Recipe(
        method="smooth-rotated",
        scheme=scheme,
        transforms=everywhere(scheme, "hadamard"),
        scales=dict.fromkeys(NORM_SITES, scale),
        clips=Clips(activations=0.95, keys=0.95, values=0.95),
        weights=Gptq(clip=MseClip()),
    )


def test_a_new_method_from_existing_parts_is_a_few_lines(
    monkeypatch: pytest.MonkeyPatch, token_ids: Tensor
) -> None:
    assert len(inspect.getsource(smooth_rotated).splitlines()) < 15
    monkeypatch.setitem(flatquant.METHODS, "smooth-rotated", smooth_rotated)
    model = build_tiny_model("qwen3")
    flatquant.quantize(model, "smooth-rotated", "W4A4KV4", CALIBRATION, progress=False)
    with torch.no_grad():
        integer = model(token_ids).logits
        with flatquant.fake_quantized(model):
            assert torch.equal(integer, model(token_ids).logits)


@pytest.mark.parametrize("method", ["rtn", "hadamard", "quarot", "flatquant"])
def test_a_scheme_without_weights_touches_the_cache_only(method: str, token_ids: Tensor) -> None:
    errors = []
    for scheme in ("KV4", "KV3", "KV2", "K4V2"):
        model = build_tiny_model("llama")
        with torch.no_grad():  # calibration learns all the same
            before = model(token_ids).logits
            flatquant.quantize(model, method, scheme, CALIBRATION, epochs=1, progress=False)
            after = model(token_ids).logits
        assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
        errors.append(float((after - before).norm() / before.norm()))
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < errors[3] < errors[2]


@pytest.mark.parametrize("method", list(flatquant.METHODS))
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A16", "W3A16-g32", "KV4", "W16A16"])
def test_every_method_makes_a_recipe_for_every_scheme(method: str, scheme: str) -> None:
    """Recipes are values: equal when made twice, and printable."""
    parsed = flatquant.Scheme.parse(scheme)
    recipe = flatquant.METHODS[method](parsed)
    assert recipe.method == method
    assert recipe.scheme == parsed
    assert recipe == flatquant.METHODS[method](parsed)
    assert method in repr(recipe)
