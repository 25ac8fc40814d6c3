"""decoder_stack on CUDA is its ops one by one, bit for bit, and near the CPU's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import decoder
from flatquant_cuda.decoder import DecoderPlan
from tests.flatquant.runtime import test_graphs, test_stack
from tests.ops import test_decoder

from .emulated import GPUS, ORDERS, Emulated
from .stacks import CAPACITY, SIZES, STACKS, Stack, StackRow, joined_layer

H100 = GPUS[-1]


@pytest.mark.parametrize("row", STACKS, ids=lambda row: row.id)
def test_stack_is_its_ops_one_by_one(row: StackRow, emulated: Emulated) -> None:
    row.check(emulated)


@pytest.mark.parametrize("row", STACKS[:2], ids=lambda row: row.id)
def test_order_of_threads_changes_nothing(row: StackRow, emulated: Emulated) -> None:
    answers = row.check(emulated, *ORDERS)
    assert all(answer == answers[0] for answer in answers)


def launches_of(emulated: Emulated, *, joined: bool, batch: int = 1, t: int = 1) -> list[str]:
    """Names of what one layer launches."""
    layer = (joined_layer if joined else test_decoder.make_layer)(SIZES, 0)
    emulated.choose(H100)
    stack = Stack([layer], SIZES, batch)
    emulated.launches()
    stack.run(*test_decoder.inputs(SIZES, torch.bfloat16, batch, t), past=0)
    return [line.split()[0] for line in emulated.launches()]


def test_a_layer_is_a_dozen_launches(emulated: Emulated) -> None:
    """Codes and products, four each; RoPE, queries' basis, both sides of the cache, attention."""
    assert len(launches_of(emulated, joined=True)) == 12
    assert len(launches_of(emulated, joined=True, batch=3)) == 12
    assert len(launches_of(emulated, joined=False)) == 15
    assert len(launches_of(emulated, joined=True, t=3)) == 13  # heads back to tokens


def test_neighbours_are_joined_once_and_keep_their_values() -> None:
    layer, other = (test_decoder.make_layer(SIZES, 0) for _ in range(2))
    layer.join()
    first = [None if t is None else t.data_ptr() for t in layer.tensors()]
    for got, want in zip(layer.tensors(), other.tensors(), strict=True):
        assert got is None or torch.equal(got, want)
    layer.join()
    assert first == [None if t is None else t.data_ptr() for t in layer.tensors()]
    weights = [linear.weight for linear in (layer.q, layer.k, layer.v)]
    ends = [w.data_ptr() + w.numel() for w in weights]
    assert ends[:2] == [w.data_ptr() for w in weights[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(not decoder.available(), reason="no native decoder_stack")
def test_stack_is_near_that_of_the_cpu(dtype: torch.dtype, emulated: Emulated) -> None:
    """Sums in another order move a code here and there: little, at 8 bits."""
    eight = {"a_bits": 8, "w_bits": 8, "k_bits": 8, "v_bits": 8}
    sizes = dataclasses.replace(SIZES, **eight)
    layers = [test_decoder.make_layer(sizes, seed) for seed in range(2)]
    emulated.choose(H100)
    stack = Stack(layers, sizes, 2)
    plan = decoder.DecoderPlan(layers, sizes, test_decoder.SCALING)
    cache = plan.bind_cache(test_decoder.make_cache(sizes, 2, 2, CAPACITY))
    past = 0
    for t in (9, 1, 1):
        given = test_decoder.inputs(sizes, dtype, 2, t, seed=past)
        mask = test_decoder.causal(t, past + t) if t > 1 else None
        got = stack.run(*given, past=past, mask=mask).float()
        want = plan.run(*given, cache, past=past, mask=mask).float()
        error = (got - want).norm() / (want - given[0].float()).norm()
        assert error < 2e-2, error
        past += t


def test_a_graphs_padding_touches_nothing(emulated: Emulated) -> None:
    """A sequence of slot -1 and length 0 is not written; the others get the bits they get alone."""
    layers = [test_decoder.make_layer(SIZES, seed) for seed in range(2)]
    emulated.choose(H100)
    wide, alone = Stack(layers, SIZES, 4), Stack(layers, SIZES, 1)
    for position in range(3):
        hidden, cos, sin = test_decoder.inputs(SIZES, torch.bfloat16, 4, 1, seed=position)
        slots = torch.tensor([[-1], [CAPACITY + position], [-1], [-1]])
        lengths = torch.tensor([0, position + 1, 0, 0], dtype=torch.int32)
        got = wide.run(hidden, cos, sin, past=CAPACITY - 1, slots=slots, lengths=lengths)
        want = alone.run(hidden[1:2].contiguous(), cos, sin, past=position)
        assert torch.equal(got[1], want[0])
    for got, want in zip(wide.cache, alone.cache, strict=True):
        assert torch.equal(got[1], want[0])
        assert not got[0].any() and not got[2:].any()


def test_places_must_fit(emulated: Emulated) -> None:
    emulated.choose(H100)
    stack = Stack([test_decoder.make_layer(SIZES, 0)], SIZES, 2)
    given = test_decoder.inputs(SIZES, torch.bfloat16, 2, 1)
    slots, lengths = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
    for wrong, message in (
        ({"slots": slots}, "lengths is missing"),
        ({"lengths": lengths}, "slots is missing"),
        ({"slots": slots.int(), "lengths": lengths}, "slots"),
        ({"slots": slots, "lengths": lengths.long()}, "lengths"),
        ({"slots": slots[:1], "lengths": lengths}, "slots"),
    ):
        with pytest.raises(RuntimeError, match=message):
            stack.run(*given, past=0, **wrong)


@pytest.mark.skipif(not decoder.available(), reason="no native decoder_stack")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_by_graphs_gives_the_bits_of_its_launches(
    batch: int, masked: bool, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the model's forward to the CUDA sources; a recording repeats the step."""
    emulated.choose(H100)

    def run(plan: DecoderPlan, *args: Any, **kwargs: Any) -> Tensor:
        hidden, cos, sin, cache = args
        named = {"mask": None, "slots": None, "lengths": None} | kwargs
        result: Tensor = torch.ops.flatquant_emulated.decoder_stack(
            *(x.contiguous() for x in (hidden, cos, sin)),
            named["mask"],
            plan.plan,
            cache.handle,
            named["past"],
            named["slots"],
            named["lengths"],
        )
        return result

    monkeypatch.setattr(DecoderPlan, "run", run)
    with torch.no_grad():
        model = test_stack.quantized(dtype=torch.bfloat16)
        recorder = test_graphs.Repeating()
        test_graphs.with_graphs(model, recorder)
        got = test_graphs.decode(model, batch, 5, 12, masked=masked)
        want = test_graphs.without(
            model, lambda: test_graphs.decode(model, batch, 5, 12, masked=masked)
        )
    assert recorder.replayed == 5 and torch.isfinite(got).all()
    assert torch.equal(got, want)
