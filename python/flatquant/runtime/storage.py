"""Memory of the KV cache: tensors that grow, and the handle attention reads instead of floats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flatquant_cuda import ops
from flatquant_cuda.packing import packed_size

_STEP = 64  # capacities are multiples of this


@dataclass(frozen=True, kw_only=True)
class PackedStates:
    """Keys or values of one layer as packed codes; takes the place of a float tensor.

    Attributes:
        codes: uint8 [batch, kv_heads, capacity, bytes]; positions from `length` on are unused.
        scale: float32 [batch, kv_heads, capacity].
        zero: uint8 [batch, kv_heads, capacity].
        bits: width of a code, 2..8.
        length: positions in use.
        head_dim: channels per head.
        dtype: dtype of the states that were quantized.
        exact: the states before quantization, for `attend_unquantized_prefill` only.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    length: int
    head_dim: int
    dtype: torch.dtype
    exact: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[batch, kv_heads, length, head_dim], the shape of the tensor this stands for."""
        return torch.Size((*self.codes.shape[:2], self.length, self.head_dim))

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    @property
    def has_codes(self) -> bool:
        """Whether kernels can attend to the codes themselves."""
        return True

    def poisoned(self) -> Tensor:
        """bool [batch, kv_heads, length]: positions that held NaN or Inf (their scale is NaN)."""
        return self.scale[:, :, : self.length].isnan()

    def dequantize(self, *, clean: bool = False) -> Tensor:
        """(q - z)*s as [batch, kv_heads, length, head_dim] of `dtype`, in the stored basis.

        `clean` gives 0 instead of NaN at poisoned positions.
        """
        scale = self.scale.nan_to_num(nan=0.0) if clean else self.scale
        return ops.kv_dequantize(
            self.codes,
            scale,
            self.zero,
            bits=self.bits,
            head_dim=self.head_dim,
            length=self.length,
            out_dtype=self.dtype,
        )


class Storage:
    """Tensors [batch, kv_heads, capacity, ...] filled up to `length`, growing geometrically."""

    def __init__(self, tensors: tuple[Tensor, ...], like: Tensor) -> None:
        self.tensors = tensors
        self.head_dim, self.dtype = like.shape[-1], like.dtype
        self._length = 0
        self._lockstep: Lockstep | None = None

    @property
    def length(self) -> int:
        """Positions in use."""
        return self._length if self._lockstep is None else self._lockstep.length

    @length.setter
    def length(self, value: int) -> None:
        self.break_step()
        self._length = value

    def break_step(self) -> None:
        """Be filled alone again, and so all storages that were filled together with this one."""
        if self._lockstep is not None:
            self._lockstep.end()

    @property
    def capacity(self) -> int:
        """Positions there is memory for."""
        return self.tensors[0].shape[2]

    def append(self, states: Tensor) -> None:
        """Store states [batch, kv_heads, t, d] after what is there."""
        self.reserve(states.shape[2])
        self._write(states)
        self.length += states.shape[2]

    def reserve(self, count: int) -> None:
        """Have memory for `count` more positions."""
        end = self.length + count
        if end > self.capacity:
            # half as much again keeps the copying linear and the slack below a third
            wanted = max(end, self.capacity + self.capacity // 2)
            self._resize(self.length, -(-wanted // _STEP) * _STEP)

    def view(self, exact: Tensor | None = None) -> Tensor | PackedStates:
        """What attention reads; later appends leave it as it is."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """States [batch, kv_heads, length, d] in the stored basis."""
        raise NotImplementedError

    def keep_last(self, count: int) -> None:
        """Forget all but the last `count` positions; earlier views stay valid."""
        self.tensors = tuple(t[:, :, self.length - count : self.length] for t in self.tensors)
        self._resize(count, 2 * count)
        self.length = count

    def __deepcopy__(self, memo: dict[int, Any]) -> Storage:
        """A copy with its own tensors and the same quantizer."""
        twin = copy.copy(self)
        twin._length, twin._lockstep = self.length, None
        twin.map(torch.clone)
        return twin

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by function(tensor): batch selection, repetition, device moves."""
        self.break_step()
        self.tensors = tuple(function(t) for t in self.tensors)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def _resize(self, used: int, capacity: int) -> None:
        def grow(old: Tensor) -> Tensor:
            new = old.new_zeros((*old.shape[:2], capacity, *old.shape[3:]))
            new[:, :, :used] = old[:, :, :used]
            return new

        self.map(grow)

    def _write(self, states: Tensor) -> None:
        raise NotImplementedError


