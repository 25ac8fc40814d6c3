"""Buffers that define codes keep their dtype when a model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """Module whose `exact` buffers follow `.to(device)` but not `.to(dtype)`.

    Scales, transforms and clips are part of a checkpoint's meaning: rounding them to the dtype
    that a user runs the rest of the model in would change every code.
    """

    exact: ClassVar[frozenset[str]] = frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        before = {name: self._buffers.get(name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers.get(name)
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
