"""Bad input: every op with one wrong argument at a time, shared memory, and nothing to do.

What is wrong gives an error that names the op, the argument, its value and the rule; what is only
unusual gives the same bits as always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import library, ops, reference

from .cases import CHECKS, Call, Case
from .test_ops import bits_of

pytestmark = pytest.mark.skipif(not library.loaded, reason="no native library")

# A call of every op with every tensor given that it takes.
FULL = {
    case.op: case
    for case in (
        Case("quantize_activation", (3, 8), {"clip": True}),
        Case("kronecker", (3, 8, 9), {"channel_scale": True}),
        Case("kronecker_quantize", (6, 8, 9), {"channel_scale": True, "gate": True, "clip": True}),
        Case("hadamard", (2, 20, 8)),
        *(
            Case(op, ((5,), 19, 37), {"symmetric": False, "bias": torch.half, "residual": True})
            for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8")
        ),
        Case("gemm_w4a16", ((6,), 17, 256, 2), {"bits": 2, "bias": torch.float16}),
        Case("kv_quantize_append", (2, 3, 4, 8), {"capacity": 9, "transform": True, "clip": True}),
        Case("kv_dequantize", (1, 2, 9, 64)),
        Case("attention_decode", (2, 4, 2, 3, 16, 20), {"mask": "additive"}),
        Case("fake_quantize", (5, 33), {"per_row": True}),
        Case("fake_quantize_backward", (5, 33), {"per_row": True}),
    )
}


def test_every_op_is_here() -> None:
    assert set(FULL) == set(library.OPS)


# ---- one tensor that is wrong --------------------------------------------------------------------


def strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def expanded(tensor: Tensor) -> Tensor:
    """All its elements are one in memory."""
    return tensor.flatten()[:1].expand(tensor.shape)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, one byte beyond where they might lie."""
    count = tensor.numel() * tensor.itemsize
    room = torch.zeros(count + 1, dtype=torch.uint8)
    room[1:] = tensor.contiguous().flatten().view(torch.uint8)
    found = torch.frombuffer(memoryview(room.numpy()), dtype=tensor.dtype, offset=1)
    assert found.data_ptr() % tensor.itemsize == 1
    return found.view(tensor.shape)


def wrong_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64)


def deeper(tensor: Tensor) -> Tensor:
    return tensor[None, None, None]


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "strided": (strided, "{name} is not contiguous: it must be"),
    "expanded": (expanded, "{name} is not contiguous: it must be"),
    "misaligned": (misaligned, "{name} lies 1 bytes beyond a multiple of {size}: it must lie at"),
    "dtype": (wrong_dtype, "{name} (has dtype|is) int64.*: (it|{name}) must be"),
    "shape": (deeper, r"{name} has (shape \[1, 1, 1, .*\]|5 dim.*): it must (be|broadcast|have) "),
    "device": (elsewhere, r"{name} is on another device than {first}: they must be on one"),
}


def tensor_names(op: str) -> list[str]:
    schema = getattr(torch.ops.flatquant_cuda, op).default._schema
    return [a.name for a in schema.arguments if "Tensor" in str(a.type)]


def wrong_tensors() -> Iterator[Any]:
    """Op, argument, what is wrong with it."""
    for op in library.OPS if library.loaded else ():
        names = tensor_names(op)
        for name in names:
            tensor = FULL[op].call(torch.float32).named()[name]
            if tensor is None:  # of paged caches, which the CPU kernels do not know
                continue
            for kind in WRONG:
                refused = {
                    "strided": name != "mask",
                    "expanded": name != "mask",
                    "misaligned": tensor.itemsize > 1,
                    "shape": name != names[0],  # more dimensions are more rows
                    "device": name != names[0],  # the others are on another device then
                }
                if refused.get(kind, True):
                    yield pytest.param(op, name, kind, id=f"{op}-{name}-{kind}")


@pytest.mark.parametrize(("op", "name", "kind"), list(wrong_tensors()))
def test_a_wrong_tensor_is_named(op: str, name: str, kind: str) -> None:
    named = FULL[op].call(torch.float32).named()
    change, message = WRONG[kind]
    expected = message.format(name=name, size=named[name].itemsize, first=tensor_names(op)[0])
    named[name] = change(named[name])
    function = getattr(torch.ops.flatquant_cuda, op)
    arguments = [named[argument.name] for argument in function.default._schema.arguments]
    with pytest.raises(RuntimeError, match=f"^{op}: {expected}"):
        function(*arguments)


