"""Safetensors files of a checkpoint, without loading them: headers, completeness, hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 22
_MAX_HEADER = 100_000_000  # the safetensors format's own limit


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as its shard's header describes it.

    Attributes:
        file: the shard.
        dtype: safetensors name of the dtype, "F32", "BF16", "U8" and so on.
        shape: its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or shorter or longer than its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist, but the config lists it")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"checkpoint: {path} has {size} bytes, too few for the header it announces: it is "
                "truncated or not a safetensors file"
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        tensors = {
            name: StoredTensor(file=path, dtype=entry["dtype"], shape=tuple(entry["shape"]))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"checkpoint: the header of {path} is not readable: {error}") from error
    if size != 8 + length + end:
        raise ValueError(
            f"checkpoint: {path} has {size} bytes, its header promises {8 + length + end}: the "
            "file is truncated or damaged"
        )
    return tensors


def read_headers(paths: Mapping[str, Path]) -> dict[str, StoredTensor]:
    """The tensors of all shards (name of the shard -> its path).

    Raises:
        ValueError: a tensor stands in two shards, or as in `read_header`.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths.values():
        for name, stored in read_header(path).items():
            if name in tensors:
                raise ValueError(
                    f"checkpoint: tensor {name} is in {tensors[name].file.name} and in {path.name}"
                )
            tensors[name] = stored
    return tensors


def verify(paths: Mapping[str, Path], expected: Mapping[str, str]) -> None:
    """Hold every shard against the digest in the config.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the shards are not those the config lists, or one has another digest.
    """
    if set(paths) != set(expected):
        raise ValueError(
            f"checkpoint: the shards are {sorted(paths)}, quantization_config.sha256 lists "
            f"{sorted(expected)}: they must be the same"
        )
    for name, path in paths.items():
        read_header(path)  # says "truncated" where it can, before a digest that only differs
        found = sha256(path)
        if found != expected[name]:
            raise ValueError(
                f"checkpoint: {path} has sha256 {found}, quantization_config says "
                f"{expected[name]}: the file was changed after it was saved"
            )
