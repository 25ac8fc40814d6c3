"""Models on disk: one block in memory, the same result, memory that does not grow with depth."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flatquant
from flatquant import pipeline
from flatquant.offload import float_block

from .conftest import FAMILIES, build_tiny_model

CALIBRATION = torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(5))


def stored(folder: Path, family: str = "llama", **options: object) -> Path:
    """A tiny model in a folder of several shards."""
    model = build_tiny_model(family, **options)  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def live_bytes() -> int:
    """Bytes of all tensors that are alive, every storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_disk_is_the_model(
    family: str, tied: bool, tmp_path: Path, token_ids: Tensor
) -> None:
    options = {"bias": family != "mistral", "tie_word_embeddings": tied}
    folder = stored(tmp_path, family, **options)
    whole = build_tiny_model(family, **options)  # type: ignore[arg-type]
    opened = flatquant.open_model(folder)
    assert all(parameter.is_meta for parameter in opened.model.layers.parameters())
    for index, layer in enumerate(whole.model.layers):
        block = float_block(opened, f"model.layers.{index}")
        expected = layer.state_dict()
        assert expected.keys() == block.state_dict().keys()
        assert all(torch.equal(expected[key], block.state_dict()[key]) for key in expected)
    for model in (opened, whole):
        flatquant.quantize(model, "awq", "W4A8KV4", CALIBRATION, progress=False)
    with torch.no_grad():
        assert torch.equal(opened(token_ids).logits, whole(token_ids).logits)
    assert not any(p.is_meta for p in [*opened.parameters(), *opened.buffers()])


@pytest.mark.parametrize("method", ["flatquant", "quarot-gptq", "wanda"])
def test_every_kind_of_method_reads_from_disk(
    method: str, tmp_path: Path, token_ids: Tensor
) -> None:
    """What is ignored, unquantized or outside the blocks is read from disk as well."""
    folder = stored(tmp_path / "model")
    models = [flatquant.open_model(folder), build_tiny_model()]
    ignore = ("lm_head", "model.layers.1.mlp.down_proj")
    for model, work in zip(models, ("a", "b"), strict=True):
        flatquant.quantize(
            model, method, "W4A4KV4", CALIBRATION, epochs=1, ignore=ignore,
            work_dir=tmp_path / work, progress=False,
        )  # fmt: skip
    with torch.no_grad():
        first, second = (model(token_ids).logits for model in models)
    assert torch.equal(first, second)
    models[0].save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(flatquant.load(tmp_path / "saved")(token_ids).logits, first)


def test_runs_of_the_same_model_on_disk_and_in_memory_are_one(tmp_path: Path) -> None:
    """The fingerprint sees values, not where they are: a run goes on either way."""
    folder = stored(tmp_path / "model")
    arguments = ("smoothquant", "W8A8", CALIBRATION)
    work = tmp_path / "work"
    flatquant.calibrate(build_tiny_model(), *arguments, work_dir=work, progress=False)
    again = flatquant.calibrate(
        flatquant.open_model(folder), *arguments, work_dir=work, resume=True, progress=False
    )
    assert len(again.blocks) == 2


def peak(depth: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most bytes of tensors alive at any block of a calibration with everything on disk."""
    path = stored(folder / "model", num_hidden_layers=depth)
    before, seen = live_bytes(), []
    fitted = pipeline._block

    def watched(*arguments: object) -> object:
        result = fitted(*arguments)  # type: ignore[arg-type]
        seen.append(live_bytes())
        return result

    monkeypatch.setattr(pipeline, "_block", watched)
    result = flatquant.calibrate(
        flatquant.open_model(path), "flatquant", "W4A4KV4", CALIBRATION, epochs=1,
        work_dir=folder / "work", progress=False,
    )  # fmt: skip
    monkeypatch.setattr(pipeline, "_block", fitted)
    assert len(seen) == len(result.blocks) == depth
    return max(seen) - before


def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in live tensors. A block has 165 KB of parameters in float32."""
    few, many = (peak(d, tmp_path / str(d), monkeypatch) for d in (2, 10))
    assert many <= few + 4096


def test_results_are_read_from_their_folder(tmp_path: Path) -> None:
    result = flatquant.calibrate(
        build_tiny_model(), "rtn", "W4A16", work_dir=tmp_path, progress=False
    )
    in_memory = flatquant.calibrate(build_tiny_model(), "rtn", "W4A16", progress=False)
    assert len(result.blocks) == 2
    for block in (result.blocks[-1], *result.blocks[1:]):
        assert all(torch.equal(block[key], in_memory.blocks[1][key]) for key in block)
    result.save(tmp_path)  # onto the very files that it is read from
    assert len(flatquant.CalibrationResult.load(tmp_path).blocks) == 2
    with pytest.raises(IndexError):
        result.blocks[2]


def test_a_method_that_needs_all_blocks_at_once_says_so(tmp_path: Path) -> None:
    model = flatquant.open_model(stored(tmp_path))
    with pytest.raises(ValueError, match="'spinquant' learns through all blocks at once"):
        flatquant.calibrate(model, "spinquant", "W4A4", CALIBRATION, progress=False)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors.index.json nor"):
        flatquant.open_model(tmp_path)
    folder = stored(tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    save_file(tensors, file)
    model = flatquant.open_model(folder)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj.weight has shape \[3, 64\] on disk"
    ):
        flatquant.calibrate(model, "rtn", "W4A4", progress=False)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name} is missing"):
        flatquant.open_model(folder)


def test_a_quantized_folder_is_refused(tmp_path: Path) -> None:
    flatquant.quantize(build_tiny_model(), "rtn", "W4A4", progress=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized already"):
        flatquant.open_model(tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_blocks_visit_the_device_one_at_a_time() -> None:
    """The model stays on the CPU; the device never holds two blocks' weights."""
    model = build_tiny_model(num_hidden_layers=8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arguments = ("smoothquant", "W8A8", CALIBRATION)
    flatquant.calibrate(model, *arguments, device="cuda", progress=False)
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**20
