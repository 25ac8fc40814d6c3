"""Quantized keys and values: their quantizer, their packed storage, the handle attention reads.

Everything here calls three ops and nothing else: `kv_quantize_append` transforms, quantizes and
stores, `kv_dequantize` reads back, `attention_decode` (in `attention.py`) reads the codes
themselves. Cached and uncached attention share this file, so they see the same codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from flatquant_cuda import ops
from flatquant_cuda.packing import packed_size
from torch import Tensor, nn

from flatquant.scheme import OFF


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


class KVQuantizer(nn.Module):
    """Quantizer of one layer's keys and values (FlatQuant section 3.2, P_h; per-head scales).

    Keys are stored as K P_h; queries are multiplied by P_h^-T, so that Q K^T is unchanged.
    Values carry no online transform (P_v is merged into the projections).

    Args:
        head_dim: channels per head.
        k_bits: bits of the keys, 2..8, or 16 for off.
        v_bits: bits of the values, 2..8, or 16 for off.
        transform: whether there is a P_h; with unquantized keys it is kept, not applied.
        attend_unquantized_prefill: let a prompt attend to its own unquantized K and V (the
            paper's choice) instead of to what decoding will read.
        device: where the buffers live.

    Buffers, float32 whatever dtype the model is cast to: `k_trans` [d, d] = P_h and `q_trans`
    [d, d] = P_h^-T if there is a transform; `k_clip`, `v_clip` [2] = clip ratios (max, min).

    Raises:
        ValueError: a width outside 2..8 and 16, or a head_dim below 1.
    """

    k_clip: Tensor
    v_clip: Tensor
    k_trans: Tensor | None
    q_trans: Tensor | None

    def __init__(
        self,
        head_dim: int,
        k_bits: int,
        v_bits: int,
        transform: bool,
        *,
        attend_unquantized_prefill: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"KVQuantizer: head_dim={head_dim} must be at least 1")
        for name, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
            if not (2 <= bits <= 8 or bits == OFF):
                raise ValueError(f"KVQuantizer: {name}={bits} must be 2..8, or 16 for off")
        self.head_dim, self.k_bits, self.v_bits = head_dim, k_bits, v_bits
        self.attend_unquantized_prefill = attend_unquantized_prefill
        if transform:
            eye = torch.eye(head_dim, dtype=torch.float32, device=device)
            self.register_buffer("k_trans", eye)
            self.register_buffer("q_trans", eye.clone())
        else:
            self.k_trans = self.q_trans = None
        self.register_buffer("k_clip", torch.ones(2, dtype=torch.float32, device=device))
        self.register_buffer("v_clip", torch.ones(2, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KVQuantizer:
        """Follow `.to(device)`, ignore `.to(dtype)`: transform and clips define the codes."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                same = moved.dtype == buffer.dtype
                self._buffers[name] = moved if same else buffer.to(moved.device)
        return self

    def rotate_query(self, query: Tensor) -> Tensor:
        """Query [batch, heads, t, d] in the basis of the stored keys, Q P_h^-T; same dtype."""
        if self.q_trans is None or self.k_bits == OFF:
            return query
        return ops.kronecker(query, None, self.q_trans)

    def restore_key(self, key: Tensor) -> Tensor:
        """Key [batch, kv_heads, t, d] of the stored basis in the model's basis, K P_h^-1."""
        if self.q_trans is None or self.k_bits == OFF:
            return key
        return ops.kronecker(key, None, self.q_trans.t().contiguous())

    def store(self, key: Tensor, value: Tensor, capacity: int) -> tuple[Storage, Storage]:
        """Empty storages that quantize what is appended to them: keys, values."""
        k = _storage(key, self.k_bits, self.k_trans, self.k_clip, capacity)
        return k, _storage(value, self.v_bits, None, self.v_clip, capacity)

    def extra_repr(self) -> str:
        """Widths and transform, for `print(model)`."""
        transform = self.q_trans is not None
        return f"{self.head_dim}, k_bits={self.k_bits}, v_bits={self.v_bits}, {transform=}"


def _storage(
    like: Tensor, bits: int, transform: Tensor | None, clip: Tensor, capacity: int
) -> Storage:
    """The storage for states like `like` [batch, kv_heads, t, d]."""
    if bits == OFF:
        return FloatStorage(like, capacity)
    return PackedStorage(like, capacity, bits=bits, transform=transform, clip=clip)


class Storage:
    """Tensors [batch, kv_heads, capacity, ...] filled up to `length`, growing geometrically."""

    def __init__(self, tensors: tuple[Tensor, ...], like: Tensor) -> None:
        self.tensors, self.length = tensors, 0
        self.head_dim, self.dtype = like.shape[-1], like.dtype

    @property
    def capacity(self) -> int:
        """Positions there is memory for."""
        return self.tensors[0].shape[2]

    def append(self, states: Tensor) -> None:
        """Store states [batch, kv_heads, t, d] after what is there."""
        end = self.length + states.shape[2]
        if end > self.capacity:
            self._resize(self.length, max(end, 2 * self.capacity))
        self._write(states)
        self.length = end

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
        twin.map(torch.clone)
        return twin

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by function(tensor): batch selection, repetition, device moves."""
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
