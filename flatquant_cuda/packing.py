"""How codes lie in bytes: along the last dimension, even index in the low bits.

This is layout 0 (``PACKED``), the only one on disk. Layout 1 (``BYTES``) is one byte a code at
every width, for activations on their way to an 8-bit matrix unit.

``pack``/``unpack`` are for weights-only weights and the KV cache: 2-bit codes four a byte, 3- and
4-bit codes two a byte, 5- to 8-bit codes one a byte. ``pack_nibbles``/``unpack_nibbles`` are for
activations and for the weights of the integer GEMMs, which are always nibbles up to 4 bits. Signed
codes are two's complement in their field (a 3-bit code fills a whole nibble).
"""

from __future__ import annotations

import torch
from torch import Tensor

PACKED = 0
BYTES = 1


def codes_per_byte(bits: int) -> int:
    """Codes that share one byte: 4 for 2 bits, 2 for 3 and 4 bits, 1 for 5 to 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"packing: bits is {bits}: it must be 2..8")
    return 4 if bits == 2 else 2 if bits <= 4 else 1


def packed_size(k: int, bits: int) -> int:
    """Bytes that ``k`` codes of ``bits`` bits take."""
    return -(-k // codes_per_byte(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes ``[..., k]`` into uint8 ``[..., packed_size(k, bits)]``."""
    return _pack(codes, codes_per_byte(bits))


def unpack(packed: Tensor, bits: int, k: int, signed: bool = True) -> Tensor:
    """Undo :func:`pack`: int8 codes ``[..., k]``, or uint8 ones if not ``signed``."""
    return _unpack(packed, codes_per_byte(bits), k, signed)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack integer codes ``[..., k]`` two a byte; an odd ``k`` leaves the last high nibble 0."""
    return _pack(codes, 2)


def unpack_nibbles(packed: Tensor, k: int, signed: bool = True) -> Tensor:
    """Undo :func:`pack_nibbles`: int8 codes ``[..., k]``, or uint8 ones if not ``signed``."""
    return _unpack(packed, 2, k, signed)


def pack_activation(codes: Tensor, bits: int, layout: int, symmetric: bool) -> Tensor:
    """Store activation codes ``[..., k]`` as the quantizing ops do."""
    if layout not in (PACKED, BYTES):
        raise ValueError(f"packing: layout is {layout}: it must be 0 (PACKED) or 1 (BYTES)")
    if bits <= 4 and layout == PACKED:
        return pack_nibbles(codes)
    return codes.to(torch.int8 if symmetric else torch.uint8)


def unpack_activation(stored: Tensor, k: int, bits: int, layout: int, symmetric: bool) -> Tensor:
    """Undo :func:`pack_activation`: int8 codes ``[..., k]``, or uint8 ones if not symmetric."""
    if bits <= 4 and layout == PACKED:
        return unpack_nibbles(stored, k, symmetric)
    return stored


def _pack(codes: Tensor, per_byte: int) -> Tensor:
    if codes.dtype.is_floating_point:
        raise ValueError(f"packing: codes have dtype {codes.dtype}: they must be integers")
    field = 8 // per_byte
    padding = -codes.shape[-1] % per_byte
    fields = torch.nn.functional.pad(codes.to(torch.int32) & (2**field - 1), (0, padding))
    fields = fields.reshape(*codes.shape[:-1], -(-codes.shape[-1] // per_byte), per_byte)
    packed: Tensor = fields[..., 0]
    for i in range(1, per_byte):
        packed = packed | (fields[..., i] << (field * i))
    return packed.to(torch.uint8)


def _unpack(packed: Tensor, per_byte: int, k: int, signed: bool) -> Tensor:
    if packed.shape[-1] != -(-k // per_byte):
        raise ValueError(
            f"packing: {packed.shape[-1]} bytes hold no {k} codes, {per_byte} a byte: "
            f"{-(-k // per_byte)} bytes would"
        )
    field = 8 // per_byte
    wide = packed.view(torch.uint8) if packed.dtype == torch.int8 else packed
    shifts = torch.arange(0, 8, field, dtype=torch.int32, device=packed.device)
    fields = (wide.to(torch.int32).unsqueeze(-1) >> shifts) & (2**field - 1)
    codes: Tensor = fields.flatten(-2)[..., :k]
    if not signed:
        return codes.to(torch.uint8)
    sign: int = 2 ** (field - 1)
    return ((codes ^ sign) - sign).to(torch.int8)
