"""Where numbers come from: versions, commit, machine, data, settings."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import flatquant_cuda

_PACKAGES = ("flatquant", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def provenance(settings: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """Everything needed to run a comparison again.

    Args:
        settings: every setting by name.
        data: path of every file that was read -> sha256.
    """
    return {
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in _PACKAGES},
        "commit": commit(),
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "kernels": flatquant_cuda.build_info(),
        "settings": {name: _plain(value) for name, value in settings.items()},
        "data": data,
    }


def commit() -> str | None:
    """Of the source tree this package lies in, with "+" after it where it was changed; or None."""
    here = Path(__file__).resolve().parent
    try:
        name = _git(here, "rev-parse", "--short=10", "HEAD")
        changed = _git(here, "status", "--porcelain", "-uno", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return name + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


def package_version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
