"""Bad input of the decoder: each tensor of a layer, a cache and a step, in every wrong way."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import decoder
from flatquant_cuda.decoder import DecoderPlan

from .test_decoder import SCALING, SIZES, inputs, make_cache, make_layer
from .test_faults import WRONG as EVERY_WRONG

pytestmark = pytest.mark.skipif(not decoder.available(), reason="no native decoder_stack")
# A plan is on the host for layers on any device: shape functions cannot tell two devices from one.
WRONG = {kind: wrong for kind, wrong in EVERY_WRONG.items() if kind != "device"}


def layer_names() -> list[str]:
    inputs_, linears = ("attention_in", "attention_out", "mlp_in", "mlp_out"), "qkvo"
    names = [
        f"{part}.{name}" for part in inputs_ for name in ("channel_scale", "left", "right", "clip")
    ]
    for linear in (*linears, "gate", "up", "down"):
        names += [f"{linear}.{name}" for name in ("weight", "scale", "colsum", "bias")]
    return [*names, "k_transform", "q_transform", "k_clip", "v_clip"]


def message_of(kind: str, name: str, tensor: Tensor) -> str:
    return WRONG[kind][1].format(name=re.escape(name), size=tensor.itemsize)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tensor_of_a_layer_is_named(kind: str) -> None:
    sizes = dataclasses.replace(SIZES, a_symmetric=False)
    layers = [make_layer(sizes, seed) for seed in range(2)]
    tensors = [torch.empty(0) if t is None else t for x in layers for t in x.tensors()]
    arguments = [2, 48, 80, 6, 2, 8, 4, 4, 4, 4, 0], [SCALING, *[1e-5] * 4]
    plan = torch.ops.flatquant_cuda.decoder_plan
    assert plan(tensors, *arguments).shape == (3, 1024)
    tried = 0
    for i, name in enumerate(layer_names()):
        tensor = tensors[48 + i]
        if not tensor.numel() or (kind == "misaligned" and tensor.itemsize == 1):
            continue
        changed = [*tensors[: 48 + i], WRONG[kind][0](tensor), *tensors[49 + i :]]
        message = message_of(kind, f"layers[1].{name}", tensor)
        with pytest.raises(RuntimeError, match=f"^decoder_plan: {message}"):
            plan(changed, *arguments)
        tried += 1
    assert tried >= 30


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tensor_of_a_cache_is_named(kind: str) -> None:
    plan = DecoderPlan([make_layer(SIZES, seed) for seed in range(2)], SIZES, SCALING)
    sides = [f"{side}_{name}" for side in "kv" for name in ("codes", "scale", "zero")]
    for i, name in enumerate(sides, start=6):
        cache = make_cache(SIZES, 2, 2, 4)
        if kind == "misaligned" and cache[i].itemsize == 1:
            continue
        message = message_of(kind, f"layers[1].{name}", cache[i])
        cache[i] = WRONG[kind][0](cache[i])
        with pytest.raises(RuntimeError, match=f"^decoder_cache: {message}"):
            plan.bind_cache(cache)


# Masks may be strided; bytes are never misaligned.
MAY_BE = {("mask", "strided"), ("mask", "expanded")}
MAY_BE |= {("plan", "misaligned"), ("cache", "misaligned")}
STEP = [
    (name, kind)
    for name in ("hidden", "cos", "sin", "mask", "plan", "cache")
    for kind in WRONG
    if (name, kind) not in MAY_BE
]


@pytest.mark.parametrize(("name", "kind"), STEP)
def test_a_wrong_tensor_of_a_step_is_named(name: str, kind: str) -> None:
    plan = DecoderPlan([make_layer(SIZES, 0)], SIZES, SCALING)
    cache = plan.bind_cache(make_cache(SIZES, 1, 2, 4))
    hidden, cos, sin = inputs(SIZES, torch.float32, 2, 3)
    named: dict[str, Any] = {"hidden": hidden, "cos": cos, "sin": sin}
    named |= {"mask": torch.zeros(2, 6, 3, 3), "plan": plan.plan, "cache": cache.handle, "past": 0}
    tensor = named[name]
    message = message_of(kind, name, tensor)
    named[name] = WRONG[kind][0](tensor)
    with pytest.raises(RuntimeError, match=f"^decoder_stack: {message}"):
        torch.ops.flatquant_cuda.decoder_stack(*named.values())


def test_a_cache_of_layers_that_overlaps_is_named() -> None:
    plan = DecoderPlan([make_layer(SIZES, seed) for seed in range(2)], SIZES, SCALING)
    good = make_cache(SIZES, 2, 2, 4)
    buffer = torch.zeros(2 * good[0].numel(), dtype=torch.uint8)
    for first, second, names in (
        (good[0], good[0], r"layers\[[01]\].k_codes overlaps layers\[[01]\].k_codes"),
        (buffer[:64].view(2, 2, 4, 4), buffer[63:127].view(2, 2, 4, 4), r"layers\[1\].k_codes"),
    ):
        cache = [first, *good[1:6], second, *good[7:]]
        with pytest.raises(RuntimeError, match=f"^decoder_cache: {names}.*: it is written, so it"):
            plan.bind_cache(cache)