NAN, INF, LARGE, LAST = math.nan, math.inf, 1e39, 2**63 - 1  # LARGE: for float32
NUMBERS = [
    *((op, "bits", bits, rf"bits is {bits}: it must be 2\.\.") for bits in (1, 9, LAST, -LAST)
      for op in library.OPS if op.startswith(("quant", "kronecker_q", "kv", "fake", "gemm_w4a16"))),
    *(("attention_decode", name, LAST, rf"{name} is {LAST}: it must be 2\.\.8")
      for name in ("k_bits", "v_bits")),
    *((op, "layout", layout, f"layout is {layout}: it must be 0") for layout in (-1, 2, LAST)
      for op in ("quantize_activation", "kronecker_quantize")),
    *(("kronecker_quantize", "rms_eps", eps, "rms_eps is .*: it must be finite and not negative")
      for eps in (INF, -INF, LARGE)),
    *(("hadamard", "scale", scale, "scale is .*: it must be finite")
      for scale in (NAN, INF, -INF, LARGE)),
    *(("attention_decode", "scaling", scale, "scaling is .*: it must be finite")
      for scale in (NAN, -INF, LARGE, -LARGE)),
    *((op, "length", length, rf"length is {length}: it must be 0\.\.")
      for length in (-1, 21, LAST, -LAST - 1) for op in ("kv_dequantize", "attention_decode")),
    *(("kv_dequantize", "head_dim", d, f"head_dim is {d}: it must be at least 1, at most")
      for d in (0, -1, LAST, -LAST - 1)),
    *(("kv_quantize_append", "start", start, rf"positions {start}\.\..* do not fit: the capacity")
      for start in (6, LAST, LAST - 3, -LAST - 1)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "value", "message"), NUMBERS)
def test_a_wrong_number_is_named(op: str, name: str, value: Any, message: str) -> None:
    named = FULL[op].call(torch.float32).named() | {name: value}
    function = getattr(torch.ops.flatquant_cuda, op)
    arguments = [named[argument.name] for argument in function.default._schema.arguments]
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        function(*arguments)


@pytest.mark.parametrize("op", library.OPS)
def test_a_tensor_that_does_not_fit_the_schema_is_named(op: str) -> None:
    """Numbers, strings and lists in place of tensors: the dispatcher's own message."""
    function = getattr(torch.ops.flatquant_cuda, op)
    values = FULL[op].call(torch.float32).schema_args()
    for position, argument in enumerate(function.default._schema.arguments):
        arguments = [*values[:position], "no", *values[position + 1 :]]
        with pytest.raises(RuntimeError, match=f"{op}.*'{argument.name}'"):
            function(*arguments)


# ---- memory that is shared -----------------------------------------------------------------------


def cache_in(buffer: Tensor, codes: int, scale: int, zero: int) -> list[Tensor]:
    """Codes [1, 2, 4, 8], scale and zero [1, 2, 4] at these bytes of the buffer."""
    return [
        buffer[codes : codes + 64].view(1, 2, 4, 8),
        buffer[scale : scale + 32].view(torch.float32).view(1, 2, 4),
        buffer[zero : zero + 8].view(1, 2, 4),
    ]


def test_a_cache_that_overlaps_is_named() -> None:
    buffer = torch.zeros(512, dtype=torch.uint8)
    x = torch.randn(1, 2, 4, 16)
    apart = cache_in(buffer, 0, 64, 96)
    ops.kv_quantize_append(x, *apart)
    wanted = [torch.zeros_like(part) for part in apart]
    ops.kv_quantize_append(x, *wanted)
    assert bits_of(tuple(apart)) == bits_of(tuple(wanted))
    inside = buffer.view(torch.float32)
    for offsets, options, names in (
        ((0, 60, 96), {}, ("codes", "scale")),
        ((64, 128, 67), {}, ("codes", "zero")),
        ((200, 0, 31), {}, ("scale", "zero")),
        ((0, 64, 96), {"x": inside[:128].view(1, 2, 4, 16)}, ("codes", "x")),
        ((0, 64, 96), {"clip": inside[23:25]}, ("scale", "clip")),
        ((0, 64, 511 - 7), {"clip": inside[126:128]}, ("zero", "clip")),
    ):
        cache, values = cache_in(buffer, *offsets), options.pop("x", x)
        before = buffer.clone()
        message = f"^kv_quantize_append: {names[0]} overlaps {names[1]} in memory: it is written"
        with pytest.raises(RuntimeError, match=message):
            ops.kv_quantize_append(values, *cache, **options)
        assert torch.equal(buffer, before)


