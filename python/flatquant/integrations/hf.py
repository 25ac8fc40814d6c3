"""Reading a quantized checkpoint with `AutoModelForCausalLM.from_pretrained`.

transformers builds the model on the meta device, asks the quantizer registered here to swap the
modules, loads the tensors, and asks it to finish. Everything that could make a wrong model is
checked before a tensor is used: digests, the set of tensors, their shapes and kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import cached_file

from flatquant import checkpoint, shards, surgery
from flatquant.integrations.hf_config import METHOD, FlatQuantConfig
from flatquant.runtime import attention
from flatquant.runtime.kv import KVQuantizer


class FlatQuantHfQuantizer(HfQuantizer):
    """Loads what `flatquant.checkpoint.save` wrote; quantizes nothing itself.

    Raises:
        ValueError: the checkpoint is in floating point, or one of the checks fails.
    """

    requires_calibration = False  # our own message, in __init__, says what to do
    required_packages = None  # the next two are read by transformers 4.57 only
    requires_parameters_quantization = False

    def __init__(self, quantization_config: FlatQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "from_pretrained: the checkpoint is not quantized; load it without "
                "quantization_config, then call flatquant.quantize or flatquant.replace_linear"
            )
        self._paths: dict[str, Path] = {}
        self._buffers: dict[str, torch.dtype] = {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saving is supported."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer kernels have no gradient."""
        return False

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Nothing: transformers' own replacements (which need accelerate) are for MoE models."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        config: FlatQuantConfig = self.quantization_config
        plan = config.read_plan()
        if not config.sha256:
            raise ValueError("quantization_config: sha256 is missing: it must list every shard")
        # transformers 4.57 does not say which files it will read
        files = _locate(model, config.sha256) if checkpoint_files is None else checkpoint_files
        self._paths = {Path(file).name: Path(file) for file in files}
        shards.verify(self._paths, config.sha256)
        surgery.install(model, plan)
        _compare(model, shards.read_headers(self._paths))
        self._buffers = {
            name: buffer.dtype
            for name, buffer in _persistent_buffers(model)
            if buffer.is_floating_point()
        }

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        config: FlatQuantConfig = self.quantization_config
        _restore_dtypes(model, self._buffers, self._paths)
        if any(isinstance(module, KVQuantizer) for module in model.modules()):
            attention.activate(model, attend_unquantized_prefill=config.attend_unquantized_prefill)
        checkpoint.attach(model)
        return model


def _locate(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Paths of the shards, from the folder or hub cache the config was read from."""
    source = model.config.name_or_path
    if Path(source).is_dir():
        return [str(Path(source) / name) for name in names]
    commit = getattr(model.config, "_commit_hash", None)
    return [str(cached_file(source, name, revision=commit)) for name in names]


def _persistent_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Buffers that are saved: those of the quantized modules."""
    stored = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def _tied(model: PreTrainedModel) -> set[str]:
    """Names a checkpoint may leave out, because another tensor provides them."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    keys = getattr(model, "_tied_weights_keys", None) or ()  # 4.57: a list, 5.x: a dict
    return {name for name in model.state_dict() if any(re.fullmatch(key, name) for key in keys)}


def _compare(model: PreTrainedModel, stored: dict[str, shards.StoredTensor]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the model."""
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(stored) - _tied(model))
    unexpected = sorted(set(stored) - set(wanted))
    source = model.config.name_or_path
    if missing:
        raise ValueError(
            f"checkpoint: {source} lacks {len(missing)} tensors, the first is {missing[0]}: the "
            "model of this plan needs it"
        )
    if unexpected:
        name = unexpected[0]
        raise ValueError(
            f"checkpoint: {stored[name].file} holds {len(unexpected)} tensors that the model of "
            f"this plan does not have, the first is {name}"
        )
    for name, tensor in stored.items():
        expected = wanted[name]
        if tensor.shape != tuple(expected.shape):
            raise ValueError(
                f"checkpoint: {name} in {tensor.file} has shape {tensor.shape}, the model needs "
                f"{tuple(expected.shape)}"
            )
        if tensor.dtype.startswith(("F", "BF")) != expected.is_floating_point():
            raise ValueError(
                f"checkpoint: {name} in {tensor.file} has dtype {tensor.dtype}, the model needs "
                f"{expected.dtype}"
            )


def _restore_dtypes(
    model: PreTrainedModel, dtypes: dict[str, torch.dtype], paths: dict[str, Path]
) -> None:
    """Read float buffers again that transformers (4.57) has cast to the model's dtype."""
    cast = {name for name, buffer in _persistent_buffers(model) if name in dtypes}
    cast = {name for name in cast if model.get_buffer(name).dtype != dtypes[name]}
    if not cast:
        return
    for path in paths.values():
        with safe_open(path, framework="pt") as file:
            for name in cast & set(file.keys()):
                parent, _, child = name.rpartition(".")
                device = model.get_buffer(name).device
                tensor = file.get_tensor(name).to(device=device, dtype=dtypes[name])
                model.get_submodule(parent)._buffers[child] = tensor


def register() -> None:
    """Make format and attention known to transformers; calling it again changes nothing."""
    attention.register()
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(FlatQuantConfig)
        register_quantizer(METHOD)(FlatQuantHfQuantizer)


register()

__all__ = ["FlatQuantConfig", "FlatQuantHfQuantizer", "register"]
