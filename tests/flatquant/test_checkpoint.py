"""Saving: complete or not at all; loading: the right folder or a clear no."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import flatquant
from flatquant import checkpoint, folder

from .conftest import build_tiny_model

IDS = torch.arange(2, 26)[None]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return flatquant.replace_linear(build_tiny_model(), "W4A4KV4")


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))


def test_folder_is_a_complete_checkpoint(model, tmp_path):
    target = tmp_path / "deep" / "model"
    flatquant.save(model, target, tokenizer=tiny_tokenizer())
    names = {file.name for file in target.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
    block = json.loads((target / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "flatquant" and block["format_version"] == 1
    assert block["plan"]["scheme"] == "W4A4KV4" and list(block["sha256"]) == ["model.safetensors"]
    assert "W4A4KV4" in (target / "README.md").read_text()
    assert os.listdir(target.parent) == ["model"]
    assert torch.equal(logits(flatquant.load(target)), logits(model))
    assert flatquant.load(target, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_saving_over_a_folder_keeps_other_files_and_drops_old_weights(model, tmp_path):
    target = tmp_path / "model"
    tiny_tokenizer().save_pretrained(target)
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("mine")
    (target / "README.md").write_text("my own card")
    (target / "pytorch_model.bin").write_bytes(b"old")
    model.save_pretrained(target, max_shard_size="40KB")
    sharded = sorted(file.name for file in target.glob("*.safetensors"))
    assert len(sharded) > 2 and (target / "model.safetensors.index.json").exists()
    model.save_pretrained(target)
    assert [file.name for file in target.glob("model*")] == ["model.safetensors"]
    assert not (target / "pytorch_model.bin").exists()
    assert (target / "notes" / "a.txt").read_text() == "mine"
    assert (target / "README.md").read_text() == "my own card"
    assert (target / "tokenizer.json").exists()
    assert torch.equal(logits(flatquant.load(target)), logits(model))


@pytest.mark.parametrize("existing", [False, True])
def test_disk_full_leaves_the_old_folder(model, tmp_path, monkeypatch, existing):
    target = tmp_path / "model"
    if existing:
        model.save_pretrained(target)
    before = contents(tmp_path)
    written = []

    def full(tensors: Any, path: str, **kwargs: Any) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        written.append(Path(path).write_bytes(b"half a shard"))

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match=r"save: writing .*model failed .*No space left.*unchanged"):
        model.save_pretrained(target, max_shard_size="40KB")
    assert written and contents(tmp_path) == before
    assert [file.name for file in tmp_path.iterdir()] == (["model"] if existing else [])


def _killed_save(target: str) -> None:
    """Save and die while the config is being written."""
    checkpoint._write_config = lambda *args: os._exit(9)
    model = flatquant.replace_linear(build_tiny_model(seed=1), "W4A4KV4")
    model.save_pretrained(target)


def test_a_kill_leaves_the_old_folder_and_the_next_save_cleans_up(model, tmp_path):
    target = tmp_path / "model"
    model.save_pretrained(target)
    before = contents(target)
    process = multiprocessing.get_context("spawn").Process(target=_killed_save, args=(str(target),))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert contents(target) == before and len(list(tmp_path.iterdir())) == 2
    model.save_pretrained(target)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_without_an_atomic_exchange_two_renames_do(model, tmp_path, monkeypatch):
    monkeypatch.setattr(folder.ctypes, "CDLL", lambda *args, **kwargs: object())
    target = tmp_path / "model"
    model.save_pretrained(target)
    model.save_pretrained(target)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert torch.equal(logits(flatquant.load(target)), logits(model))


def test_hard_links_fall_back_to_copies(model, tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    model.save_pretrained(target)
    assert (target / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad, tmp_path):
    model = flatquant.replace_linear(build_tiny_model(), "W4A4KV4")
    model.model.norm.weight.data[3] = bad
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds 1 values that are NaN or Inf"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_places_that_cannot_be_swapped_are_refused(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for place in (".", "..", str(tmp_path / "here")):
        with pytest.raises(ValueError, match="holds the current directory"):
            model.save_pretrained(place)


def test_a_link_to_a_folder_is_followed(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()


def test_arguments_of_save_pretrained(model, tmp_path):
    with pytest.raises(ValueError, match=r"\['push_to_hub'\] is not supported"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    with pytest.raises(ValueError, match="safe_serialization=False is not supported"):
        model.save_pretrained(tmp_path / "model", safe_serialization=False)
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", safe_serialization=True, variant=None)
    assert (tmp_path / "model").exists()


def test_an_unquantized_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not quantized"):
        flatquant.save(build_tiny_model(), tmp_path / "model")


def test_load_says_what_is_wrong(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        flatquant.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        flatquant.load(tmp_path)
    build_tiny_model().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="quant_method None, expected 'flatquant'"):
        flatquant.load(tmp_path / "float")
    flatquant.save(model, tmp_path / "model", max_shard_size="40KB")
    shard = next((tmp_path / "model").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} does not exist"):
        flatquant.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
        flatquant.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        flatquant.load(tmp_path / "model")
