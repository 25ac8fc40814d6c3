"""Every op of the case table against the reference, and the promises all ops make."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatquant_cuda
from flatquant_cuda import library, ops, packing, reference
from flatquant_cuda.__main__ import describe

from .cases import BUILDERS, CASES, CHECKS, Call, Case, every_case, first_case

pytestmark = pytest.mark.filterwarnings("ignore:flatquant_cuda answers from")
PACKAGE = Path(flatquant_cuda.__file__).parent


def bits_of(tensors: tuple[Tensor, ...]) -> list[bytes]:
    """The bytes of tensors, for comparisons that a NaN does not disturb."""
    return [t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors]


def native_op(call: Call) -> tuple[Tensor, ...]:
    """The registered op itself, without the wrapper."""
    result = getattr(torch.ops.flatquant_cuda, call.op)(*call.schema_args())
    if call.op == "kv_quantize_append":
        return call.args[1:]
    return result if isinstance(result, tuple) else (result,)


def test_table_covers_every_op() -> None:
    assert {case.op for case in CASES} == set(library.OPS) == set(BUILDERS) == set(CHECKS)


@pytest.mark.parametrize(("case", "dtype"), every_case(), ids=lambda v: getattr(v, "id", str(v)))
def test_matches_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    if library.backend(case.op, device) == "reference":
        pytest.skip(f"{case.op} has no kernel for {device}")
    call = case.call(dtype, device)
    got = call.run(getattr(ops, case.op))
    want = call.run(getattr(reference, case.op))
    cpu = call.map(Tensor.cpu)
    CHECKS[case.op](cpu, tuple(t.cpu() for t in got), tuple(t.cpu() for t in want))


def test_instruction_sets_agree_bit_for_bit(isa: str) -> None:
    for case, dtype in every_case():
        call = case.call(dtype)
        library.cpu_isa("portable")
        want = call.run(getattr(ops, case.op))
        library.cpu_isa(isa)
        got = call.run(getattr(ops, case.op))
        assert bits_of(got) == bits_of(want), f"{case.id} {dtype}"


@pytest.mark.parametrize("op", library.OPS)
def test_opcheck(op: str, native: None) -> None:
    call = first_case(op).call(torch.float32)
    torch.library.opcheck(getattr(torch.ops.flatquant_cuda, op).default, call.schema_args())


@pytest.mark.parametrize("op", library.OPS)
def test_compiles_without_graph_breaks(op: str, native: None) -> None:
    call = first_case(op).call(torch.float32)
    function = getattr(ops, op)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert bits_of(call.run(compiled)) == bits_of(call.run(function))


def guarded(tensor: Tensor, offset: int) -> Tensor:
    """A copy inside a larger buffer of NaNs (or of ones in every bit), not at its start."""
    size = tensor.numel()
    poison = float("nan") if tensor.dtype.is_floating_point else -1 % 2 ** (8 * tensor.itemsize - 1)
    buffer = torch.full((size + 2 * offset + 64,), poison).to(tensor.dtype)
    buffer[offset : offset + size] = tensor.flatten()
    return buffer[offset : offset + size].view(tensor.shape)


@pytest.mark.parametrize("offset", [1, 3])
def test_views_and_guard_bands(offset: int, isa: str) -> None:
    """No kernel needs alignment, reads its neighbours or writes outside its outputs."""
    for case, dtype in every_case():
        plain = case.call(dtype)
        if plain.in_pages():
            continue
        placed = plain.map(lambda t: guarded(t, offset))
        roots = [t._base for t in (*placed.args, *placed.kwargs.values()) if isinstance(t, Tensor)]
        before = [bits_of((root,)) for root in roots]
        want, got = native_op(plain), native_op(placed)
        assert bits_of(got) == bits_of(want), f"{case.id} {dtype}"
        if case.op != "kv_quantize_append":
            assert [bits_of((root,)) for root in roots] == before, case.id
            continue
        for view, root in zip(placed.args[1:], [t._base for t in placed.args[1:]], strict=True):
            clean = guarded(view.clone(), offset)._base
            assert bits_of((root,)) == bits_of((clean,)), f"{case.id}: wrote outside the cache"


@pytest.mark.parametrize("op", library.OPS)
def test_wrappers_take_strided_inputs(op: str) -> None:
    def strided(tensor: Tensor) -> Tensor:
        spread = torch.stack((tensor, tensor), dim=-1)[..., 0]
        return spread if tensor.numel() > 1 else tensor

    call = first_case(op).call(torch.float32)
    if op == "kv_quantize_append":  # the cache itself must be contiguous
        kwargs = {n: strided(v) if isinstance(v, Tensor) else v for n, v in call.kwargs.items()}
        spread = Call(op, (strided(call.args[0]), *call.args[1:]), kwargs)
    else:
        spread = call.map(strided)
    function = getattr(ops, op)
    assert bits_of(spread.run(function)) == bits_of(call.run(function))


@pytest.mark.parametrize("op", library.OPS)
def test_threads_change_nothing(op: str, native: None) -> None:
    calls = [c.call(torch.bfloat16 if len(c.dtypes) > 1 else torch.float32) for c in CASES]
    big = {
        "quantize_activation": Case(op, (301, 1536)),
        "kronecker": Case(op, (101, 32, 48)),
        "kronecker_quantize": Case(op, (101, 32, 48), {"gate": True, "rms_eps": 1e-5}),
        "hadamard": Case(op, (301, 12, 128)),
        "gemm_w4a4": Case(op, ((130,), 333, 576)),
        "gemm_w4a8": Case(op, ((1,), 1536, 576)),
        "gemm_w8a8": Case(op, ((3,), 1536, 576)),
        "gemm_w4a16": Case(op, ((3,), 333, 576, 9)),
        "kv_quantize_append": Case(op, (2, 3, 100, 64), {"capacity": 100, "transform": True}),
        "kv_dequantize": Case(op, (2, 3, 500, 64)),
        "attention_decode": Case(op, (1, 9, 3, 40, 64, 200)),
        "fake_quantize": Case(op, (301, 1536), {}, (torch.float32,)),
        "fake_quantize_backward": Case(op, (301, 1536), {}, (torch.float32,)),
    }[op]
    calls = [big.call(big.dtypes[-1])]
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers += [bits_of(call.run(getattr(ops, op))) for call in calls for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_stay_alone(bad: float, symmetric: bool, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    clean = ops.quantize_activation(x, symmetric=symmetric)
    x[2, 17] = bad
    for codes, scale, zero in (
        ops.quantize_activation(x, symmetric=symmetric),
        reference.quantize_activation(x, symmetric=symmetric),
    ):
        assert scale[2].isnan() and not codes[2].any() and (symmetric or zero[2] == 0)
        others = [0, 1, 3, 4]
        assert torch.equal(codes[others], clean[0][others])
        assert torch.equal(scale[others], clean[1][others])
    left = torch.eye(3, device=device)
    codes, scale, _ = ops.kronecker_quantize(x, left, None, symmetric=symmetric, rms_eps=1e-5)
    assert scale.isnan().tolist() == [False, False, True, False, False] and not codes[2].any()


def test_cached_nan_reaches_only_its_readers(isa: str) -> None:
    """A cache row with a NaN gives NaN to the queries that may attend to it, and to no others."""
    x = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(1))
    x[0, 1, 3, 5] = float("nan")
    cache = [torch.zeros(1, 2, 6, 8, dtype=torch.uint8), torch.zeros(1, 2, 6)]
    cache.append(torch.zeros(1, 2, 6, dtype=torch.uint8))
    ops.kv_quantize_append(x, *cache)
    assert cache[1][0, 1, 3].isnan() and not cache[0][0, 1, 3].any() and cache[2][0, 1, 3] == 0
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    q = torch.randn(1, 4, 6, 16, generator=torch.Generator().manual_seed(2))
    for function in (ops.attention_decode, reference.attention_decode):
        out = function(q, *cache, *cache, mask=mask)
        touched = torch.zeros(1, 4, 6, dtype=torch.bool)
        touched[0, 2:, 3:] = True
        assert torch.equal(out.isnan().all(-1), touched)
        assert torch.equal(out.isnan().any(-1), touched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_is_the_plain_ops_one_by_one(dtype: torch.dtype, isa: str) -> None:
    case = Case("kronecker_quantize", (33, 24, 24), {"channel_scale": True, "clip": True})
    call = case.call(dtype)
    x, left, right = call.args
    clip, scale = call.kwargs["clip"], call.kwargs["channel_scale"]
    y = ops.kronecker(x, left, right, channel_scale=scale, out_dtype=torch.float32)
    for symmetric in (True, False):
        want = ops.quantize_activation(y, clip=clip, symmetric=symmetric)
        got = call.run(lambda *a, s=symmetric, **k: ops.kronecker_quantize(*a, symmetric=s, **k))
        assert bits_of(got) == bits_of(want)
        normed = ops.kronecker_quantize(
            x, left, right, channel_scale=scale, clip=clip, symmetric=symmetric, rms_eps=1e-5
        )
        assert torch.equal(normed[0], want[0]) and torch.equal(normed[2], want[2])
        norm = torch.rsqrt(x.double().square().mean(-1) + 1e-5)
        torch.testing.assert_close(normed[1], (want[1] * norm).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_flips_are_rare(bits: int, dtype: torch.dtype, native: None) -> None:
    """The contract's rates, on a sample large enough to mean something."""
    case = Case("kronecker_quantize", (600, 24, 24), {"bits": bits})
    call = case.call(dtype)
    CHECKS[case.op](call, call.run(ops.kronecker_quantize), call.run(reference.kronecker_quantize))


