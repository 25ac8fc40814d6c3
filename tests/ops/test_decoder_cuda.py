"""decoder_stack on a GPU: the bits of its ops one by one, launched, placed and in a CUDA graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import decoder
from flatquant_cuda.decoder import DecoderPlan, Layer, Sizes

from .test_decoder import SCALING, SIZES, WIDTHS, causal, inputs, make_cache, make_layer, one_by_one

REAL = {"hidden": 256, "intermediate": 384, "heads": 8, "kv_heads": 2, "head_dim": 64}
SETTINGS: list[dict[str, Any]] = [*WIDTHS, REAL, REAL | {"a_bits": 8}, REAL | {"k_bits": 2}]
CAPACITY, LAYERS = 600, 2


def moved(layer: Layer, device: str, *, biases: bool) -> Layer:
    """A layer elsewhere; without biases neighbouring products can be joined."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if not dataclasses.is_dataclass(value):
            return value
        changes = {f.name: part(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if "bias" in changes and not biases:
            changes["bias"] = None
        return dataclasses.replace(value, **changes)  # type: ignore[type-var]

    found: Layer = part(layer)
    return found


def difference(
    sizes: Sizes, dtype: torch.dtype, batch: int, *, biases: bool = True, device: str = "cuda"
) -> str | None:
    """Where the stack's bits are not those of its ops one by one on a device, or None."""
    layers = [moved(make_layer(sizes, seed), device, biases=biases) for seed in range(LAYERS)]
    plan = DecoderPlan(layers, sizes, SCALING)
    caches = [[t.to(device) for t in make_cache(sizes, LAYERS, batch, CAPACITY)] for _ in range(3)]
    bounds = [plan.bind_cache(cache) for cache in caches[:2]]
    past = 0
    for t in (300, 1, 17, 1, 2, 1):
        given = [x.to(device) for x in inputs(sizes, dtype, batch, t, seed=past)]
        mask = causal(t, past + t).to(device) if t > 1 else None
        want = one_by_one(layers, sizes, *given, caches[2], past=past, mask=mask)
        got = plan.run(*given, bounds[0], past=past, mask=mask)
        positions = torch.arange(past, past + t, device=device)
        slots = torch.arange(batch, device=device)[:, None] * CAPACITY + positions
        lengths = torch.full((batch,), past + t, dtype=torch.int32, device=device)
        placed = plan.run(*given, bounds[1], past=CAPACITY - t, slots=slots, lengths=lengths)
        if not torch.equal(got, want):
            return f"{t} tokens after {past}"
        if not torch.equal(placed, want):
            return f"{t} tokens placed after {past}"
        past += t
    for index, (a, b, c) in enumerate(zip(*caches, strict=True)):
        if not torch.equal(a, c) or not torch.equal(b, c):
            return f"tensor {index} of the cache"
    return None


on_gpu = pytest.mark.skipif(not decoder.available("cuda"), reason="no native decoder_stack on CUDA")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@with_gpu
@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("widths", SETTINGS, ids=str)
def test_bits_are_those_of_the_ops_one_by_one(
    widths: dict[str, Any], biases: bool, dtype: torch.dtype
) -> None:
    for batch in (1, 3):
        sizes = dataclasses.replace(SIZES, **widths)
        assert difference(sizes, dtype, batch, biases=biases) is None


@with_gpu
@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 4])
def test_a_captured_step_serves_all_lengths(batch: int) -> None:
    sizes = dataclasses.replace(SIZES, **REAL)
    layers = [moved(make_layer(sizes, seed), "cuda", biases=False) for seed in range(LAYERS)]
    plan = DecoderPlan(layers, sizes, SCALING)
    bounds = [
        plan.bind_cache([t.cuda() for t in make_cache(sizes, LAYERS, batch, CAPACITY)])
        for _ in range(2)
    ]
    still = [x.cuda() for x in inputs(sizes, torch.bfloat16, batch, 1)]
    slots = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch, device="cuda")[:, None] * CAPACITY

    def step() -> Tensor:
        return plan.run(*still, bounds[0], past=CAPACITY - 1, slots=slots, lengths=lengths)

    slots.fill_(-1)
    step()  # warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step()
    for past in range(520):
        given = [x.cuda() for x in inputs(sizes, torch.bfloat16, batch, 1, seed=past)]
        for to, new in zip(still, given, strict=True):
            to.copy_(new)
        slots.copy_(starts + past)
        lengths.fill_(past + 1)
        graph.replay()
        assert torch.equal(answer, plan.run(*given, bounds[1], past=past)), past


def test_settings_on_the_cpu() -> None:
    """What the GPU is asked is right: there, too, the stack is its ops (but for placed tokens)."""
    if not decoder.available():
        pytest.skip("no native decoder_stack")
    original = DecoderPlan.run

    def run(plan: DecoderPlan, *args: Any, **kwargs: Any) -> Tensor:
        lengths = kwargs.pop("lengths", None)
        if kwargs.pop("slots", None) is not None:
            t = args[0].shape[1]
            kwargs["past"] = int(lengths[0]) - t
            kwargs["mask"] = causal(t, int(lengths[0])) if t > 1 else None
        return original(plan, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderPlan, "run", run)
        for widths in ({}, REAL):
            sizes = dataclasses.replace(SIZES, **widths)
            assert difference(sizes, torch.bfloat16, 2, device="cpu") is None
