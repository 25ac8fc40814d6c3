"""What calibration leaves behind: a plan and the finished tensors of every block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flatquant.models import family_of
from flatquant.plan import FORMAT_VERSION, QuantizationPlan
from flatquant.runtime.head import fill_head
from flatquant.scheme import OFF
from flatquant.surgery import block_names, install


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """Transforms, clips and weight codes of a model.

    Attributes:
        plan: scheme, sites and exceptions.
        blocks: for every decoder block, runtime tensor name (relative to the block) -> tensor.
        log: for every block, its fit: error before and after, seconds.
    """

    plan: QuantizationPlan
    blocks: tuple[Mapping[str, Tensor], ...]
    log: tuple[Mapping[str, Any], ...] = ()

    def apply(self, model: nn.Module) -> nn.Module:
        """Install the result in the model it was made from, in place.

        Raises:
            ValueError: the model has another number of blocks or other sizes.
        """
        names = block_names(model, family_of(model.config))
        if len(names) != len(self.blocks):
            raise ValueError(
                f"the result has {len(self.blocks)} blocks, the model has {len(names)}: "
                "it was made from another model"
            )
        head = model.get_output_embeddings()  # type: ignore[operator]
        install(model, self.plan)
        if self.plan.scheme.head_bits != OFF:
            fill_head(model.get_output_embeddings(), head)  # type: ignore[operator]
        for name, tensors in zip(names, self.blocks, strict=True):
            _load_block(model.get_submodule(name), name, tensors)
        return model

    def save(self, directory: str | Path) -> None:
        """Write result.json and one safetensors file a block."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for index, tensors in enumerate(self.blocks):
            save_file(dict(tensors), folder / block_file(index))
        header = {
            "format_version": FORMAT_VERSION,
            "plan": self.plan.to_dict(),
            "blocks": len(self.blocks),
            "log": [dict(entry) for entry in self.log],
        }
        (folder / "result.json").write_text(json.dumps(header, indent=1))

    @classmethod
    def load(cls, directory: str | Path) -> CalibrationResult:
        """Inverse of `save`.

        Raises:
            ValueError: the folder is of a newer format, or a block is missing.
        """
        folder = Path(directory)
        header = json.loads((folder / "result.json").read_text())
        if header["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{folder}: format_version={header['format_version']} is newer than "
                f"{FORMAT_VERSION}, the newest this version reads"
            )
        files = [folder / block_file(index) for index in range(header["blocks"])]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(f"{folder}: {missing[0]} is missing ({len(missing)} in all)")
        return cls(
            plan=QuantizationPlan.from_dict(header["plan"]),
            blocks=tuple(load_file(file) for file in files),
            log=tuple(header["log"]),
        )


def block_file(index: int) -> str:
    """Name of the file that holds one block."""
    return f"block-{index:05d}.safetensors"


def _load_block(block: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    own = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ValueError(f"{name}: the model has no tensor {unknown[0]!r}: made from another model")
    required = {key for key, tensor in block.named_buffers()}
    missing = sorted(required - set(tensors))
    if missing:
        raise ValueError(f"{name}: the result lacks tensor {missing[0]!r}")
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            raise ValueError(
                f"{name}.{key}: the result has shape {list(tensor.shape)}, "
                f"the model {list(own[key].shape)}"
            )
        own[key].data.copy_(tensor)
