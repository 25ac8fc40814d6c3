"""Keys and values in formats that no kernel stores: rounded, and kept in floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.fakequant import simulate
from flatquant.formats import Format
from flatquant.runtime.storage import PackedStates, Storage
from flatquant_cuda import ops


class SimulatedStates(PackedStates):
    """States in the numbers of a format that no kernel reads: `codes` are the values, float.

    `scale` is 1, or NaN at poisoned positions; `zero` is not used.
    """

    @property
    def has_codes(self) -> bool:
        """They are no codes."""
        return False

    def dequantize(self, *, clean: bool = False) -> Tensor:
        """The values, as of the base class."""
        values = self.codes[:, :, : self.length]
        return values.masked_fill(self.poisoned().unsqueeze(-1), 0.0) if clean else values


class SimulatedStorage(Storage):
    """States kept in floating point, rounded to a format that no kernel stores."""

    def __init__(
        self,
        like: Tensor,
        capacity: int,
        *,
        format: Format,
        transform: Tensor | None,
        clip: Tensor,
    ) -> None:
        rows = (*like.shape[:2], capacity)
        scale = torch.zeros(rows, dtype=torch.float32, device=like.device)
        super().__init__((like.new_zeros((*rows, like.shape[3])), scale), like)
        self.format, self.transform, self.clip = format, transform, clip

    def view(self, exact: Tensor | None = None) -> SimulatedStates:
        """The handle; `exact` rides along."""
        values, scale = self.tensors
        return SimulatedStates(
            codes=values,
            scale=scale,
            zero=scale,
            bits=self.format.bits,
            length=self.length,
            head_dim=self.head_dim,
            dtype=self.dtype,
            exact=exact,
        )

    def dequantize(self) -> Tensor:
        """The values, in the stored basis."""
        return self.view().dequantize()

    def _write(self, states: Tensor) -> None:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        if self.transform is not None:
            wide = ops.kronecker(wide, None, self.transform)
        values = simulate(wide, self.format, self.clip)
        finite = values.isfinite().all(-1)
        end = self.length + states.shape[2]
        self.tensors[0][:, :, self.length : end] = values.to(self.dtype)
        self.tensors[1][:, :, self.length : end] = torch.where(finite, 1.0, torch.nan)
