"""Whole decoder stacks by the CUDA sources: the op against its parts, and against the CPU's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flatquant_cuda.decoder import Layer, Sizes
from tests.ops import test_decoder
from tests.ops.cases import Call

from .emulated import GPUS, ORDERS, Emulated

SIZES = dataclasses.replace(
    test_decoder.SIZES, hidden=256, intermediate=384, heads=4, kv_heads=2, head_dim=64
)
CAPACITY, LAYERS = 40, 2
ARRAYS = 6  # of a layer's cache: codes, scales and zero points of keys, then of values


class SingleOps:
    """`flatquant_cuda.ops` by the CUDA sources."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.flatquant_emulated, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            named = Call(name, args, kwargs).map(Tensor.contiguous).named()
            return op(*(named[argument.name] for argument in op._schema.arguments))

        return call


def joined_layer(sizes: Sizes, seed: int, *, plain: bool = False) -> Layer:
    """Neighbours in memory; either both or none of gate and up have a bias."""
    layer = test_decoder.make_layer(sizes, seed, plain=plain)
    layer = dataclasses.replace(layer, up=dataclasses.replace(layer.up, bias=None))
    layer.join()
    return layer


class Stack:
    """Layers and a cache bound to the emulated decoder_stack."""

    def __init__(self, layers: list[Layer], sizes: Sizes, batch: int) -> None:
        self.library = torch.ops.flatquant_emulated
        self.tensors = [
            torch.empty(0) if tensor is None else tensor
            for layer in layers
            for tensor in layer.tensors()
        ]
        numbers = [eps for layer in layers for eps in (layer.attention_eps, layer.mlp_eps)]
        self.plan = self.library.decoder_plan(
            self.tensors,
            [len(layers), *map(int, dataclasses.astuple(sizes))],
            [test_decoder.SCALING, *numbers],
        )
        self.cache = test_decoder.make_cache(sizes, len(layers), batch, CAPACITY)
        self.bound = self.library.decoder_cache(self.plan, self.cache)

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        past: int,
        mask: Tensor | None = None,
        slots: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """As `DecoderPlan.run`."""
        result: Tensor = self.library.decoder_stack(
            hidden, cos, sin, mask, self.plan, self.bound, past, slots, lengths
        )
        return result


@dataclass(frozen=True)
class StackRow:
    """A setting of a stack; a row like those of rows.py."""

    dtype: torch.dtype
    gpu: str
    widths: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    plain: bool = False
    joined: bool = True  # neighbouring weights are one product
    on_device: bool = False  # places and lengths are tensors, as in a CUDA graph
    steps: tuple[int, ...] = (3, 1, 2, 1)  # tokens of each call

    @property
    def id(self) -> str:
        """The row in pytest's output."""
        flags = "-".join(n for n in ("plain", "joined", "on_device") if getattr(self, n))
        widths = "-".join(f"{name}={value}" for name, value in self.widths.items())
        name = f"decoder_stack-{self.batch}-{self.steps}-{widths}-{flags}-{self.dtype}-{self.gpu}"
        return name.replace("torch.", "").replace(" ", "")

    def check(self, emulated: Emulated, *orders: str, shift: int = 0) -> list[list[bytes]]:
        """Compare with the same ops one by one, bit for bit: outputs and caches."""
        answers = []
        for order in orders or ORDERS[:1]:
            emulated.choose(self.gpu, order, shift=shift)
            answers.append(self._run())
        emulated.checked.add(self.id)
        return answers

    def _run(self) -> list[bytes]:
        sizes = dataclasses.replace(SIZES, **self.widths)
        make = joined_layer if self.joined else test_decoder.make_layer
        layers = [make(sizes, seed, plain=self.plain) for seed in range(LAYERS)]
        stack = Stack(layers, sizes, self.batch)
        cache = test_decoder.make_cache(sizes, LAYERS, self.batch, CAPACITY)
        found, past = [], 0
        for t in self.steps:
            given = test_decoder.inputs(sizes, self.dtype, self.batch, t, seed=past)
            mask = test_decoder.causal(t, past + t) if t > 1 else None
            places = self._places(past, t)
            if self.on_device:
                got = stack.run(*given, past=CAPACITY - t, **places)
            else:
                got = stack.run(*given, past=past, mask=mask)
            with mock.patch.object(test_decoder, "ops", SingleOps()):
                want = test_decoder.one_by_one(layers, sizes, *given, cache, past=past, mask=mask)
            assert torch.isfinite(want).all()
            assert torch.equal(got, want), f"{self.id}: {t} tokens after {past}"
            found.append(got)
            past += t
        names = ("codes", "scale", "zero")
        for i, (got, want) in enumerate(zip(stack.cache, cache, strict=True)):
            side = "keys" if i % ARRAYS < ARRAYS // 2 else "values"
            assert torch.equal(got, want), f"{names[i % 3]} of the {side} of layer {i // ARRAYS}"
        return [t.flatten().view(torch.uint8).numpy().tobytes() for t in found]

    def _places(self, past: int, t: int) -> dict[str, Tensor]:
        positions = torch.arange(past, past + t).expand(self.batch, t)
        return {
            "slots": torch.arange(self.batch)[:, None] * CAPACITY + positions,
            "lengths": torch.full((self.batch,), past + t, dtype=torch.int32),
        }


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100, RTX_3090, H100 = GPUS


def _rows() -> Iterator[StackRow]:
    for i, (dtype, gpu) in enumerate(((BF16, H100), (FP16, A100), (FP32, RTX_3090))):
        yield StackRow(dtype, gpu)
        yield StackRow(dtype, gpu, joined=False, on_device=True)
        yield StackRow(dtype, gpu, batch=1, steps=(1, 1, 2), on_device=i != 1)
    yield StackRow(BF16, A100, on_device=True)
    yield StackRow(FP16, H100, {"a_symmetric": False, "a_bits": 8}, batch=3)
    yield StackRow(BF16, RTX_3090, {"a_symmetric": False}, on_device=True)
    eight = {"w_bits": 8, "a_bits": 8, "k_bits": 8, "v_bits": 8}
    yield StackRow(BF16, H100, eight, joined=False)
    yield StackRow(
        FP32, A100, {"hidden": 45, "intermediate": 33, "heads": 3, "kv_heads": 3, "head_dim": 14}
    )
    yield StackRow(BF16, H100, plain=True, joined=False, batch=1, steps=(1, 1))


STACKS = tuple(_rows())
