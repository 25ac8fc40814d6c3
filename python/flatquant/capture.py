"""Run calibration text through a model block by block and record what a method asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatquant.models.spec import FamilySpec


def check_tokens(tokens: Tensor | None, vocabulary: int, needed_by: str) -> Tensor:
    """Calibration tokens, or a ValueError that says what is wrong with them."""
    if tokens is None:
        raise ValueError(f"{needed_by} needs calibration text: pass token ids [samples, seqlen]")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype != torch.int64:
        kind = (
            f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens)
        )
        raise ValueError(f"calibration: expected int64 token ids [samples, seqlen], got {kind}")
    samples, length = tokens.shape
    if samples < 1 or length < 2:
        raise ValueError(
            f"calibration: {samples} samples of {length} tokens; at least 1 sample of 2 is needed"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration: token ids span {low}..{high}, the vocabulary is 0..{vocabulary - 1}"
        )
    return tokens


def random_crops(token_ids: Tensor, samples: int, length: int, seed: int = 0) -> Tensor:
    """[samples, length] random crops of one long token stream.

    Raises:
        ValueError: the stream is shorter than one crop.
    """
    stream = token_ids.reshape(-1)
    if stream.numel() < length + 1:
        raise ValueError(
            f"calibration text has {stream.numel()} tokens, one sample needs {length + 1}"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, stream.numel() - length, (samples,), generator=generator)
    return torch.stack([stream[s : s + length] for s in starts.tolist()])


class _Recorder(nn.Module):
    """Stands where the decoder blocks were, and keeps what the first one would have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.hidden.append(hidden.detach())
        self.kwargs = kwargs
        return hidden

    def __getattr__(self, name: str) -> Any:
        # some models read `attention_type` of a layer to choose its mask
        if name == "attention_type":
            return "full_attention"
        return super().__getattr__(name)


@dataclass(frozen=True)
class BlockRunner:
    """Calls a decoder block the way its model does."""

    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden: [batch, tokens, hidden] -> same."""
        return _first(block(hidden, **self.kwargs))

    def to(self, device: torch.device) -> BlockRunner:
        """The same for blocks on another device."""
        return BlockRunner({key: _moved(value, device) for key, value in self.kwargs.items()})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def first_block_inputs(
    model: nn.Module, family: FamilySpec, tokens: Tensor, batch_size: int
) -> tuple[Tensor, BlockRunner]:
    """Hidden states [samples, tokens, hidden] in front of the first block, and a runner.

    The blocks are taken out for the moment, so only the embedding and the rotary tables run.
    """
    parent_name, _, child = family.blocks.rpartition(".")
    parent = model.get_submodule(parent_name)
    blocks = getattr(parent, child)
    recorder = _Recorder()
    decoder = model.get_submodule(family.decoder)
    # blocks may be on the meta device, and a quantized embedding has no parameter
    device = next(p.device for p in model.parameters() if not p.is_meta)
    setattr(parent, child, nn.ModuleList([recorder]))
    try:
        for part in tokens.split(batch_size):
            decoder(input_ids=part.to(device), use_cache=False)
    finally:
        setattr(parent, child, blocks)
    kwargs = {key: _one_row(value) for key, value in recorder.kwargs.items()}
    kwargs["past_key_values"] = None
    hidden = torch.cat(recorder.hidden)
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32)), BlockRunner(kwargs)


def _one_row(value: Any) -> Any:
    """A batched tensor cut to one row, which broadcasts over any batch; all samples are alike."""
    if isinstance(value, Tensor):
        value = value[:1] if value.dim() > 1 else value
        if not value.is_floating_point():
            return value
        return value.to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(value, tuple):
        return tuple(_one_row(item) for item in value)
    return value


@dataclass(frozen=True)
class InputStatistics:
    """Extrema, mean size and power of the inputs of a linear, per channel, float32."""

    largest: Tensor
    mean_size: Tensor
    mean_square: Tensor


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments, and its result (the first one of a tuple)."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor

    def repeat(self, module: nn.Module) -> Tensor:
        """What `module` gives for the same arguments."""
        return _first(module(*self.args, **self.kwargs))


def _first(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@contextmanager
def recording(root: nn.Module, names: Collection[str]) -> Iterator[dict[str, list[Call]]]:
    """Keep every call of the named modules for as long as the context lasts."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    handles = []
    for name, kept in calls.items():

        def hook(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            result: Any,
            kept: list[Call] = kept,
        ) -> None:
            kept.append(Call(args, kwargs, _first(result)))

        handles.append(root.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching(root: nn.Module, names: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call a function with every input that the named modules receive."""
    handles = []
    for name, function in names.items():

        def hook(module: nn.Module, args: tuple[Any, ...], see: Any = function) -> None:
            see(args[0])

        handles.append(root.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StatisticsCollector:
    """Accumulates `InputStatistics` over batches."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self._size: Tensor | None = None
        self._square: Tensor | None = None
        self._count = 0

    def __call__(self, x: Tensor) -> None:
        """x: [..., channels]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        sizes, square = rows.abs(), rows.square().sum(0)
        largest, size = sizes.amax(0), sizes.sum(0)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._size = size if self._size is None else self._size + size
        self._square = square if self._square is None else self._square + square
        self._count += rows.shape[0]

    def result(self) -> InputStatistics:
        """What was seen."""
        if self._largest is None or self._size is None or self._square is None:
            raise RuntimeError("no input was seen")
        count = self._count
        return InputStatistics(self._largest, self._size / count, self._square / count)
