"""Finished blocks of a calibration on disk, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from flatquant.offload import parameters
from flatquant.plan import FORMAT_VERSION, QuantizationPlan
from flatquant.recipe import Recipe
from flatquant.result import block_file, write_block

_ROTATIONS = "rotations.safetensors"


def fingerprint(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: QuantizationPlan,
    seed: int,
    calibration: Tensor | None,
) -> dict[str, Any]:
    """What must be the same for finished blocks to be reused."""
    digest = hashlib.sha256()
    for name, parameter in parameters(model):
        digest.update(name.encode())
        digest.update(str((parameter.dtype, tuple(parameter.shape))).encode())
        sample = parameter.detach().flatten()[:: max(parameter.numel() // 1024, 1)]
        digest.update(sample.float().cpu().numpy().tobytes())
    tokens = b"" if calibration is None else calibration.cpu().numpy().tobytes()
    settings = {
        **vars(recipe),
        "transforms": dict(recipe.transforms),
        "scales": dict(recipe.scales),
        "weights": recipe.rounding,
    }
    return {
        "format_version": FORMAT_VERSION,
        "plan": plan.to_dict(),
        "recipe": {key: str(value) for key, value in settings.items()},
        "seed": seed,
        "model": digest.hexdigest(),
        "calibration": hashlib.sha256(tokens).hexdigest(),
    }


class WorkDir:
    """Finished blocks on disk: run.json says of which run, one safetensors file a block.

    Raises:
        ValueError: `resume` without a folder, a folder of another run, or finished blocks in a
            folder that is not resumed.
    """

    def __init__(
        self, work_dir: str | Path | None, resume: bool, fingerprint: dict[str, Any]
    ) -> None:
        self.folder = None if work_dir is None else Path(work_dir)
        self.resume = resume
        if self.folder is None:
            if resume:
                raise ValueError("resume=True needs work_dir, the folder of the interrupted run")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        header = self.folder / "run.json"
        if header.exists():
            before = json.loads(header.read_text())
            changed = [key for key in fingerprint if before.get(key) != fingerprint[key]]
            if resume and changed:
                raise ValueError(
                    f"{self.folder} belongs to another run: {', '.join(changed)} differ; "
                    "use the same arguments, or another work_dir"
                )
            if not resume and any(self.folder.glob("block-*.safetensors")):
                raise ValueError(
                    f"{self.folder} holds finished blocks of a run; pass resume=True to continue "
                    "it, or another work_dir"
                )
        header.write_text(json.dumps(fingerprint, indent=1))

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The finished block, or None."""
        return self._read(block_file(index))

    def save(self, index: int, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Write a block so that a kill leaves either all of it or nothing."""
        self._write(block_file(index), tensors, entry)

    def load_rotations(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The rotations that were learned before the first block, or None."""
        return self._read(_ROTATIONS)

    def save_rotations(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Write them as `save` does a block."""
        self._write(_ROTATIONS, tensors, entry)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.folder is None or not self.resume:
            return None
        file = self.folder / name
        log = file.with_suffix(".json")
        if not (file.exists() and log.exists()):
            return None
        try:
            return load_file(file), json.loads(log.read_text())
        except Exception as error:
            warnings.warn(f"{file.name} is unreadable ({error}); fitting it again", stacklevel=3)
            return None

    def _write(self, name: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        file = self.folder / name
        write_block(file, tensors)
        log = file.with_suffix(".json")
        log.with_suffix(".json-partial").write_text(json.dumps(dict(entry)))
        log.with_suffix(".json-partial").replace(log)
