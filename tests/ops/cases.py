"""The one table of op cases: what every backend must answer like the reference.

A row is an op, an id, sizes and options; ``Case.call`` makes its arguments for one of the three
dtypes, and ``CHECKS`` says how close an answer must be. Tests run every row on every backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatquant_cuda import ops, packing, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = 2.0**-24  # half a unit in the last place of float32


@dataclass(frozen=True)
class Call:
    """Arguments of a wrapper in ``flatquant_cuda.ops``."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def named(self) -> dict[str, Any]:
        """All arguments by name, the defaults that depend on others filled in."""
        bound = inspect.signature(getattr(ops, self.op)).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        found = dict(bound.arguments)
        if self.op == "kronecker":
            found["out_dtype"] = found["out_dtype"] or found["x"].dtype
        if self.op == "hadamard" and found["scale"] is None:
            found["scale"] = found["x"].shape[-1] ** -0.5
        if self.op == "attention_decode" and found["scaling"] is None:
            found["scaling"] = found["q"].shape[-1] ** -0.5
        if "length" in found and found["length"] is None:
            codes = found.get("codes", found.get("k_codes"))
            found["length"] = reference.capacity_of(codes, found["block_table"])
        return found

    def schema_args(self) -> tuple[Any, ...]:
        """The arguments in the order of the native schema."""
        schema = getattr(torch.ops.flatquant_cuda, self.op).default._schema
        named = self.named()
        return tuple(named[argument.name] for argument in schema.arguments)

    def in_pages(self) -> bool:
        """Whether only CUDA kernels and the reference know such a call."""
        pages = (self.kwargs.get(name) for name in ("slots", "block_table", "lengths"))
        return any(tensor is not None for tensor in pages)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Call(
            self.op,
            tuple(changed(value) for value in self.args),
            {name: changed(value) for name, value in self.kwargs.items()},
        )

    def run(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Call a function like the wrapper; its results, or what it wrote, as a tuple."""
        if self.op == "kv_quantize_append":
            x, *cache = self.args
            cache = [tensor.clone() for tensor in cache]
            function(x, *cache, **self.kwargs)
            return tuple(cache)
        result = function(*self.args, **self.kwargs)
        return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    op: str
    sizes: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def id(self) -> str:
        """The row in pytest's output."""
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.op}-{self.sizes}-{options}".replace(" ", "").replace("torch.", "")

    def call(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """Arguments, the same ones every time."""
        generator = torch.Generator().manual_seed(1234)
        call = BUILDERS[self.op](*self.sizes, dtype=dtype, generator=generator, **self.options)
        return Call(self.op, *call).map(lambda tensor: tensor.to(device))


# ---- arguments -----------------------------------------------------------------------------------

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Activations as they are: a bell with a few large channels, and a row of zeros."""
    x = torch.randn(shape, generator=generator)
    x[..., ::7] *= 8
    if len(shape) > 1 and shape[-2] > 2:
        x[..., 1, :] = 0
    return x.to(dtype)


def _clip(wanted: bool) -> Tensor | None:
    return torch.tensor([0.9, 0.75]) if wanted else None


def _codes(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator)


def _quantize(
    *shape: int, dtype: torch.dtype, generator: torch.Generator, clip: bool = False, **options: Any
) -> Arguments:
    return (_values(shape, dtype, generator),), {"clip": _clip(clip), **options}


def _kronecker(
    rows: int,
    n1: int,
    n2: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    sides: str = "both",
    channel_scale: bool = False,
    gate: bool = False,
    clip: bool = False,
    **options: Any,
) -> Arguments:
    x = _values((rows, n1 * n2), dtype, generator)
    left = torch.randn(n1, n1, generator=generator) / n1**0.5
    right = (torch.randn(n2, n2, generator=generator) / n2**0.5).to(dtype)
    if channel_scale:
        options["channel_scale"] = torch.rand(n1 * n2, generator=generator) + 0.5
    if gate:
        options["gate"] = _values((rows, n1 * n2), dtype, generator)
    if clip:
        options["clip"] = _clip(True)
    use_left, use_right = sides in ("both", "left"), sides in ("both", "right")
    return (x, left if use_left else None, right if use_right else None), options


def _hadamard(
    rows: int,
    m: int,
    power: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    base: bool = True,
    **options: Any,
) -> Arguments:
    matrix = torch.where(torch.rand(m, m, generator=generator) < 0.5, -1.0, 1.0)
    return (_values((rows, m * power), dtype, generator), matrix if base else None), options


def _gemm(
    bits: int,
    rows: tuple[int, ...],
    n: int,
    k: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    symmetric: bool = True,
    bias: torch.dtype | None = None,
    residual: bool = False,
    layout: int = packing.PACKED,
    w_bits: int = 4,
) -> Arguments:
    x = _values((*rows, k), torch.float32, generator)
    a, a_scale, a_zero = reference.quantize_activation(
        x, bits=bits, symmetric=symmetric, layout=layout
    )
    w = _codes((n, k), -(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1, generator)
    w_scale = torch.rand(n, generator=generator) + 0.01
    options: dict[str, Any] = {"out_dtype": dtype}
    if not symmetric:
        options |= {"a_zero": a_zero, "w_colsum": w.sum(1).to(torch.int32)}
    if bias is not None:
        options["bias"] = torch.randn(n, generator=generator).to(bias)
    if residual:
        options["residual"] = torch.randn((*rows, n), generator=generator).to(dtype)
    stored = packing.pack_nibbles(w) if w_bits == 4 else w.to(torch.int8)
    return (a, a_scale, stored, w_scale), options


def _gemm_w4a4(*sizes: Any, bits: int = 4, **options: Any) -> Arguments:
    return _gemm(bits, *sizes, **options)


def _gemm_w4a8(*sizes: Any, bits: int = 8, **options: Any) -> Arguments:
    return _gemm(bits, *sizes, **options)


def _gemm_w8a8(*sizes: Any, bits: int = 8, **options: Any) -> Arguments:
    return _gemm(bits, *sizes, w_bits=8, **options)


def _gemm_w4a16(
    rows: tuple[int, ...],
    n: int,
    k: int,
    groups: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    bits: int = 4,
    bias: torch.dtype | None = None,
) -> Arguments:
    x = _values((*rows, k), dtype, generator)
    w = packing.pack(_codes((n, k), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, generator), bits)
    scale = torch.rand(n, groups, generator=generator) + 0.01
    options: dict[str, Any] = {"bits": bits}
    if bias is not None:
        options["bias"] = torch.randn(n, generator=generator).to(bias)
    return (x, w, scale), options


def _cache(
    batch: int, heads: int, capacity: int, d: int, bits: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    codes = packing.pack(_codes((batch, heads, capacity, d), 0, 2**bits - 1, generator), bits)
    scale = torch.rand(batch, heads, capacity, generator=generator) * 0.2 + 0.01
    zero = _codes((batch, heads, capacity), 0, 2**bits - 1, generator).to(torch.uint8)
    return codes, scale, zero


def _block_table(batch: int, blocks: int, generator: torch.Generator) -> Tensor:
    """Every sequence's blocks, of a cache of as many, in any order."""
    order = torch.randperm(batch * blocks, generator=generator)
    return order.reshape(batch, blocks).to(torch.int32)


def _kv_append(
    batch: int,
    heads: int,
    t: int,
    d: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    capacity: int,
    bits: int = 4,
    transform: bool = False,
    clip: bool = False,
    start: int = 0,
    blocks: int | None = None,
    halves: bool = False,
) -> Arguments:
    options: dict[str, Any] = {"bits": bits, "start": start, "clip": _clip(clip)}
    x = _values((batch, heads, t, d), dtype, generator)
    if transform:
        matrix = torch.randn(d, d, generator=generator) / d**0.5
        options["transform"] = matrix.to(dtype) if halves else matrix
    if blocks is not None:  # of `capacity` positions each; some slots are outside of the cache
        slots = torch.randperm(blocks * capacity, generator=generator)[: batch * t]
        options["slots"] = slots.reshape(batch, t)
        options["slots"][:, 3::7] += blocks * capacity
        options["slots"][:, ::5] = -1
        return (x, *_cache(blocks, heads, capacity, d, bits, generator)), options
    return (x, *_cache(batch, heads, capacity, d, bits, generator)), options


def _kv_dequantize(
    batch: int,
    heads: int,
    capacity: int,
    d: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    bits: int = 4,
    length: int | None = None,
    blocks: int | None = None,
    lengths: tuple[int, ...] | None = None,
) -> Arguments:
    options = {"bits": bits, "head_dim": d, "length": length, "out_dtype": dtype}
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    if blocks is not None:
        options["block_table"] = _block_table(batch, blocks, generator)
        return _cache(batch * blocks, heads, capacity, d, bits, generator), options
    return _cache(batch, heads, capacity, d, bits, generator), options


def _attention(
    batch: int,
    heads: int,
    kv_heads: int,
    tq: int,
    d: int,
    capacity: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    k_bits: int = 4,
    v_bits: int = 4,
    length: int | None = None,
    mask: str | None = None,
    scaling: float | None = None,
    blocks: int | None = None,
    lengths: tuple[int, ...] | None = None,
    window: int = 0,
) -> Arguments:
    q = torch.randn(batch, heads, tq, d, generator=generator).to(dtype)
    sequences = batch if blocks is None else batch * blocks
    keys = _cache(sequences, kv_heads, capacity, d, k_bits, generator)
    values = _cache(sequences, kv_heads, capacity, d, v_bits, generator)
    used = capacity * (blocks or 1) if length is None else length
    options: dict[str, Any] = {"k_bits": k_bits, "v_bits": v_bits, "length": length}
    if blocks is not None:  # of `capacity` positions each
        table = options["block_table"] = _block_table(batch, blocks, generator)
        if lengths is not None:  # what is not in use may be anything
            for row, size in zip(table, lengths, strict=True):
                row[-(-size // capacity) :] = -7
    if lengths is not None:
        options |= {"lengths": torch.tensor(lengths, dtype=torch.int32), "window": window}
    causal = torch.ones(tq, used, dtype=torch.bool).tril(used - tq)
    if mask == "causal":
        options["mask"] = causal
    elif mask == "padding":  # the first sequence may attend to nothing
        options["mask"] = causal.expand(batch, 1, tq, used).clone()
        options["mask"][0] = False
    elif mask == "additive":
        options["mask"] = torch.randn(batch, heads, tq, used, generator=generator).to(dtype)
    elif mask == "broadcast":
        options["mask"] = torch.where(causal, 0.0, -torch.inf).expand(batch, heads, tq, used)
    return (q, *keys, *values), {**options, "scaling": scaling}


def _fake_quantize(
    rows: int,
    k: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    per_row: bool = False,
    backward: bool = False,
    **options: Any,
) -> Arguments:
    x = _values((rows, k), dtype, generator)
    clip = torch.rand(2, rows, generator=generator) / 2 + 0.5 if per_row else torch.tensor([0.9, 1])
    grad = torch.randn(rows, k, generator=generator)
    return ((grad, x, clip) if backward else (x, clip)), options


def _fake_quantize_backward(*sizes: int, **options: Any) -> Arguments:
    return _fake_quantize(*sizes, backward=True, **options)


BUILDERS: dict[str, Callable[..., Arguments]] = {
    "quantize_activation": _quantize,
    "kronecker": _kronecker,
    "kronecker_quantize": _kronecker,
    "hadamard": _hadamard,
    "gemm_w4a4": _gemm_w4a4,
    "gemm_w4a8": _gemm_w4a8,
    "gemm_w8a8": _gemm_w8a8,
    "gemm_w4a16": _gemm_w4a16,
    "kv_quantize_append": _kv_append,
    "kv_dequantize": _kv_dequantize,
    "attention_decode": _attention,
    "fake_quantize": _fake_quantize,
    "fake_quantize_backward": _fake_quantize_backward,
}

# ---- how close -----------------------------------------------------------------------------------


def _exact(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _near(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """Within ``bound`` before the rounding to the dtype, which adds one unit in the last place."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    a, b = got.double().nan_to_num(), want.double().nan_to_num()
    excess = (a - b).abs() - bound - torch.finfo(want.dtype).eps * b.abs()
    assert not (excess > torch.finfo(want.dtype).smallest_normal).any(), excess.max()


def _codes_near(
    names: tuple[Tensor, ...],
    other: tuple[Tensor, ...],
    bits: int,
    wide: bool,
    packed: bool,
    k: int,
) -> None:
    """The transform's rule: codes differ by at most 1 and rarely, scales within a bound."""
    values = []
    for codes, scale, zero in (names, other):
        if packed:
            codes = packing.unpack_nibbles(codes, k, signed=zero.numel() == 0)
        plain = codes.to(torch.int32)
        values.append(plain - zero[..., None] if zero.numel() else plain)
        assert scale.dtype == torch.float32
    difference = (values[0] - values[1]).abs()
    rate = 1e-4 if bits <= 4 else 1e-3
    assert difference.numel() == 0 or difference.max() <= 1
    assert (difference > 0).sum() <= max(1, rate * difference.numel())
    rtol = 1e-5 if wide else 2.0**-8
    torch.testing.assert_close(names[1], other[1], rtol=rtol, atol=0, equal_nan=True)


def _kronecker_near(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    x = call.args[0]
    # A flipped rounding of S moves a sum by one of its terms' units in the last place.
    relative = 4 * x.shape[-1] * ULP if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    peak = want[0].double().abs().amax(-1, keepdim=True) if want[0].numel() else 0.0
    _near(got[0], want[0], relative * peak)


def _kronecker_codes(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    x, bits = call.args[0], call.kwargs.get("bits", 4)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert [t.shape for t in got] == [t.shape for t in want]
    packed = bits <= 4 and call.kwargs.get("layout", packing.PACKED) == packing.PACKED
    _codes_near(got, want, bits, x.dtype == torch.float32, packed, x.shape[-1])


def _hadamard_near(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    x = call.args[0].double()
    depth = x.shape[-1].bit_length() + (call.args[1].shape[0] if call.args[1] is not None else 0)
    scale = call.kwargs.get("scale") or x.shape[-1] ** -0.5
    _near(got[0], want[0], 2 * depth * ULP * scale * x.abs().sum(-1, keepdim=True))


def _weight_only_near(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    x, w, scale = call.args
    k, groups = x.shape[-1], scale.shape[1]
    weight = reference.dequantize(packing.unpack(w, call.kwargs["bits"], k), scale)
    sums = x.double().abs() @ weight.double().abs().T
    segments = groups * -(-(k // groups) // 128)
    terms = min(k // groups, 128) + segments + 2
    _near(got[0], want[0], 1.1 * terms * ULP * sums + 2 * ULP * want[0].double().abs())


def _append_near(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    if call.kwargs.get("transform") is None:
        return _exact(call, got, want)
    x, bits = call.args[0], call.kwargs["bits"]
    plain = [packing.unpack(t[0], bits, x.shape[-1], signed=False) for t in (got, want)]
    first, second = ((c, t[1], t[2].int()) for c, t in zip(plain, (got, want), strict=True))
    _codes_near(first, second, bits, True, False, x.shape[-1])
    return None


def _attention_near(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    named = call.named()
    d, length, q = named["q"].shape[-1], named["length"], named["q"].double()
    k, v = (
        reference._kv_values(
            *reference._gathered(call.op, side, named["block_table"]), bits, d, length
        )
        for side, bits in ((call.args[1:4], named["k_bits"]), (call.args[4:7], named["v_bits"]))
    )
    if not length or not q.numel():
        return _exact(call, got, want)
    group = q.shape[1] // k.shape[1]
    keys = k.double().abs().repeat_interleave(group, 1)
    score = (q.abs() @ keys.transpose(-1, -2)).nan_to_num().max() * abs(named["scaling"])
    relative = ULP * (2 * (d + 8) * score + 16 + 8 + length / 16)
    if named["q"].dtype != torch.float32:
        relative = relative + 2.0**-17  # tensor cores: weights of 16 bits
    return _near(got[0], want[0], 2 * relative * v.abs().nan_to_num().max())


def _gradient_near(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    x = call.args[1]
    largest = float(x.abs().max()) if x.numel() else 0.0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * (largest + 1))


CHECKS: dict[str, Callable[[Call, tuple[Tensor, ...], tuple[Tensor, ...]], None]] = {
    "quantize_activation": _exact,
    "kronecker": _kronecker_near,
    "kronecker_quantize": _kronecker_codes,
    "hadamard": _hadamard_near,
    "gemm_w4a4": _exact,
    "gemm_w4a8": _exact,
    "gemm_w8a8": _exact,
    "gemm_w4a16": _weight_only_near,
    "kv_quantize_append": _append_near,
    "kv_dequantize": _exact,
    "attention_decode": _attention_near,
    "fake_quantize": _exact,
    "fake_quantize_backward": _gradient_near,
}

# ---- the table -----------------------------------------------------------------------------------

_ROWS = ((1, 1), (0, 8), (5, 1), (3, 7), (2, 3, 17), (4, 16), (9,), (2, 0, 5), (7, 577), (3, 1536))
_GRIDS = (
    {},
    {"clip": True},
    {"narrow": True, "bits": 4},
    {"symmetric": False},
    {"symmetric": False, "clip": True, "bits": 8},
    *({"bits": bits} for bits in (2, 3, 5, 6, 8)),
    *({"bits": bits, "symmetric": False} for bits in (2, 7)),
    {"bits": 4, "layout": packing.BYTES},
    {"bits": 3, "symmetric": False, "layout": packing.BYTES},
)
_FACTORS = ((1, 1, 1), (0, 4, 6), (3, 4, 6), (2, 5, 7), (5, 1, 13), (4, 13, 1), (2, 9, 17))
_PRODUCTS = (
    ((1,), 1, 1),
    ((0,), 5, 6),
    ((3,), 0, 4),
    ((2, 3), 7, 13),
    ((5,), 17, 33),
    ((9,), 33, 64),
)
_BIG_PRODUCTS = (((1,), 96, 576), ((70,), 40, 288), ((4,), 16, 1537))
_FLOAT32 = (torch.float32,)

CASES: tuple[Case, ...] = (
    *(Case("quantize_activation", shape) for shape in _ROWS),
    *(Case("quantize_activation", (6, 35), grid) for grid in _GRIDS),
    *(Case("kronecker", sizes) for sizes in (*_FACTORS, (4, 24, 24), (2, 32, 48))),
    *(Case("kronecker", (3, 6, 10), {"sides": side}) for side in ("left", "right", "none")),
    Case("kronecker", (3, 8, 9), {"channel_scale": True, "out_dtype": torch.float32}),
    Case("kronecker", (3, 8, 9), {"sides": "none", "channel_scale": True}),
    *(Case("kronecker_quantize", sizes) for sizes in (*_FACTORS, (64, 24, 24), (16, 32, 48))),
    *(Case("kronecker_quantize", (40, 6, 10), {"sides": s}) for s in ("left", "right", "none")),
    *(Case("kronecker_quantize", (30, 7, 8), grid) for grid in _GRIDS),
    Case("kronecker_quantize", (30, 8, 9), {"channel_scale": True, "rms_eps": 1e-5}),
    Case("kronecker_quantize", (30, 8, 9), {"gate": True, "rms_eps": 1e-6, "symmetric": False}),
    Case("kronecker_quantize", (64, 32, 48), {"gate": True, "channel_scale": True, "bits": 8}),
    *(Case("hadamard", sizes) for sizes in ((1, 1, 1), (0, 3, 4), (3, 12, 4), (2, 5, 64))),
    *(Case("hadamard", (3, 1, power), {"base": False}) for power in (1, 2, 8, 1024)),
    Case("hadamard", (2, 20, 8), {"scale": 0.25}),
    *(Case("gemm_w4a4", sizes) for sizes in (*_PRODUCTS, *_BIG_PRODUCTS)),
    *(Case("gemm_w4a8", sizes) for sizes in (*_PRODUCTS, *_BIG_PRODUCTS)),
    *(Case("gemm_w8a8", sizes) for sizes in (*_PRODUCTS, *_BIG_PRODUCTS)),
    *(
        Case(op, ((5,), 19, 37), options)
        for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8")
        for options in (
            {"symmetric": False},
            {"bias": torch.float32},
            {"bias": torch.bfloat16, "residual": True},
            {"symmetric": False, "bias": torch.float64, "residual": True},
        )
    ),
    Case("gemm_w4a4", ((4,), 5, 24), {"bits": 2}),
    Case("gemm_w4a4", ((4,), 5, 24), {"bits": 3, "symmetric": False}),
    Case("gemm_w4a8", ((4,), 5, 24), {"bits": 5}),
    Case("gemm_w4a8", ((4,), 5, 24), {"bits": 4, "layout": packing.BYTES}),
    Case("gemm_w8a8", ((4,), 5, 24), {"bits": 4, "symmetric": False, "layout": packing.BYTES}),
    *(Case("gemm_w4a16", (*sizes, 1)) for sizes in (*_PRODUCTS, *_BIG_PRODUCTS)),
    *(Case("gemm_w4a16", ((5,), 18, 36, 3), {"bits": bits}) for bits in (2, 3, 4)),
    Case("gemm_w4a16", ((2, 3), 17, 256, 2), {"bits": 2, "bias": torch.float32}),
    Case("gemm_w4a16", ((3,), 5, 7, 7), {"bias": torch.float16}),
    Case("kv_quantize_append", (2, 3, 5, 16), {"capacity": 9, "start": 2}),
    Case("kv_quantize_append", (1, 1, 1, 1), {"capacity": 1}),
    Case("kv_quantize_append", (2, 2, 0, 8), {"capacity": 3}),
    *(Case("kv_quantize_append", (2, 2, 3, 13), {"capacity": 3, "bits": b}) for b in range(2, 9)),
    Case("kv_quantize_append", (1, 2, 4, 64), {"capacity": 8, "clip": True, "start": 4}),
    Case("kv_quantize_append", (2, 3, 40, 64), {"capacity": 40, "transform": True, "clip": True}),
    Case("kv_quantize_append", (2, 3, 40, 7), {"capacity": 64, "transform": True, "bits": 2}),
    *(
        Case("kv_quantize_append", (1, 2, 3, d), {"capacity": 3, "transform": True, "bits": b})
        for d, b in ((64, 2), (80, 3), (96, 4), (128, 8), (256, 4))
    ),
    Case("kv_quantize_append", (2, 3, 9, 80), {"capacity": 4, "blocks": 6, "bits": 2}),
    Case("kv_quantize_append", (2, 2, 9, 64), {"capacity": 8, "blocks": 5, "transform": True}),
    Case(
        "kv_quantize_append",
        (2, 2, 9, 7),
        {"capacity": 8, "blocks": 5, "transform": True, "halves": True},
    ),
    Case("kv_dequantize", (2, 3, 16, 64), {"blocks": 3, "length": 40, "lengths": (33, 50)}),
    Case("kv_dequantize", (2, 3, 7, 13), {"blocks": 3, "lengths": (0, 21)}),
    *(Case("kv_dequantize", (2, 3, 90, 80), {"bits": bits}) for bits in (2, 4, 8)),
    *(Case("kv_dequantize", (2, 3, 5, 13), {"bits": bits}) for bits in range(2, 9)),
    Case("kv_dequantize", (1, 2, 9, 64), {"length": 4}),
    Case("kv_dequantize", (2, 2, 6, 8), {"length": 0}),
    Case("attention_decode", (1, 1, 1, 1, 1, 1)),
    Case("attention_decode", (2, 6, 2, 1, 64, 33)),
    Case("attention_decode", (1, 9, 3, 5, 64, 40), {"length": 17, "mask": "causal"}),
    Case("attention_decode", (2, 4, 4, 3, 13, 20), {"mask": "padding"}),
    Case("attention_decode", (2, 4, 2, 3, 16, 20), {"mask": "additive"}),
    Case("attention_decode", (2, 4, 1, 3, 16, 20), {"mask": "broadcast", "scaling": 0.5}),
    Case("attention_decode", (1, 2, 1, 40, 16, 150), {"mask": "causal"}),
    *(  # the sizes that tensor cores take
        Case("attention_decode", (1, heads, 2, tq, d, 272), {"length": 263, "mask": mask})
        for heads, tq, d, mask in (
            (2, 1, 64, None),
            (6, 2, 80, "causal"),
            (8, 1, 96, "additive"),
            (16, 1, 128, None),
            (2, 3, 256, "padding"),
        )
    ),
    *(
        Case("attention_decode", (1, 8, 2, 2, 64, 20), {"k_bits": k, "v_bits": v})
        for k, v in ((2, 8), (8, 2), (3, 6))
    ),
    *(
        Case(
            "attention_decode",
            (3, 4, 2, tq, 64, 32),
            {"blocks": 17, "lengths": (300, 256, tq - 1), "window": window},
        )
        for tq, window in ((1, 0), (5, 0), (4, 40), (2, 270))
    ),
    Case("attention_decode", (2, 2, 1, 3, 20, 7), {"blocks": 5, "lengths": (0, 33), "window": 9}),
    Case("attention_decode", (2, 2, 1, 1, 64, 16), {"blocks": 3, "mask": "padding"}),
    Case("attention_decode", (2, 2, 1, 3, 64, 600), {"lengths": (513, 250), "length": 515}),
    Case("attention_decode", (2, 2, 1, 2, 8, 6), {"length": 0}),
    Case("attention_decode", (1, 2, 1, 0, 8, 6)),
    *(
        Case("attention_decode", (1, 4, 2, 2, 20, 70), {"k_bits": k, "v_bits": v})
        for k, v in ((2, 2), (3, 8), (8, 3), (5, 4))
    ),
    *(
        Case(op, sizes, options, _FLOAT32)
        for op in ("fake_quantize", "fake_quantize_backward")
        for sizes in ((1, 1), (0, 4), (5, 33), (3, 128))
        for options in ({}, {"symmetric": False, "bits": 3}, {"per_row": True, "bits": 8})
    ),
)


def every_case() -> list[tuple[Case, torch.dtype]]:
    """The table times the dtypes."""
    return [(case, dtype) for case in CASES for dtype in case.dtypes]


def first_case(op: str) -> Case:
    """A row of the table that is not degenerate, for tests that need one per op."""
    options = [case for case in CASES if case.op == op]
    options = [case for case in options if not {"blocks", "lengths"} & case.options.keys()]
    return max(options, key=lambda case: len(case.options))