def test_absent_factor_is_the_identity(isa: str) -> None:
    x = torch.randn(5, 60).bfloat16()
    left, right = torch.randn(6, 6), torch.randn(10, 10)
    for given, instead in (
        ((left, None), (left, torch.eye(10))),
        ((None, right), (torch.eye(6), right)),
    ):
        assert torch.equal(ops.kronecker(x, *given), ops.kronecker(x, *instead))


# ---- wrong arguments -----------------------------------------------------------------------------

WRONG: dict[str, list[tuple[dict[str, object], str]]] = {
    "quantize_activation": [
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x has dtype int32: it must be float32, bf"),
        ({"x": torch.zeros(2, 0)}, "x has 0 columns: it must have at least 1"),
        ({"x": torch.zeros(())}, "x has no dimension: it must have at least one"),
        ({"x": torch.zeros(4, 2).T}, "x is not contiguous: it must be"),
        ({"bits": 1}, "bits is 1: it must be 2..8"),
        ({"bits": 9}, "bits is 9: it must be 2..8"),
        ({"clip": torch.ones(3)}, r"clip has shape \[3\]: it must be \[2\]"),
        ({"clip": torch.ones(2).half()}, "clip has dtype float16: it must be float32"),
        ({"narrow": True, "symmetric": False}, "narrow is set: it needs symmetric"),
        ({"layout": 2}, r"layout is 2: it must be 0 \(packed\) or 1 \(one byte a code\)"),
    ],
    "kronecker": [
        ({"left": torch.zeros(2, 3)}, r"left has shape \[2, 3\]: it must be square"),
        ({"right": torch.zeros(3)}, r"right has shape \[3\]: it must be square"),
        (
            {"left": torch.zeros(5, 5)},
            "x has 72 columns, left and right are 5 and 9: their product",
        ),
        (
            {"left": torch.zeros(8, 8, dtype=torch.int32)},
            "left has dtype int32: it must be a float",
        ),
        ({"channel_scale": torch.zeros(3)}, r"channel_scale has shape \[3\]: it must be \[72\]"),
        ({"out_dtype": torch.float64}, "out_dtype is float64: it must be float32, bfloat16 or"),
        ({"right": torch.zeros(9, 9).T[:, :0]}, "right is not contiguous|it must be square"),
    ],
    "kronecker_quantize": [
        ({"gate": torch.zeros(30, 71)}, r"gate has shape \[30, 71\]: it must be \[30, 72\]"),
        ({"gate": torch.zeros(30, 72).half()}, "gate has dtype float16: it must be float32"),
        ({"rms_eps": -1.0}, "rms_eps is -1: it must be finite and not negative"),
        ({"rms_eps": float("nan")}, "rms_eps is nan: it must be finite and not negative"),
        ({"bits": 0}, "bits is 0: it must be 2..8"),
    ],
    "hadamard": [
        ({"x": torch.zeros(2, 3)}, "x has 3 columns, base is 20: their quotient must be a power"),
        ({"base": None, "x": torch.zeros(2, 12)}, "x has 12 columns, base is 1: their quotient"),
        ({"base": torch.zeros(4, 5)}, r"base has shape \[4, 5\]: it must be square"),
    ],
    "gemm_w4a4": [
        ({"w": torch.zeros(19, 7).byte()}, "a has 19 packed columns, w has 7: they must be equal"),
        ({"a": torch.zeros(5, 19)}, "a has dtype float32: it must be uint8"),
        ({"w": torch.zeros(19, 19).char()}, "w has dtype int8: it must be uint8"),
        ({"a_scale": torch.zeros(4)}, r"a_scale has shape \[4\]: it must be \[5\]"),
        ({"w_scale": torch.zeros(19, 1)}, r"w_scale has shape \[19, 1\]: it must be \[19\]"),
        ({"a_zero": None}, "a_zero is missing, w_colsum is given: they must be given together"),
        ({"w_colsum": None}, "a_zero is given, w_colsum is missing: they must be given together"),
        ({"w_colsum": torch.zeros(19)}, "w_colsum has dtype float32: it must be int32"),
        ({"a_zero": torch.zeros(5)}, "a_zero has dtype float32: it must be int32"),
        ({"bias": torch.zeros(18)}, r"bias has shape \[18\]: it must be \[19\]"),
        ({"bias": torch.zeros(19).int()}, "bias has dtype int32: it must be a float dtype"),
        ({"residual": torch.zeros(5, 19).half()}, "residual has dtype float16: it must be float32"),
        ({"residual": torch.zeros(5, 18)}, r"residual has shape \[5, 18\]: it must be \[5, 19\]"),
        ({"out_dtype": torch.int32}, "out_dtype is int32: it must be float32, bfloat16 or float16"),
        (
            {"a": torch.zeros(1, 2**19 + 1).byte(), "w": torch.zeros(1, 2**19 + 1).byte()},
            "a has 1048578 columns: int32 sums allow at most 1048576",
        ),
    ],
    "gemm_w4a8": [
        ({"w": torch.zeros(19, 18).byte()}, "a has 37 columns, w has 18 packed columns: w must"),
        (
            {"a_zero": None, "w_colsum": None},
            "a has dtype uint8, a_zero is missing: a must be int8",
        ),
        ({"a": torch.zeros(5, 37).char()}, "a has dtype int8, a_zero is given: a must be uint8"),
    ],
    "gemm_w8a8": [
        ({"w": torch.zeros(19, 36).char()}, r"w has shape \[19, 36\]: it must be \[any, 37\]"),
        ({"w": torch.zeros(19, 37).byte()}, "w has dtype uint8: it must be int8"),
        (
            {"a": torch.zeros(1, 2**16 + 1).byte(), "w": torch.zeros(1, 2**16 + 1).char()},
            "a has 65537 columns: int32 sums of 8-bit products allow at most 65536",
        ),
    ],
    "gemm_w4a16": [
        ({"bits": 5}, "bits is 5: it must be 2..4"),
        ({"w": torch.zeros(17, 63).byte()}, r"w has shape \[17, 63\]: it must be \[any, 64\]"),
        ({"w_scale": torch.zeros(17, 3)}, "x has 256 columns, w_scale has 3 groups: they must"),
        ({"w_scale": torch.zeros(16, 2)}, r"w_scale has shape \[16, 2\]: it must be \[17, any\]"),
    ],
    "kv_quantize_append": [
        ({"start": 1}, "positions 1..41 do not fit: the capacity is 40"),
        ({"start": -1}, "positions -1..39 do not fit: the capacity is 40"),
        (
            {"x": torch.zeros(2, 3, 64)},
            r"x has shape \[2, 3, 64\]: it must be \[any, any, any, any\]",
        ),
        (
            {"scale": torch.zeros(2, 3, 39)},
            r"scale has shape \[2, 3, 39\]: it must be \[2, 3, 40\]",
        ),
        ({"zero": torch.zeros(2, 3, 40)}, "zero has dtype float32: it must be uint8"),
        ({"bits": 8}, r"codes has shape \[2, 3, 40, 32\]: it must be \[2, 3, 40, 64\]"),
        (
            {"transform": torch.zeros(64, 63)},
            r"transform has shape \[64, 63\]: it must be \[64, 64",
        ),
        ({"codes": torch.zeros(2, 3, 32, 40).byte().mT}, "codes is not contiguous: it must be"),
    ],
    "kv_dequantize": [
        ({"length": 10}, "length is 10: it must be 0..9, the capacity of the cache"),
        ({"length": -1}, "length is -1: it must be 0..9"),
        ({"head_dim": 0}, "head_dim is 0: it must be at least 1"),
        ({"head_dim": 65}, r"codes has shape \[1, 2, 9, 32\]: it must be \[1, 2, 9, 33\]"),
        ({"out_dtype": torch.float64}, "out_dtype is float64: it must be"),
    ],
    "attention_decode": [
        ({"q": torch.zeros(2, 3, 3, 16)}, "q has 3 heads, the cache 2: no multiple"),
        ({"q": torch.zeros(3, 4, 3, 16)}, r"k_codes has shape \[2, .*\]: it must be \[3, any, any"),
        ({"q": torch.zeros(2, 4, 3, 18)}, r"k_codes has shape \[2, 2, 20, 8\]: it must be"),
        ({"v_bits": 8}, r"v_codes has shape \[2, 2, 20, 8\]: it must be \[2, 2, 20, 16\]"),
        ({"k_bits": 1}, "k_bits is 1: it must be 2..8"),
        ({"length": 21}, "length is 21: it must be 0..20"),
        (
            {"mask": torch.zeros(2, 20)},
            r"mask has shape \[2, 20\]: it must broadcast to \[2, 4, 3, 20",
        ),
        ({"mask": torch.zeros(3, 20).int()}, "mask has dtype int32: it must be a float dtype"),
        ({"scaling": float("inf")}, "scaling is inf: it must be finite"),
    ],
}
BASES = {
    "quantize_activation": Case("quantize_activation", (3, 8)),
    "kronecker": Case("kronecker", (3, 8, 9), {"channel_scale": True}),
    "kronecker_quantize": Case("kronecker_quantize", (30, 8, 9)),
    "hadamard": Case("hadamard", (2, 20, 8)),
    "gemm_w4a4": Case("gemm_w4a4", ((5,), 19, 37), {"symmetric": False}),
    "gemm_w4a8": Case("gemm_w4a8", ((5,), 19, 37), {"symmetric": False}),
    "gemm_w8a8": Case("gemm_w8a8", ((5,), 19, 37), {"symmetric": False}),
    "gemm_w4a16": Case("gemm_w4a16", ((6,), 17, 256, 2), {"bits": 2}),
    "kv_quantize_append": Case("kv_quantize_append", (2, 3, 40, 64), {"capacity": 40}),
    "kv_dequantize": Case("kv_dequantize", (1, 2, 9, 64)),
    "attention_decode": Case("attention_decode", (2, 4, 2, 3, 16, 20)),
}


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [(op, change, message) for op, rows in WRONG.items() for change, message in rows],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(
    op: str, change: dict[str, object], message: str, native: None
) -> None:
    named = BASES[op].call(torch.float32).named() | change
    schema = getattr(torch.ops.flatquant_cuda, op).default._schema
    arguments = [named[argument.name] for argument in schema.arguments]
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(torch.ops.flatquant_cuda, op)(*arguments)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="op_name is 'gemm': it must be one of"):
        flatquant_cuda.backend("gemm")
    with pytest.raises(ValueError, match=r"bits is 9: it must be 2\.\.8"):
        packing.pack(torch.zeros(2, 2, dtype=torch.int8), 9)
    with pytest.raises(ValueError, match="3 bytes hold no 8 codes, 2 a byte: 4 bytes would"):
        packing.unpack(torch.zeros(3, dtype=torch.uint8), 4, 8)
    with pytest.raises(ValueError, match=r"quantize_activation: bits is 1: it must be 2\.\.8"):
        reference.quantize_activation(torch.zeros(2, 2), bits=1)
    with pytest.raises(ValueError, match=r"layout is 2: it must be 0 \(PACKED\) or 1 \(BYTES\)"):
        reference.quantize_activation(torch.zeros(2, 2), layout=2)


