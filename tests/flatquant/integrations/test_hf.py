"""`from_pretrained` of a quantized folder: bit-identical, or refused with the reason."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import flatquant
from flatquant.integrations import hf
from flatquant.integrations.hf_config import FlatQuantConfig
from flatquant.runtime.attention import activate
from flatquant.runtime.cache import Int4Cache
from flatquant.runtime.kv import KVQuantizer

from ..conftest import FAMILIES, build_tiny_model


def quantized(family: str = "llama", scheme: str = "W4A4KV4", **options: Any) -> PreTrainedModel:
    return flatquant.replace_linear(build_tiny_model(family, **options), scheme)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Tensor]:
    """A folder and the logits of the model that was saved there."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = quantized(bias=True)
    model.save_pretrained(folder)
    return folder, logits(model, torch.arange(2, 26)[None])


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved folder, to be damaged."""
    copied = tmp_path / "model"
    copied.mkdir()
    for file in saved[0].iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content["quantization_config"])
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the shard and sign it again, as a tool that knows the format would."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_config(folder, lambda block: block.update(sha256={file.name: digest}))


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A8-asym", "W3A16-g16", "KV4", "W4A4K16V4"])
def test_reloaded_logits_are_bit_identical(family, scheme, tmp_path, token_ids):
    model = quantized(family, scheme, bias=family != "mistral")
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert again.flatquant_plan == model.flatquant_plan
    assert isinstance(again.config.quantization_config, FlatQuantConfig)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(tied, tmp_path, token_ids):
    model = quantized(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    same = again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert same == tied


def test_generation_after_loading_uses_the_packed_cache(saved, token_ids):
    model = load(saved[0])
    for one in (model, copy.deepcopy(model)):
        out = one.generate(
            token_ids, do_sample=False, max_new_tokens=4, return_dict_in_generate=True
        )
        assert isinstance(out.past_key_values, Int4Cache)
    assert model.config._attn_implementation == "flatquant"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_scales_and_transforms_in_float32(dtype, saved, tmp_path, token_ids):
    folder, expected = saved
    stored = load_file(folder / "model.safetensors")
    model = load(folder, dtype=dtype)
    own = model.state_dict()
    kept = [name for name in own if name.endswith(("_scale", "_trans", "_ratio", "_clip"))]
    assert len(kept) > 20
    for name in kept:
        assert own[name].dtype == torch.float32 and torch.equal(own[name], stored[name]), name
    assert model.lm_head.weight.dtype == dtype == model.dtype
    found = logits(model, torch.arange(2, 26)[None])
    assert found.dtype == dtype
    assert (found.float() - expected).std() < expected.std()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(
        logits(flatquant.load(tmp_path / "model"), token_ids), logits(model, token_ids)
    )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map, saved):
    pytest.importorskip("accelerate")
    model = load(saved[0], device_map=device_map)
    assert torch.equal(logits(model, torch.arange(2, 26)[None]), saved[1])


def test_saving_again_and_sharded(saved, tmp_path):
    model = load(saved[0])
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    block = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert sorted(block["sha256"]) == [shard.name for shard in shards]
    again = load(tmp_path / "model")
    assert torch.equal(logits(again, torch.arange(2, 26)[None]), saved[1])


def test_options_of_the_attention_survive(saved, tmp_path):
    model = load(saved[0])
    activate(model, attend_unquantized_prefill=True)
    model.save_pretrained(tmp_path / "model")
    quantizers = [m for m in load(tmp_path / "model").modules() if isinstance(m, KVQuantizer)]
    assert len(quantizers) == 2 and all(q.attend_unquantized_prefill for q in quantizers)


def test_registering_twice_changes_nothing():
    hf.register()
    hf.register()


def test_a_newer_format_is_refused(folder):
    edit_config(folder, lambda block: block.update(format_version=2, producer="flatquant 9.0"))
    with pytest.raises(ValueError, match=r"format_version is 2.*reads 1\.\.1.*flatquant 9\.0"):
        load(folder)


def test_unknown_fields_are_refused(folder):
    edit_config(folder, lambda block: block.update(layout=3))
    with pytest.raises(ValueError, match=r"unknown fields \['layout'\]"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(scheme="W4A99"), "a_bits=99 must be 2..8"),
        (lambda plan: plan.pop("sites"), "plan has keys"),
        (lambda plan: plan.update(sites=["elbow"]), "elbow"),
    ],
)
def test_a_bad_plan_is_refused(folder, change, message):
    edit_config(folder, lambda block: change(block["plan"]))
    with pytest.raises(ValueError, match=f"quantization_config.plan: .*{message}"):
        load(folder)


def test_a_changed_byte_is_refused(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors has sha256 .* was changed"):
        load(folder)


def test_a_truncated_shard_is_refused(folder):
    """By `load` with our message; transformers 4.57 itself trips over it before it asks us."""
    file = folder / "model.safetensors"
    size = file.stat().st_size
    for keep in (size - 100, 20, 3, 0):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=rf"model\.safetensors has {keep} bytes"):
            flatquant.load(folder)
        with pytest.raises(Exception, match=r"bytes|[Hh]eader|[Ii]ncomplete"):
            load(folder)


def test_missing_hashes_are_refused(folder):
    edit_config(folder, lambda block: block.pop("sha256"))
    with pytest.raises(ValueError, match="sha256 is missing"):
        load(folder)
    edit_config(folder, lambda block: block.update(sha256={"other.safetensors": "00"}))
    with pytest.raises((ValueError, OSError), match=r"other\.safetensors"):
        load(folder)


def test_a_missing_tensor_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(first(tensors, "o_proj")))
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is .*o_proj"):
        load(folder)


def first(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def test_an_unexpected_tensor_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))
    with pytest.raises(ValueError, match="does not have, the first is extra"):
        load(folder)


def test_a_wrong_shape_or_kind_is_refused(folder):
    def shorten(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, "q_proj.weight_packed")
        tensors[name] = tensors[name][:-1].contiguous()

    edit_tensors(folder, shorten)
    with pytest.raises(ValueError, match=r"q_proj\.weight_packed in .* has shape \(63, 32\)"):
        load(folder)

    def widen(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, "q_proj.weight_packed")
        tensors[name] = torch.zeros(64, 32)

    edit_tensors(folder, widen)
    with pytest.raises(ValueError, match=r"has dtype F32, the model needs torch\.uint8"):
        load(folder)


def test_quantizing_while_loading_is_refused(tmp_path):
    build_tiny_model().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="the checkpoint is not quantized"):
        load(tmp_path / "float", quantization_config=FlatQuantConfig())


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="quant_method is 'awq'"):
        FlatQuantConfig(quant_method="awq")
