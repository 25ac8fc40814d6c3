"""What calibration leaves behind: a plan and the finished tensors of every block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flatquant.models import family_of
from flatquant.offload import materialise
from flatquant.plan import FORMAT_VERSION, QuantizationPlan
from flatquant.runtime.head import fill_head, untie_head
from flatquant.scheme import OFF
from flatquant.surgery import block_names, install


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """Transforms, clips and weight codes of a model.

    Attributes:
        plan: scheme, sites and exceptions.
        blocks: for every decoder block, runtime tensor name (relative to the block) -> tensor;
            in memory, or read from a folder each time they are asked for (`StoredBlocks`).
        log: for every block, its fit: error before and after, seconds.
        outer: tensors outside the blocks that the method has changed (embedding, last norm and
            head, by their full names): a head that was tied gets a weight of its own.
    """

    plan: QuantizationPlan
    blocks: Sequence[Mapping[str, Tensor]]
    log: tuple[Mapping[str, Any], ...] = ()
    outer: Mapping[str, Tensor] = field(default_factory=dict)

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
        if self.outer:
            untie_head(model)
            _load(model, "model", self.outer)
        head = model.get_output_embeddings()  # type: ignore[operator]
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        install(model, self.plan)
        if self.plan.scheme.head_bits != OFF:
            fill_head(model.get_output_embeddings(), head)  # type: ignore[operator]
        for name, tensors in zip(names, self.blocks, strict=True):
            block = model.get_submodule(name)
            materialise(model, block, name, device)
            load_block(block, name, tensors)
        return model

    def save(self, directory: str | Path) -> None:
        """Write result.json, one safetensors file a block, and one for what is around them."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for index, tensors in enumerate(self.blocks):
            write_block(folder / block_file(index), tensors)
        if self.outer:
            save_file(dict(self.outer), folder / OUTER_FILE)
        header = {
            "format_version": FORMAT_VERSION,
            "plan": self.plan.to_dict(),
            "blocks": len(self.blocks),
            "outer": bool(self.outer),
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
        outer = [folder / OUTER_FILE] if header.get("outer") else []
        missing = [file.name for file in files + outer if not file.exists()]
        if missing:
            raise ValueError(f"{folder}: {missing[0]} is missing ({len(missing)} in all)")
        return cls(
            plan=QuantizationPlan.from_dict(header["plan"]),
            blocks=StoredBlocks(folder, len(files)),
            log=tuple(header["log"]),
            outer=load_file(outer[0]) if outer else {},
        )


OUTER_FILE = "outer.safetensors"
"""Name of the file that holds what is around the blocks."""


def block_file(index: int) -> str:
    """Name of the file that holds one block."""
    return f"block-{index:05d}.safetensors"


def write_block(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a block so that a kill leaves either all of it or nothing."""
    partial = file.with_suffix(".partial")
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, partial)
    partial.replace(file)


class StoredBlocks(Sequence[Mapping[str, Tensor]]):
    """Finished blocks in a folder, read when they are asked for and never kept."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Tensor]]: ...

    def __getitem__(
        self, index: int | slice
    ) -> Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]:
        if isinstance(index, slice):
            return [self[place] for place in range(self.size)[index]]
        return load_file(self.folder / block_file(range(self.size)[index]))


def load_block(block: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill a block of empty runtime modules.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape.
    """
    _load(block, name, tensors, required={key for key, _ in block.named_buffers()})


def _load(
    module: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    required: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Copy tensors into a module of this name, all or, on an error, none of them."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ValueError(f"{name}: the model has no tensor {unknown[0]!r}: made from another model")
    missing = sorted(required - set(tensors))
    if missing:
        raise ValueError(f"{name}: the result lacks tensor {missing[0]!r}")
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            raise ValueError(
                f"{name}.{key}: the result has shape {list(tensor.shape)}, "
                f"the model {list(own[key].shape)}"
            )
    for key, tensor in tensors.items():
        own[key].data.copy_(tensor)