def test_inputs_may_overlap() -> None:
    """Nothing else is written, so that reading the same bytes twice is harmless."""

    def same(call: Callable[..., Any], *views: Tensor, **options: Any) -> None:
        copies = [view.clone() for view in views]
        found, wanted = call(*views, **options), call(*copies, **options)
        found, wanted = ((t,) if isinstance(t, Tensor) else t for t in (found, wanted))
        assert bits_of(found) == bits_of(wanted)
        assert bits_of(views) == bits_of(tuple(copies))
        storages = {view.untyped_storage().data_ptr() for view in views}
        assert not storages & {t.untyped_storage().data_ptr() for t in found if t.numel()}

    rows = torch.randn(9, 72)
    left, right = rows.flatten()[:64].view(8, 8), rows.flatten()[40:121].view(9, 9)
    same(lambda x, g, a, b: ops.kronecker_quantize(x, a, b, gate=g), rows, rows, left, right)
    same(
        lambda x, g, a, b: ops.kronecker_quantize(x, a, b, gate=g), rows[1:], rows[:-1], left, right
    )
    same(ops.kronecker, rows, left, right)
    codes = torch.randint(0, 256, (40, 20), dtype=torch.uint8)
    scale, out = torch.rand(40), torch.randn(5, 40)
    same(ops.gemm_w4a4, codes[3:8], scale[:5], codes, scale)
    same(
        lambda a, s, w, t, r: ops.gemm_w4a4(a, s, w, t, bias=r[0], residual=r),
        codes[3:8], out[0, :5], codes, out[0], out,
    )  # fmt: skip
    signed = codes.view(torch.int8)
    same(ops.gemm_w8a8, signed[:5], scale[:5], signed, scale)
    same(ops.fake_quantize_backward, rows, rows, rows[0, :2])
    side = codes[:24].view(1, 2, 12, 20), torch.rand(1, 2, 12), codes[:2, :12].view(1, 2, 12)
    q, mask = torch.randn(1, 4, 12, 40), torch.randn(12, 40)[:, :12]
    same(lambda q, *kv, **o: ops.attention_decode(q, *kv, *kv, **o), q, *side, mask=mask)


@pytest.mark.parametrize("op", library.OPS)
def test_wrappers_take_expanded_inputs(op: str) -> None:
    """All elements of each input at one address; the cache that is written excepted."""
    call = FULL[op].call(torch.float32)
    written = call.args[1:] if op == "kv_quantize_append" else ()
    spread = Call(
        op,
        tuple(expanded(a) if isinstance(a, Tensor) and not any(a is w for w in written) else a
              for a in call.args),
        {n: expanded(v) if isinstance(v, Tensor) else v for n, v in call.kwargs.items()},
    )  # fmt: skip
    function = getattr(ops, op)
    assert bits_of(spread.run(function)) == bits_of(spread.map(Tensor.clone).run(function))


# ---- nothing to do -------------------------------------------------------------------------------

