"""Hidden states of a text on their way through one model, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner, first_block_inputs
from flatquant.models.spec import FamilySpec
from flatquant.runtime.stack import FastPath, decoder_of, fast_path
from flatquant.surgery import swapped


class Stream:
    """The windows of a text in front of a block of a model.

    Blocks run in the model's own dtype, as they do in the model; what is between them is kept in
    float32, on the model's device.

    Attributes:
        hidden: [windows, tokens, hidden] float32.
    """

    def __init__(self, model: Any, family: FamilySpec, tokens: Tensor, batch_size: int) -> None:
        self.model, self.family = model, family
        with block_by_block(model):
            self.hidden, run = first_block_inputs(model, family, tokens, batch_size)
        self._run = BlockRunner({key: _cast(value, model) for key, value in run.kwargs.items()})

    def through(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block on some windows [batch, tokens, hidden], float32 in and out."""
        return self._run(block, hidden.to(self.model.dtype)).float()

    @contextmanager
    def finished(self) -> Iterator[Any]:
        """The model with `hidden` as the output of its blocks, whatever tokens it is called with.

        Windows come in order, one a call.
        """
        replay = _Replay(self.hidden, self.model.dtype)
        blocks: dict[str, nn.Module] = {self.family.blocks: nn.ModuleList([replay])}
        with block_by_block(self.model), swapped(self.model, blocks):
            yield self.model


@contextmanager
def block_by_block(model: Any) -> Iterator[None]:
    """The model without its fast path, which would look for real blocks."""
    path = getattr(decoder_of(model), "fast_path", None)
    if not isinstance(path, FastPath) or not path.enabled:
        yield
        return
    fast_path(model, False)
    try:
        yield
    finally:
        fast_path(model, True)


class _Replay(nn.Module):
    """Stands where the blocks were and gives what they have given before."""

    attention_type = "full_attention"  # some models read it of a layer to choose its mask

    def __init__(self, hidden: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._left = iter(hidden.split(1))
        self._dtype = dtype

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """The next window; the arguments do not matter."""
        return next(self._left).to(self._dtype)


def _cast(value: Any, model: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, model) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(model.dtype)
    return value
