"""decoder_stack: the ops of all layers in one, with the same bits."""

from __future__ import annotations

import copy
import dataclasses
import math
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import decoder, ops, packing
from flatquant_cuda.decoder import BoundCache, DecoderPlan, Input, Layer, Linear, Sizes

pytestmark = pytest.mark.skipif(not decoder.available(), reason="no native decoder_stack")

SIZES = Sizes(
    hidden=48,
    intermediate=80,
    heads=6,
    kv_heads=2,
    head_dim=8,
    a_bits=4,
    w_bits=4,
    k_bits=4,
    v_bits=4,
    a_symmetric=True,
)
FACTORS = {48: (6, 8), 80: (8, 10), 45: (5, 9), 33: (3, 11), 256: (16, 16), 384: (16, 24)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def make_layer(sizes: Sizes, seed: int, *, plain: bool = False) -> Layer:
    """Random tensors; `plain` leaves out all that is optional."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def near_identity(n: int) -> Tensor:
        return torch.eye(n) + 0.2 * random(n, n)

    def clip() -> Tensor:
        return 0.8 + 0.2 * torch.rand(2, generator=generator)

    def linear(n: int, k: int, bias: bool) -> Linear:
        half = 1 << (sizes.w_bits - 1)
        codes = torch.randint(-half, half, (n, k), generator=generator).to(torch.int8)
        nibbles = sizes.w_bits <= 4
        return Linear(
            weight=packing.pack_nibbles(codes) if nibbles else codes,
            scale=(0.5 + torch.rand(n, generator=generator)) / (half * math.sqrt(k)),
            colsum=None if sizes.a_symmetric else codes.sum(1, dtype=torch.int32),
            bias=random(n) if bias and not plain else None,
        )

    def factors(width: int) -> dict[str, Tensor]:
        n1, n2 = FACTORS[width]
        return {"left": near_identity(n1), "right": near_identity(n2), "clip": clip()}

    def after_norm() -> Input:
        scale = 0.5 + torch.rand(sizes.hidden, generator=generator)
        return Input(channel_scale=scale, **({} if plain else factors(sizes.hidden)))

    hidden, wide = sizes.hidden, sizes.intermediate
    queries, states = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    heads = Input() if plain else Input(left=near_identity(sizes.heads), clip=clip())
    turned = {
        "k_transform": near_identity(sizes.head_dim),
        "q_transform": near_identity(sizes.head_dim),
        "k_clip": clip(),
        "v_clip": clip(),
    }
    return Layer(
        attention_in=after_norm(),
        attention_out=heads,
        mlp_in=after_norm(),
        mlp_out=Input() if plain else Input(**factors(wide)),
        q=linear(queries, hidden, True),
        k=linear(states, hidden, True),
        v=linear(states, hidden, True),
        o=linear(hidden, queries, False),
        gate=linear(wide, hidden, False),
        up=linear(wide, hidden, True),
        down=linear(hidden, wide, False),
        attention_eps=EPS,
        mlp_eps=2 * EPS,
        **({} if plain else turned),
    )


def make_cache(sizes: Sizes, layers: int, batch: int, capacity: int) -> list[Tensor]:
    rows = (batch, sizes.kv_heads, capacity)
    found = []
    for _ in range(layers):
        for bits in (sizes.k_bits, sizes.v_bits):
            width = packing.packed_size(sizes.head_dim, bits)
            found += [
                torch.zeros(*rows, width, dtype=torch.uint8),
                torch.zeros(rows),
                torch.zeros(rows, dtype=torch.uint8),
            ]
    return found


def inputs(sizes: Sizes, dtype: torch.dtype, batch: int, t: int, seed: int = 0) -> list[Tensor]:
    """hidden, cos, sin."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, t, sizes.hidden, generator=generator).to(dtype)
    angles = torch.rand(1, t, sizes.head_dim // 2, generator=generator).repeat(1, 1, 2)
    return [hidden, angles.cos().to(dtype), angles.sin().to(dtype)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What transformers' apply_rotary_pos_emb does to x [batch, heads, t, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def one_by_one(
    layers: list[Layer],
    sizes: Sizes,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: list[Tensor],
    *,
    past: int,
    mask: Tensor | None = None,
) -> Tensor:
    """The stack as calls of single ops."""
    batch, t, _ = hidden.shape
    layout = packing.BYTES if sizes.w_bits > 4 else packing.PACKED

    def codes(part: Input, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.kronecker_quantize(
            x,
            part.left,
            part.right,
            channel_scale=part.channel_scale,
            clip=part.clip,
            bits=sizes.a_bits,
            symmetric=sizes.a_symmetric,
            layout=layout,
            **options,
        )

    def product(linear: Linear, x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        narrow = ops.gemm_w4a4 if sizes.a_bits <= 4 else ops.gemm_w4a8
        return (ops.gemm_w8a8 if sizes.w_bits > 4 else narrow)(
            x[0],
            x[1],
            linear.weight,
            linear.scale,
            a_zero=None if sizes.a_symmetric else x[2],
            w_colsum=linear.colsum,
            bias=linear.bias,
            out_dtype=hidden.dtype,
        )

    def heads(x: Tensor) -> Tensor:
        return x.view(batch, t, -1, sizes.head_dim).transpose(1, 2)

    for layer, keys, values in zip(layers, *_sides(cache), strict=True):
        x = codes(layer.attention_in, hidden, rms_eps=layer.attention_eps)
        q = rotate(heads(product(layer.q, x)), cos, sin)
        k = rotate(heads(product(layer.k, x)), cos, sin)
        options: dict[str, Any] = {"bits": sizes.k_bits, "start": past}
        ops.kv_quantize_append(k, *keys, transform=layer.k_transform, clip=layer.k_clip, **options)
        options["bits"] = sizes.v_bits
        ops.kv_quantize_append(heads(product(layer.v, x)), *values, clip=layer.v_clip, **options)
        if layer.q_transform is not None:
            q = ops.kronecker(q, None, layer.q_transform)
        attended = ops.attention_decode(
            q,
            *keys,
            *values,
            mask=mask,
            k_bits=sizes.k_bits,
            v_bits=sizes.v_bits,
            length=past + t,
            scaling=SCALING,
        )
        x = codes(layer.attention_out, attended.transpose(1, 2).reshape(batch, t, -1))
        hidden = hidden + product(layer.o, x)
        x = codes(layer.mlp_in, hidden, rms_eps=layer.mlp_eps)
        gate, up = product(layer.gate, x), product(layer.up, x)
        hidden = hidden + product(layer.down, codes(layer.mlp_out, up, gate=gate))
    return hidden


SCALING = 0.3


def _sides(cache: list[Tensor]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    sides = [cache[i : i + 3] for i in range(0, len(cache), 3)]
    return sides[0::2], sides[1::2]


def causal(t: int, length: int) -> Tensor:
    return torch.ones(1, 1, t, length, dtype=torch.bool).tril(length - t)


def check(sizes: Sizes, dtype: torch.dtype, batch: int = 2, *, plain: bool = False) -> None:
    """A prompt, a few tokens, single tokens: outputs and caches."""
    layers = [make_layer(sizes, seed, plain=plain) for seed in range(3)]
    plan = DecoderPlan(layers, sizes, SCALING)
    caches = [make_cache(sizes, 3, batch, 40) for _ in range(2)]
    bound = plan.bind_cache(caches[0])
    past = 0
    for t in (5, 1, 17, 1, 2):
        hidden, cos, sin = inputs(sizes, dtype, batch, t, seed=past)
        mask = causal(t, past + t) if t > 1 else None
        before = hidden.clone()
        found = plan.run(hidden, cos, sin, bound, past=past, mask=mask)
        wanted = one_by_one(layers, sizes, hidden, cos, sin, caches[1], past=past, mask=mask)
        assert torch.equal(found, wanted) and torch.isfinite(found).all(), (t, past)
        assert torch.equal(hidden, before)
        past += t
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


WIDTHS = [
    {},
    {"a_symmetric": False},
    {"a_bits": 8},
    {"a_bits": 6, "a_symmetric": False},
    {"w_bits": 8, "a_bits": 8, "k_bits": 8, "v_bits": 8},
    {"w_bits": 5, "a_bits": 3, "a_symmetric": False, "k_bits": 2, "v_bits": 5},
    {"w_bits": 2, "a_bits": 2, "k_bits": 3, "v_bits": 2},
    {"hidden": 45, "intermediate": 33},  # odd: half a byte is left over
    {"hidden": 45, "intermediate": 33, "a_bits": 8, "a_symmetric": False},
    {"heads": 3, "kv_heads": 3, "head_dim": 14},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_bits_are_those_of_the_ops_one_by_one(widths, dtype, isa):
    check(dataclasses.replace(SIZES, **widths), dtype)


@pytest.mark.parametrize("widths", WIDTHS[:3], ids=str)
def test_without_anything_optional(widths, isa):
    check(dataclasses.replace(SIZES, **widths), torch.float32, plain=True)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_and_batch_change_nothing(threads, batch):
    """Large enough for seven threads; few units in some steps."""
    sizes = dataclasses.replace(SIZES, hidden=256, intermediate=384, heads=4, head_dim=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(sizes, torch.bfloat16, batch)
    finally:
        torch.set_num_threads(before)


def full_cache(sizes: Sizes, layers: int, batch: int, capacity: int) -> list[Tensor]:
    """Random codes, scales and zero points at every position."""
    generator = torch.Generator().manual_seed(7)
    found = make_cache(sizes, layers, batch, capacity)
    for tensor in found:
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 16, generator=generator)
        else:
            tensor.uniform_(0.01, 0.1, generator=generator)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("threads", "batch", "kv_heads"), [(2, 1, 3), (3, 2, 1), (7, 1, 2)])
def test_threads_share_a_long_cache(threads, batch, kv_heads, dtype, isa):
    """They take chunks of a head's positions, some of which a query may not attend to."""
    sizes = dataclasses.replace(
        SIZES, hidden=256, intermediate=384, heads=6, kv_heads=kv_heads, head_dim=64
    )
    layers = [make_layer(sizes, seed, plain=True) for seed in range(2)]
    plan = DecoderPlan(layers, sizes, SCALING)
    past, capacity = 1030, 1040
    caches = [full_cache(sizes, 2, batch, capacity) for _ in range(2)]
    caches[0][1][:, :, 300] = caches[1][1][:, :, 300] = math.nan
    bound, before = plan.bind_cache(caches[0]), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for t in (1, 3, 1):
            hidden, cos, sin = inputs(sizes, dtype, batch, t, seed=past)
            mask = causal(t, past + t).repeat(batch, 1, 1, 1)
            mask[..., 250:600] = False  # the NaN among them
            mask[:, :, :1, 700:] = t == 1
            found = plan.run(hidden, cos, sin, bound, past=past, mask=mask)
            wanted = one_by_one(layers, sizes, hidden, cos, sin, caches[1], past=past, mask=mask)
            assert torch.equal(found, wanted) and torch.isfinite(found).all()
            past += t
    finally:
        torch.set_num_threads(before)
    hidden, cos, sin = inputs(sizes, dtype, batch, 1)
    assert plan.run(hidden, cos, sin, bound, past=past).isnan().all()


def masks(batch: int, heads: int, t: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(batch, heads, t, length, generator=generator) < 0.7
    additive = torch.randn(batch, 1, t, length, generator=generator)
    return [
        allowed,
        allowed[:, :1],
        allowed[:1].expand(batch, heads, t, length),
        allowed.transpose(2, 3).contiguous().transpose(2, 3),
        additive,
        additive.masked_fill(~allowed[:, :1], -math.inf).half(),
    ]


def test_masks():
    layers = [make_layer(SIZES, seed) for seed in range(2)]
    plan = DecoderPlan(layers, SIZES, SCALING)
    for mask in masks(2, SIZES.heads, 3, 9):
        caches = [make_cache(SIZES, 2, 2, 9) for _ in range(2)]
        past_inputs, new_inputs = (
            inputs(SIZES, torch.float32, 2, 6),
            inputs(SIZES, torch.float32, 2, 3),
        )
        bound = plan.bind_cache(caches[0])
        plan.run(*past_inputs, bound, past=0)
        one_by_one(layers, SIZES, *past_inputs, caches[1], past=0)
        found = plan.run(*new_inputs, bound, past=6, mask=mask)
        wanted = one_by_one(layers, SIZES, *new_inputs, caches[1], past=6, mask=mask)
        assert torch.equal(found, wanted)


def test_a_row_that_is_not_finite_spoils_no_other():
    layers = [make_layer(SIZES, seed) for seed in range(2)]
    plan = DecoderPlan(layers, SIZES, SCALING)
    hidden, cos, sin = inputs(SIZES, torch.float32, 3, 1)
    clean = plan.run(hidden, cos, sin, plan.bind_cache(make_cache(SIZES, 2, 3, 4)), past=0)
    hidden[1, 0, 5] = math.nan
    found = plan.run(hidden, cos, sin, plan.bind_cache(make_cache(SIZES, 2, 3, 4)), past=0)
    assert found[1].isnan().all()
    assert torch.equal(found[0::2], clean[0::2])


def test_nothing_to_do():
    plan = DecoderPlan([make_layer(SIZES, 0)], SIZES, SCALING)
    bound = plan.bind_cache(make_cache(SIZES, 1, 2, 4))
    assert plan.run(*inputs(SIZES, torch.float32, 2, 0), bound, past=4).shape == (2, 0, 48)
    empty = plan.bind_cache(make_cache(SIZES, 1, 0, 4))
    assert plan.run(*inputs(SIZES, torch.float32, 0, 1), empty, past=0).shape == (0, 1, 48)


def test_memory_is_kept_alive():
    """Tensors that nobody else holds, and whose storage is swapped for another."""
    layers = [make_layer(SIZES, 0)]
    plan = DecoderPlan(layers, SIZES, SCALING)
    cache = make_cache(SIZES, 1, 2, 4)
    bound = plan.bind_cache(cache)
    arguments = inputs(SIZES, torch.float32, 2, 1)
    wanted = one_by_one(layers, SIZES, *arguments, make_cache(SIZES, 1, 2, 4), past=0)
    layers[0].q.weight.data = torch.zeros(1, dtype=torch.uint8)
    del layers, cache
    torch.randn(200, 200)
    assert torch.equal(plan.run(*arguments, bound, past=0), wanted)


# ---- bad input -----------------------------------------------------------------------------------


def wrong(layer: Layer, path: str, value: Tensor | None) -> Layer:
    part, _, name = path.partition(".")
    if not name:
        return dataclasses.replace(layer, **{part: value})
    return dataclasses.replace(
        layer, **{part: dataclasses.replace(getattr(layer, part), **{name: value})}
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("q.weight", torch.zeros(48, 23).byte(), r"q.weight has shape \[48, 23\]: it must be \[48"),
        ("q.weight", torch.zeros(48, 24).char(), "q.weight has dtype int8: it must be uint8"),
        ("up.scale", torch.zeros(80).half(), "up.scale has dtype float16: it must be float32"),
        ("v.bias", torch.zeros(15), r"v.bias has shape \[15\]: it must be \[16\]"),
        ("v.bias", torch.zeros(16).double(), "v.bias has dtype float64: it must be float32, bfl"),
        ("down.weight", torch.zeros(0).byte(), "down.weight is missing: every layer needs it"),
        ("mlp_in.channel_scale", None, "mlp_in.channel_scale is missing: every layer needs it"),
        ("mlp_out.channel_scale", torch.ones(80), "mlp_out.channel_scale is given: no norm"),
        ("mlp_in.left", torch.ones(6, 5), r"mlp_in.left has shape \[6, 5\]: it must be square"),
        ("mlp_in.left", torch.ones(7, 7), r"mlp_in.left has shape \[7, 7\]: .* its size divide 48"),
        ("mlp_in.right", torch.ones(6, 6), "mlp_in has 48 columns, left and right are 6 and 6"),
        ("attention_in.clip", torch.ones(3), r"attention_in.clip has shape \[3\]: it must be \[2"),
        ("k_transform", torch.ones(7, 7), r"k_transform has shape \[7, 7\]: it must be \[8, 8\]"),
        ("q_transform", torch.ones(8, 16)[:, ::2], "q_transform is not contiguous: it must be"),
    ],
)
def test_wrong_layers_are_named(path, value, message):
    layers = [make_layer(SIZES, 0), wrong(make_layer(SIZES, 1), path, value)]
    with pytest.raises(RuntimeError, match=rf"^decoder_plan: layers\[1\]\.{message}"):
        DecoderPlan(layers, SIZES, SCALING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads is 5, kv_heads 2: no multiple"),
        ({"head_dim": 7}, "head_dim is 7: it must be even"),
        ({"hidden": 0}, "hidden is 0: it must be 1..1048576"),
        ({"a_bits": 9}, "a_bits is 9: it must be 2..8"),
        ({"k_bits": 1}, "k_bits is 1: it must be 2..8"),
        ({"intermediate": 2**16 + 2, "w_bits": 8}, "a linear has 65538 columns: int32 sums allow"),
        ({"a_symmetric": False}, r"layers\[0\].q.colsum is missing: every layer needs it"),
        ({"hidden": 50}, r"layers\[0\].attention_in.channel_scale has shape \[48\]: it must be"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(RuntimeError, match=f"^decoder_plan: {message}"):
        DecoderPlan([make_layer(SIZES, 0)], dataclasses.replace(SIZES, **change), SCALING)


def test_wrong_lists_are_named():
    plan = torch.ops.flatquant_cuda.decoder_plan
    tensors = [torch.empty(0) if t is None else t for t in make_layer(SIZES, 0).tensors()]
    sizes = [1, 48, 80, 6, 2, 8, 4, 4, 4, 4, 1]
    numbers = [SCALING, EPS, EPS]
    assert plan(tensors, sizes, numbers).shape == (2, 1024)
    for arguments, message in (
        ((tensors[1:], sizes, numbers), "tensors has 47 entries for 1 layers: it must have 48"),
        ((tensors, sizes[1:], numbers), "sizes has 10 entries: it must have 11"),
        ((tensors, [-1, *sizes[1:]], numbers), "tensors has 48 entries for -1 layers"),
        ((tensors, sizes, numbers[1:]), "numbers has 2 entries: it must have 1, and 2 for each"),
        ((tensors, sizes, [math.inf, EPS, EPS]), "scaling is inf: it must be finite"),
        ((tensors, sizes, [SCALING, -1.0, EPS]), "the epsilon of a norm is -1: it must be finite"),
    ):
        with pytest.raises(RuntimeError, match=f"^decoder_plan: {message}"):
            plan(*arguments)
    with pytest.raises(RuntimeError, match=r"^decoder_plan: layers is empty: it must have one"):
        DecoderPlan([], SIZES, SCALING)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 2, 4, 3).byte(), r"layers\[0\].k_codes has shape \[2, 2, 4, 3\]"),
        (1, torch.zeros(2, 2, 4).half(), r"layers\[0\].k_scale has dtype float16: it must be"),
        (4, torch.zeros(2, 2, 5), r"layers\[0\].v_scale has shape \[2, 2, 5\]: it must be \[2, 2"),
        (8, torch.zeros(2, 2, 4), r"layers\[1\].k_zero has dtype float32: it must be uint8"),
        (9, torch.zeros(2, 2, 4, 8).byte()[..., ::2], r"layers\[1\].v_codes is not contiguous"),
        (6, torch.zeros(1, 2, 4, 4).byte(), r"layers\[1\].k_codes has shape \[1, 2, 4, 4\]"),
        (0, torch.zeros(4).byte(), r"layers\[0\].k_codes has shape \[4\]: it must be"),
    ],
)
def test_wrong_caches_are_named(index, value, message):
    plan = DecoderPlan([make_layer(SIZES, seed) for seed in range(2)], SIZES, SCALING)
    cache = make_cache(SIZES, 2, 2, 4)
    cache[index] = value
    with pytest.raises(RuntimeError, match=f"^decoder_cache: {message}"):
        plan.bind_cache(cache)
    with pytest.raises(RuntimeError, match=r"^decoder_cache: tensors has 11 entries for 2 layers"):
        plan.bind_cache(make_cache(SIZES, 2, 2, 4)[1:])


def test_wrong_calls_are_named():
    plan = DecoderPlan([make_layer(SIZES, 0)], SIZES, SCALING)
    bound = plan.bind_cache(make_cache(SIZES, 1, 2, 4))
    hidden, cos, sin = inputs(SIZES, torch.float32, 2, 1)
    good: dict[str, Any] = {"hidden": hidden, "cos": cos, "sin": sin, "cache": bound, "past": 0}
    plan.run(**good)
    for change, message in (
        ({"hidden": hidden[..., :47]}, r"hidden has shape \[2, 1, 47\]: it must be \[any, any, 48"),
        ({"hidden": hidden.double()}, "hidden has dtype float64: it must be float32, bfloat16"),
        ({"hidden": hidden[:1]}, "hidden has 1 sequences, cache 2: they must be as many"),
        ({"cos": cos.half()}, "cos has dtype float16: it must be float32"),
        ({"cos": cos[..., :4]}, r"cos has shape \[1, 1, 4\]: it must be \[any, 1, 8\]"),
        ({"cos": cos.repeat(3, 1, 1)}, "cos has 3 rows: it must have 1, or one for each of 2"),
        ({"sin": sin.repeat(2, 1, 1)}, r"sin has shape \[2, 1, 8\]: it must be \[1, 1, 8\]"),
        ({"past": -1}, "past is -1: it must not be negative"),
        ({"past": 4}, "cache holds 4 positions: 4 and 1 more do not fit"),
        ({"past": 2**63 - 1}, "cache holds 4 positions: 9223372036854775807 and 1 more do not"),
        ({"mask": torch.ones(1, 1, 1, 2).bool()}, r"mask has shape \[1, 1, 1, 2\]: it must be"),
        ({"mask": torch.ones(3, 1, 1, 1).bool()}, r"mask has shape .*: it must broadcast to 2 seq"),
        ({"mask": torch.ones(1, 1, 1, 1).int()}, "mask has dtype int32: it must be float32"),
    ):
        with pytest.raises(RuntimeError, match=f"^decoder_stack: {message}"):
            plan.run(**(good | change))


def test_a_foreign_plan_or_cache_is_refused():
    layers = [make_layer(SIZES, seed) for seed in range(2)]
    plan = DecoderPlan(layers, SIZES, SCALING)
    other = DecoderPlan(layers, dataclasses.replace(SIZES, k_bits=3), SCALING)
    bound = plan.bind_cache(make_cache(SIZES, 2, 2, 4))
    arguments = (*inputs(SIZES, torch.float32, 2, 1), None)
    op = torch.ops.flatquant_cuda.decoder_stack
    changed, moved = plan.plan.clone(), torch.zeros(3 * 1024 + 1, dtype=torch.uint8)
    changed[1, 40] += 1
    moved[1:] = plan.plan.flatten()
    for foreign in (changed, torch.zeros_like(changed), plan.plan[:2], moved[1:].view(3, 1024)):
        with pytest.raises(
            RuntimeError, match=r"^decoder_stack: plan is not what decoder_plan ret"
        ):
            op(*arguments, foreign, bound.handle, 0)
    with pytest.raises(RuntimeError, match=r"^decoder_stack: plan has shape \[3, 1000\]: it must"):
        op(*arguments, torch.zeros(3, 1000).byte(), bound.handle, 0)
    broken = bound.handle.clone()
    broken[2, 3] ^= 1
    for foreign in (broken, torch.zeros_like(broken)):
        with pytest.raises(RuntimeError, match=r"^decoder_stack: cache is not what decoder_cache"):
            op(*arguments, plan.plan, foreign, 0)
    with pytest.raises(RuntimeError, match=r"^decoder_stack: cache is not what decoder_cache"):
        op(*arguments, other.plan, bound.handle, 0)
    with pytest.raises(
        RuntimeError, match=r"^decoder_cache: plan is not what decoder_plan returned"
    ):
        torch.ops.flatquant_cuda.decoder_cache(changed, make_cache(SIZES, 2, 2, 4))


def test_plans_cannot_be_copied():
    plan = DecoderPlan([make_layer(SIZES, 0)], SIZES, SCALING)
    for bound in (plan, plan.bind_cache(make_cache(SIZES, 1, 1, 4))):
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="is bound to memory: it cannot be copied or pick"):
                attempt(bound)


# ---- the op in torch -----------------------------------------------------------------------------


def test_opcheck():
    """A plan differs from run to run in its pointers, so nothing can compare two of them."""
    layer = make_layer(SIZES, 0)
    tensors = [torch.empty(0) if t is None else t for t in layer.tensors()]
    sizes = [1, 48, 80, 6, 2, 8, 4, 4, 4, 4, 1]
    structure = ("test_schema", "test_autograd_registration", "test_faketensor")
    library = torch.ops.flatquant_cuda
    torch.library.opcheck(
        library.decoder_plan.default, (tensors, sizes, [SCALING, EPS, EPS]), test_utils=structure
    )
    plan = DecoderPlan([layer], SIZES, SCALING)
    cache = make_cache(SIZES, 1, 2, 4)
    torch.library.opcheck(library.decoder_cache.default, (plan.plan, cache), test_utils=structure)
    bound = plan.bind_cache(cache)
    arguments = (*inputs(SIZES, torch.float32, 2, 1), causal(1, 3), plan.plan, bound.handle, 2)
    torch.library.opcheck(library.decoder_stack.default, arguments)


def _run(plan: DecoderPlan, bound: BoundCache, arguments: list[Tensor]) -> Tensor:
    return plan.run(*arguments, bound, past=0)


def _child(plan: Any, bound: Any, arguments: Any, wanted: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(torch.equal(_run(plan, bound, arguments), wanted))


def test_fork_after_use():
    sizes = dataclasses.replace(SIZES, hidden=256, intermediate=384, heads=4, head_dim=64)
    plan = DecoderPlan([make_layer(sizes, 0)], sizes, SCALING)
    bound = plan.bind_cache(make_cache(sizes, 1, 2, 4))
    arguments = inputs(sizes, torch.float32, 2, 1)
    wanted = _run(plan, bound, arguments)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(plan, bound, arguments, wanted, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get()