MORE: dict[str, Any] = {"symmetric": False, "bias": torch.bfloat16, "residual": True}
EMPTY = (
    Case("quantize_activation", (0, 2, 8), {"symmetric": False, "bits": 8, "clip": True}),
    Case("kronecker", (0, 4, 6), {"channel_scale": True}),
    Case("kronecker_quantize", (0, 4, 6), {"gate": True, "rms_eps": 1e-5, "symmetric": False}),
    Case("hadamard", (0, 1, 8), {"base": False}),
    *(
        Case(op, sizes, options)
        for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8")
        for sizes in (((0,), 5, 7), ((2, 0, 3), 17, 64), ((3,), 0, 9), ((0,), 0, 4))
        for options in ({}, MORE)
    ),
    *(
        Case("gemm_w4a16", sizes, {"bias": torch.float32})
        for sizes in (((0,), 5, 6, 2), ((2, 0), 17, 64, 1), ((3,), 0, 9, 3), ((0,), 0, 4, 1))
    ),
    *(
        Case("kv_quantize_append", sizes, options)
        for sizes in ((0, 2, 3, 8), (2, 0, 3, 8), (2, 3, 0, 8), (0, 0, 0, 8))
        for options in (
            {"capacity": 5, "transform": True, "clip": True},
            {"capacity": 3, "bits": 2},
            {"capacity": 9, "start": 6},
        )
    ),
    Case("kv_quantize_append", (2, 3, 0, 8), {"capacity": 0}),
    Case("kv_quantize_append", (2, 3, 0, 8), {"capacity": 4, "start": 4}),
    *(Case("kv_dequantize", sizes) for sizes in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8))),
    *(
        Case("attention_decode", sizes, options)
        for sizes in (
            (0, 4, 2, 3, 8, 6),
            (2, 0, 2, 3, 8, 6),
            (2, 4, 2, 0, 8, 6),
            (2, 4, 2, 3, 8, 0),
            (0, 0, 1, 0, 8, 0),
        )
        for options in ({}, {"mask": "additive"}, {"mask": "broadcast"})
    ),
    Case("fake_quantize", (0, 4), {"per_row": True}, (torch.float32,)),
    Case("fake_quantize_backward", (0, 4), {"per_row": True}, (torch.float32,)),
)


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.id)
def test_nothing_to_do(case: Case, isa: str) -> None:
    for dtype in case.dtypes:
        call = case.call(dtype)
        got, want = call.run(getattr(ops, case.op)), call.run(getattr(reference, case.op))
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
        CHECKS[case.op](call, got, want)


NO_COLUMNS = {
    "quantize_activation": {"x": torch.zeros(3, 0)},
    "kronecker": {"x": torch.zeros(3, 0), "left": None, "right": None, "channel_scale": None},
    "kronecker_quantize": {"x": torch.zeros(3, 0), "left": None, "right": None, "gate": None},
    "hadamard": {"x": torch.zeros(3, 0), "base": None},
    "gemm_w4a4": {"a": torch.zeros(5, 0).byte(), "w": torch.zeros(19, 0).byte()},
    "gemm_w4a8": {"a": torch.zeros(5, 0).byte(), "w": torch.zeros(19, 0).byte()},
    "gemm_w8a8": {"a": torch.zeros(5, 0).byte(), "w": torch.zeros(19, 0).char()},
    "gemm_w4a16": {"x": torch.zeros(6, 0), "w": torch.zeros(17, 0).byte()},
    "kv_quantize_append": {"x": torch.zeros(2, 3, 4, 0)},
    "kv_dequantize": {"head_dim": 0},
    "attention_decode": {"q": torch.zeros(2, 4, 3, 0)},
    "fake_quantize": {"x": torch.zeros(5, 0)},
    "fake_quantize_backward": {"x": torch.zeros(5, 0)},
}


@pytest.mark.parametrize("op", library.OPS)
@pytest.mark.parametrize("scalar", [False, True], ids=["no column", "no dimension"])
def test_a_row_without_columns_is_named(op: str, scalar: bool) -> None:
    """Through the wrappers, whose defaults depend on sizes."""
    change: dict[str, Any] = dict(NO_COLUMNS[op])
    name = next(iter(change))
    if scalar:
        change = {"codes" if name == "head_dim" else name: None} | change
        first = next(iter(change))
        change[first] = torch.zeros((), dtype=FULL[op].call(torch.float32).named()[first].dtype)
    named = FULL[op].call(torch.float32).named() | change
    for derived in ("length", "scaling", "scale"):  # the defaults, where they are not tensors
        if not isinstance(named.get(derived), Tensor):
            named.pop(derived, None)
    message = rf"^{op}: {name} (has 0 (packed )?columns|is 0|has (no|0) dim|has shape \[\])"
    message = message if not scalar else message.replace(name, next(iter(change)))
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**named)
