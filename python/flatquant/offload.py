"""Models that are larger than memory: everything but the decoder blocks, those one at a time.

`open_model` reads a checkpoint folder without its blocks: they are on the meta device, sizes
without values, and `float_block` reads one from the safetensors files when it is needed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flatquant.models import family_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """The tensors of a checkpoint folder, by name, each read when it is asked for.

    Raises:
        FileNotFoundError: the folder has no safetensors, or lacks one that its index names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            self.files: Mapping[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{folder} has neither {INDEX} nor {SINGLE}")
        missing = sorted({name for name in self.files.values() if not (folder / name).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder}: {missing[0]} is missing, but {INDEX} names it")

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            ValueError: the folder has no such tensor.
        """
        if name not in self.files:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()  # not a view of the mapped file
        return tensor

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """Give every parameter and stored buffer of a module on the meta device its values."""
        for name, parameter in list(module.named_parameters()):
            value = self.read(prefix + name).to(dtype)
            _check_shape(prefix + name, value, parameter)
            _put(module, name, nn.Parameter(value, requires_grad=False))
        for name in set(dict(module.named_buffers())) & set(module.state_dict()):
            _put(module, name, self.read(prefix + name))


def open_model(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A floating-point model whose decoder blocks stay on disk until they are needed.

    It serves `calibrate`, `quantize`, `replace_linear` and `CalibrationResult.apply`, which
    hold one block of it at a time; after the last three, it is an ordinary quantized model.

    Args:
        folder: a checkpoint of a known family, in safetensors.
        dtype: of the weights; None takes that of the stored embedding.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown family, or a tensor that is missing or of another shape.
    """
    shards = Shards(Path(folder))
    config = AutoConfig.from_pretrained(folder)
    family = family_of(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"open_model: {folder} is quantized already; open the original")
    if dtype is None:
        dtype = shards.read(f"{family.embedding}.weight").dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    inside = f"{family.blocks}."
    for name, module in list(model.named_modules()):
        if (name + ".").startswith(inside):
            continue
        tied = name == family.head and config.tie_word_embeddings
        if not tied and list(module.parameters(recurse=False)):
            shards.fill(module, f"{name}.", dtype)
        if module._non_persistent_buffers_set:  # rotary tables, which no file holds
            _replace(model, name, type(module)(config=config))
    if config.tie_word_embeddings:
        model.set_output_embeddings(_tied(model))
    model.flatquant_shards = shards
    return model


def _tied(model: PreTrainedModel) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()
    head.weight = model.get_input_embeddings().weight
    return head


def shards_of(model: nn.Module) -> Shards | None:
    """Where the blocks of a model are that `open_model` made; None if they are in memory."""
    shards: Shards | None = getattr(model, "flatquant_shards", None)
    return shards


def float_block(model: PreTrainedModel, name: str, *, copied: bool = True) -> nn.Module:
    """A decoder block with its values, wherever the model keeps them.

    Args:
        model: what `open_model` gave, or any other model.
        name: full name of the block.
        copied: whether the caller will change it. A block from disk is always a copy.
    """
    block, shards = model.get_submodule(name), shards_of(model)
    if copied or shards is not None:
        block = copy.deepcopy(block)
    if shards is not None:
        shards.fill(block, f"{name}.", model.dtype)
    return block


def parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every parameter, one at a time."""
    shards = shards_of(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and shards is not None:
            yield name, shards.read(name).to(model.dtype)
        else:
            yield name, parameter


def materialise(model: nn.Module, block: nn.Module, name: str, device: torch.device) -> None:
    """Give a block on the meta device memory, and what is still the original's its values.

    Runtime modules that have replaced others hold no values yet: a state dict must be loaded.
    """
    shards = shards_of(model)
    if shards is None:
        return
    block.to_empty(device=device)
    for key, parameter in block.named_parameters():
        if f"{name}.{key}" in shards.files:
            parameter.data.copy_(shards.read(f"{name}.{key}"))


def _check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)} on disk, the config asks for {list(like.shape)}"
        )


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Set a parameter or buffer by its dotted name."""
    owner, _, key = name.rpartition(".")
    parent = module.get_submodule(owner)
    if isinstance(value, nn.Parameter):
        parent.register_parameter(key, value)
    else:
        parent.register_buffer(key, value)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, module)
