"""ShortGPT: the blocks that turn the hidden states least go, and a whole model is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import flatquant

from .conftest import FAMILIES, build_tiny_model

CALIBRATION = torch.randint(2, 128, (4, 16), generator=torch.Generator().manual_seed(5))


def build_model(family: str = "llama") -> PreTrainedModel:
    """Six blocks of which 1 and 4 hardly do anything."""
    model = build_tiny_model(family, num_hidden_layers=6)
    with torch.no_grad():
        for index in (1, 4):
            layer = model.model.layers[index]
            layer.self_attn.o_proj.weight.mul_(1e-2)
            layer.mlp.down_proj.weight.mul_(1e-2)
    return model


def test_influence_is_the_papers_formula() -> None:
    """BI = 1 − E[cos(x_i, x_{i+1})], from the hidden states that transformers hands out."""
    model = build_model()
    seen: list[list[Tensor]] = [[] for _ in range(6)]
    for index, layer in enumerate(model.model.layers):

        def keep(module: object, args: object, kwargs: object, out: object, i: int = index) -> None:
            before = args[0] if args else kwargs["hidden_states"]  # type: ignore[index]
            after = out[0] if isinstance(out, tuple) else out
            seen[i] = [before.double(), after.double()]  # type: ignore[union-attr]

        layer.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(CALIBRATION, use_cache=False)
    for found, (x, y) in zip(
        flatquant.block_influence(build_model(), CALIBRATION), seen, strict=True
    ):
        cosine = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
        assert found == pytest.approx(1 - float(cosine.mean()), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_blocks_are_removed(family: str, tmp_path: Path, token_ids: Tensor) -> None:
    model = build_model(family)
    names = [layer.mlp.up_proj.weight.data_ptr() for layer in model.model.layers]
    with torch.no_grad():
        before = model(token_ids).logits
    assert flatquant.shortgpt(model, CALIBRATION, blocks=2) is model
    left = [layer.mlp.up_proj.weight.data_ptr() for layer in model.model.layers]
    assert left == [names[i] for i in (0, 2, 3, 5)]
    assert model.config.num_hidden_layers == 4
    with torch.no_grad():
        after = model(token_ids).logits
        cached = model.generate(token_ids, max_new_tokens=4, do_sample=False)
        uncached = model.generate(token_ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert float((after - before).norm() / before.norm()) < 0.2
    assert torch.equal(cached, uncached)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        read = AutoModelForCausalLM.from_pretrained(tmp_path)(token_ids).logits
    assert torch.equal(read, after)


def test_what_is_left_can_be_quantized(token_ids: Tensor) -> None:
    model = flatquant.shortgpt(build_model(), CALIBRATION)
    assert len(model.model.layers) == 5, "a quarter of six, rounded down"
    flatquant.quantize(model, "smoothquant", "W4A8KV4", CALIBRATION, progress=False)
    with torch.no_grad():
        integer = model(token_ids).logits
        with flatquant.fake_quantized(model):
            assert torch.equal(integer, model(token_ids).logits)
    with pytest.raises(ValueError, match="the model is quantized; shorten the original"):
        flatquant.shortgpt(model, CALIBRATION)


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="blocks=6 must be at least 0 and below 6"):
        flatquant.shortgpt(build_model(), CALIBRATION, blocks=6)
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model's blocks are on disk"):
        flatquant.shortgpt(flatquant.open_model(tmp_path), CALIBRATION)
