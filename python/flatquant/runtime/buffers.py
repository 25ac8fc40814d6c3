"""Buffers that define codes keep their dtype when a model is cast; changes to them are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """Module whose `exact` buffers follow `.to(device)` but not `.to(dtype)`.

    Scales, transforms and clips are part of a checkpoint's meaning: rounding them to the dtype
    that a user runs the rest of the model in would change every code.

    `changes` counts, over all modules of this kind, every assignment to an attribute and every
    move: what was bound to the memory of buffers holds as long as the count stands still.
    """

    exact: ClassVar[frozenset[str]] = frozenset()
    changes: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        ExactBuffers.changes += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        ExactBuffers.changes += 1
        super().__delattr__(name)

    def register_buffer(self, *args: Any, **kwargs: Any) -> None:
        """As in `nn.Module`."""
        ExactBuffers.changes += 1
        super().register_buffer(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        ExactBuffers.changes += 1
        before = {name: self._buffers.get(name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers.get(name)
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