class Lockstep:
    """Storages of one length that are filled together, all layers by one op.

    They share one count of positions, so that a token costs no work per layer. Whatever else
    happens to one of them (an append, a crop, a reordering) ends it for all.

    Args:
        storages: alike in length, batch, dtype and device, and none of them in another lockstep.
        owner: who fills them.

    Attributes:
        capacity: positions that every storage has memory for.
        length: positions in use.
        active: False once it has ended.
        binding: the owner's, to the memory of the storages.
    """

    def __init__(self, storages: Sequence[Storage], owner: object) -> None:
        self.storages, self.owner = storages, owner
        codes = storages[0].tensors[0]
        self.batch, self.device, self.dtype = codes.shape[0], codes.device, storages[0].dtype
        self.capacity = min(storage.capacity for storage in storages)
        self.length = storages[0].length
        self.active = True
        self.binding: Any = None
        for storage in storages:
            storage._lockstep = self

    def tensors(self) -> list[Tensor]:
        """Of all storages, in order."""
        return [tensor for storage in self.storages for tensor in storage.tensors]

    def end(self) -> None:
        """Give every storage a length of its own."""
        self.active = False
        for storage in self.storages:
            storage._length, storage._lockstep = self.length, None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copied storages are not in step: no lockstep."""


class FloatStorage(Storage):
    """States kept as they are."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        shape = (*like.shape[:2], capacity, like.shape[3])
        super().__init__((like.new_zeros(shape),), like)

    def view(self, exact: Tensor | None = None) -> Tensor:
        """[batch, kv_heads, length, d] of the states' dtype."""
        return self.tensors[0][:, :, : self.length]

    def dequantize(self) -> Tensor:
        """The same as `view`."""
        return self.view()

    def _write(self, states: Tensor) -> None:
        self.tensors[0][:, :, self.length : self.length + states.shape[2]] = states


class PackedStorage(Storage):
    """States kept as packed codes (layout of `kv_quantize_append`)."""

    def __init__(
        self, like: Tensor, capacity: int, *, bits: int, transform: Tensor | None, clip: Tensor
    ) -> None:
        rows = (*like.shape[:2], capacity)
        options: dict[str, Any] = {"device": like.device}
        codes = torch.zeros((*rows, packed_size(like.shape[3], bits)), dtype=torch.uint8, **options)
        scale = torch.zeros(rows, dtype=torch.float32, **options)
        super().__init__((codes, scale, torch.zeros(rows, dtype=torch.uint8, **options)), like)
        self.bits, self.transform, self.clip = bits, transform, clip

    def view(self, exact: Tensor | None = None) -> PackedStates:
        """The handle; `exact` rides along."""
        codes, scale, zero = self.tensors
        states = PackedStates(
            codes=codes,
            scale=scale,
            zero=zero,
            bits=self.bits,
            length=self.length,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )
        return states if exact is None else replace(states, exact=exact)

    def dequantize(self) -> Tensor:
        """(q - z)*s in the stored basis."""
        return self.view().dequantize()

    def _write(self, states: Tensor) -> None:
        codes, scale, zero = self.tensors
        ops.kv_quantize_append(
            states,
            codes,
            scale,
            zero,
            transform=self.transform,
            clip=self.clip,
            bits=self.bits,
            start=self.length,
        )