# ---- the package ---------------------------------------------------------------------------------


def test_registered_kernels_and_shape_functions(native: None) -> None:
    for op in library.OPS:
        assert flatquant_cuda.backend(op, "cpu") == "native"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flatquant_cuda::{op}", "Meta")


def test_build_info_for_programs_and_people() -> None:
    """Also: the environment variable lowers the instruction set."""
    program = [sys.executable, "-m", "flatquant_cuda", "--json"]
    environment = os.environ | {"FLATQUANT_CPU_ISA": "portable"}
    run = subprocess.run(program, capture_output=True, check=True, env=environment)
    found, here = json.loads(run.stdout), flatquant_cuda.build_info()
    assert set(found["ops"]["cpu"]) == set(library.OPS)
    assert found | {"cpu_isa": ""} == here | {"cpu_isa": ""}
    assert found["cpu_isa"] == "portable" or not library.loaded
    text = describe(here)
    assert torch.__version__ in text and here["cpu_isa"] in text
    assert all(op in text for op in library.OPS)
    without = [line for line in text.splitlines() if " reference " in line]
    assert all(line.endswith(")") for line in without), "each says why there is no kernel"


def test_reference_answers_without_a_library(tmp_path: Path) -> None:
    """The package works with no compiled file: the same codes, and exactly one warning."""
    copy = tmp_path / "flatquant_cuda"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import warnings, torch, flatquant_cuda
from flatquant_cuda import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        codes, scale, zero = ops.quantize_activation(torch.linspace(-3, 5, 21).reshape(3, 7))
print(len(caught), flatquant_cuda.backend("gemm_w4a4"), codes.flatten().tolist())
print(caught[0].category.__name__, caught[0].message)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    codes = ops.quantize_activation(torch.linspace(-3, 5, 21).reshape(3, 7))[0].flatten().tolist()
    first, second = run.stdout.strip().split("\n")
    assert first == f"1 reference {codes}"
    assert second.startswith("UserWarning flatquant_cuda answers from its slow PyTorch reference")
