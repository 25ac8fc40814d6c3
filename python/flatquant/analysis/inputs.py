"""Files that an analysis reads besides the models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatquant.shards import sha256


def file_hashes(*paths: Path) -> dict[str, str]:
    """sha256 of files; of a folder, of its config and its tensors."""
    found = {}
    for path in paths:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        files += [] if path.is_file() else sorted(path.glob("config.json"))
        for file in files:
            found[str(file)] = sha256(file)
    return found


def calibration_log(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The log of a saved `CalibrationResult`, or of the finished blocks of a work folder.

    Raises:
        ValueError: the folder holds neither.
    """
    header = folder / "result.json"
    if header.is_file():
        return tuple(json.loads(header.read_text(encoding="utf-8"))["log"])
    blocks = sorted(folder.glob("block-*.json"))
    if not blocks:
        raise ValueError(f"{folder} has neither result.json nor block-*.json: it is no calibration")
    return tuple(json.loads(block.read_text(encoding="utf-8")) for block in blocks)
