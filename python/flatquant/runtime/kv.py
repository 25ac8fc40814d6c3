"""The quantizer of one attention layer's keys and values.

Integer formats call three ops and nothing else: `kv_quantize_append` transforms, quantizes and
stores, `kv_dequantize` reads back (both in `storage.py`), `kronecker` turns the queries. Cached
and uncached attention share this file, so they see the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.formats import Format
from flatquant.runtime.buffers import ExactBuffers
from flatquant.runtime.simulated import SimulatedStorage
from flatquant.runtime.storage import FloatStorage, PackedStorage, Storage
from flatquant.scheme import OFF
from flatquant_cuda import ops


class KVQuantizer(ExactBuffers):
    """Quantizer of one layer's keys and values (FlatQuant section 3.2, P_h; per-head scales).

    Keys are stored as K P_h; queries are multiplied by P_h^-T, so that Q K^T is unchanged.
    Values carry no online transform (P_v is merged into the projections).

    Args:
        head_dim: channels per head.
        k_bits: bits of the keys, 2..8, or 16 for off.
        v_bits: bits of the values, 2..8, or 16 for off.
        k_format: what keys are rounded to where it is not integers of `k_bits` with a scale a
            row; such keys are simulated in floating point.
        v_format: the same for values.
        transform: whether there is a P_h; with unquantized keys it is kept, not applied.
        attend_unquantized_prefill: let a prompt attend to its own unquantized K and V (the
            paper's choice) instead of to what decoding will read.
        device: where the buffers live.

    Buffers, float32 whatever dtype the model is cast to: `k_trans` [d, d] = P_h and `q_trans`
    [d, d] = P_h^-T if there is a transform; `k_clip`, `v_clip` [2] = clip ratios (max, min).

    Raises:
        ValueError: a width outside 2..8 and 16, or a head_dim below 1.
    """

    exact = frozenset({"k_trans", "q_trans", "k_clip", "v_clip"})
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
        k_format: Format | None = None,
        v_format: Format | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"KVQuantizer: head_dim={head_dim} must be at least 1")
        for name, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
            if not (2 <= bits <= 8 or bits == OFF):
                raise ValueError(f"KVQuantizer: {name}={bits} must be 2..8, or 16 for off")
        self.head_dim, self.k_bits, self.v_bits = head_dim, k_bits, v_bits
        self.k_format, self.v_format = k_format, v_format
        for name, format in (("k_group", k_format), ("v_group", v_format)):
            if format is not None:
                format.check_width(head_dim, name)
        self.attend_unquantized_prefill = attend_unquantized_prefill
        if transform:
            eye = torch.eye(head_dim, dtype=torch.float32, device=device)
            self.register_buffer("k_trans", eye)
            self.register_buffer("q_trans", eye.clone())
        else:
            self.k_trans = self.q_trans = None
        self.register_buffer("k_clip", torch.ones(2, dtype=torch.float32, device=device))
        self.register_buffer("v_clip", torch.ones(2, dtype=torch.float32, device=device))

    @property
    def simulated(self) -> bool:
        """Whether keys or values have a format that no kernel stores."""
        return self.k_format is not None or self.v_format is not None

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
        k = _storage(key, self.k_bits, self.k_format, self.k_trans, self.k_clip, capacity)
        return k, _storage(value, self.v_bits, self.v_format, None, self.v_clip, capacity)

    def fills(self, keys: Storage, values: Storage) -> bool:
        """Whether these storages hold codes and would be filled by what this quantizer has now."""
        return (
            isinstance(keys, PackedStorage)
            and isinstance(values, PackedStorage)
            and keys.transform is self.k_trans
            and keys.clip is self.k_clip
            and values.clip is self.v_clip
        )

    def extra_repr(self) -> str:
        """Widths and transform, for `print(model)`."""
        transform = self.q_trans is not None
        simulated = ", simulated" if self.simulated else ""
        return (
            f"{self.head_dim}, k_bits={self.k_bits}, v_bits={self.v_bits}, {transform=}{simulated}"
        )


def _storage(
    like: Tensor,
    bits: int,
    format: Format | None,
    transform: Tensor | None,
    clip: Tensor,
    capacity: int,
) -> Storage:
    """The storage for states like `like` [batch, kv_heads, t, d]."""
    if bits == OFF:
        return FloatStorage(like, capacity)
    if format is not None:
        return SimulatedStorage(like, capacity, format=format, transform=transform, clip=clip)
    return PackedStorage(like, capacity, bits=bits, transform=transform, clip=clip)
