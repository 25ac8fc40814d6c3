"""The matrix products at the edges of their tiles, and the matrix unit's state between calls.

Kernels cut the output into blocks of 32 rows and tiles of 32 columns, k into steps of 64 bytes,
panels of steps and chunks of panels; few rows take another way. None of it may show.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant_cuda import library, ops, packing, reference

from .test_gemm import INTEGER_OPS, call, float_inputs, integer_inputs

pytestmark = pytest.mark.skipif(not library.loaded, reason="no native library")
needs_amx = pytest.mark.skipif(
    not library.loaded or library.cpu_isa() != "amx", reason="this machine has no amx"
)

# Around 1, the few rows that go without panels, half a block, a block and two.
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65)
COLUMNS = (1, 31, 32, 33, 64)


def head(inputs: dict[str, Any], m: int, n: int) -> dict[str, Any]:
    """The first m rows and n columns of a product."""
    by_row = {name: inputs[name][:m] for name in ("a", "a_scale", "a_zero") if name in inputs}
    by_column = {name: inputs[name][:n] for name in ("w", "w_scale", "w_colsum") if name in inputs}
    return by_row | by_column


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize("k", [1, 2, 31, 33, 63, 64, 65, 129, 320])
def test_every_edge_of_a_tile(isa: str, op: str, k: int) -> None:
    m, n = max(ROWS), max(COLUMNS)
    for asymmetric, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.half)):
        inputs = integer_inputs(op, m, n, k, asymmetric, seed=k)
        bias, residual = torch.randn(n), torch.randn(m, n).to(dtype)
        expected = call(op, inputs, reference, bias=bias, residual=residual, out_dtype=dtype)
        plain = call(op, inputs, reference, out_dtype=dtype)
        for rows in ROWS:
            for columns in COLUMNS:
                part = head(inputs, rows, columns)
                out = call(op, part, out_dtype=dtype)
                assert torch.equal(out, plain[:rows, :columns]), (rows, columns)
                options = {
                    "bias": bias[:columns],
                    "residual": residual[:rows, :columns].contiguous(),
                    "out_dtype": dtype,
                }
                out = call(op, part, **options)
                assert torch.equal(out, expected[:rows, :columns]), (rows, columns)


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (300, 869, 2200),  # a chunk and a run are less than there is
        (40, 70, 20_001),
        (517, 33, 640),  # a second block of rows, few of them
        (530, 97, 640),
        (530, 65, 2100),
        (9, 33, 65_535),
    ],
)
def test_more_than_stays_in_a_cache(isa: str, op: str, m: int, n: int, k: int) -> None:
    if isa == "portable" and m * n * k > 2e7:
        m, n = min(m, 20), min(n, 40)
    inputs = integer_inputs(op, m, n, k, asymmetric=True)
    for dtype in (torch.float32, torch.bfloat16):
        expected = call(op, inputs, reference, out_dtype=dtype)
        assert torch.equal(call(op, inputs, out_dtype=dtype), expected)


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize("m", [1, 4, 9, 33])
@pytest.mark.parametrize("code", [0x00, 0x77, 0x88, 0xFF, 0x80, 0x7F])
def test_extreme_codes_in_every_way_of_multiplying(isa: str, op: str, m: int, code: int) -> None:
    # Where pairs of products are added in 16 bits they must not saturate.
    for asymmetric in (False, True):
        inputs = integer_inputs(op, m, 33, 258, asymmetric)
        inputs["a"].view(torch.uint8).fill_(code)
        for weights in (0x88, 0x77, 0x80, 0x7F):
            inputs["w"].view(torch.uint8).fill_(weights)
            if asymmetric:
                w = inputs["w"]
                plain = w if op == "gemm_w8a8" else packing.unpack_nibbles(w, 258)
                inputs["w_colsum"] = plain.sum(1, dtype=torch.int32)
            assert torch.equal(call(op, inputs), call(op, inputs, reference))


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize("m", [1, 33])
def test_numbers_that_are_hard_to_round(isa: str, op: str, m: int) -> None:
    # Subnormal, infinite and not a number, some rows and columns of each, among usual ones.
    inputs = integer_inputs(op, m, 96, 128)
    inputs["w_scale"][3] = float("nan")
    inputs["w_scale"][40] = float("inf")
    inputs["w_scale"][64:] = 1e-30
    inputs["a_scale"][::5] = 1e-9
    inputs["a_scale"][1::7] = 1e-38
    residual = torch.randn(m, 96).bfloat16()
    residual[0, 7] = float("nan")
    residual[0, 66] = 1e-39
    for options in ({}, {"residual": residual}):
        expected = call(op, inputs, reference, out_dtype=torch.bfloat16, **options)
        out = call(op, inputs, out_dtype=torch.bfloat16, **options)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# ---- gemm_w4a16 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("k", "groups"),
    [(2, 1), (64, 1), (130, 13), (576, 9), (576, 1), (1152, 1), (1280, 10), (2048, 2)],
)
def test_float_product_has_the_same_bits_everywhere(
    isa: str, bits: int, k: int, groups: int
) -> None:
    m, n = 65, 33
    for dtype in (torch.bfloat16, torch.float32):
        x, codes, scale, bias = float_inputs(m, n, k, groups, bits, dtype)
        w = packing.pack(codes, bits)
        library.cpu_isa("portable")
        expected = ops.gemm_w4a16(x, w, scale, bias=bias, bits=bits)
        assert library.cpu_isa(isa) == isa
        for rows in (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 65):
            for columns in (1, 31, 32, 33):
                options = {"bias": bias[:columns], "bits": bits}
                out = ops.gemm_w4a16(x[:rows], w[:columns], scale[:columns], **options)
                assert torch.equal(out, expected[:rows, :columns]), (rows, columns)


def test_float_product_of_numbers_that_a_matrix_unit_takes_for_0(isa: str) -> None:
    x, codes, scale, _ = float_inputs(40, 33, 256, 2, 4, torch.bfloat16)
    x[::3] *= 2.0**-120
    x[1, ::2] = 1e-39
    w = packing.pack(codes, 4)
    library.cpu_isa("portable")
    expected = ops.gemm_w4a16(x, w, scale * 2.0**60)
    assert library.cpu_isa(isa) == isa
    for rows in (1, 2, 16, 40):
        assert torch.equal(ops.gemm_w4a16(x[:rows], w, scale * 2.0**60), expected[:rows])


def test_float_product_with_rows_beyond_the_cache(isa: str) -> None:
    if isa == "portable":
        pytest.skip("what the others are compared with")
    x, codes, scale, _ = float_inputs(210, 420, 4096, 32, 4, torch.bfloat16)
    w = packing.pack(codes, 4)
    library.cpu_isa("avx2")
    expected = ops.gemm_w4a16(x, w, scale)
    assert library.cpu_isa(isa) == isa
    assert torch.equal(ops.gemm_w4a16(x, w, scale), expected)


# ---- the state of the matrix unit ----------------------------------------------------------------


def products(seed: int = 0) -> list[Tensor]:
    """Products that configure a matrix unit differently, one after the other."""
    out = []
    for op, m, k in (
        ("gemm_w4a4", 40, 200),
        ("gemm_w4a8", 9, 130),
        ("gemm_w8a8", 17, 65),
        ("gemm_w4a8", 1, 64),
    ):
        out.append(call(op, integer_inputs(op, m, 70, k, asymmetric=True, seed=seed)))
    for m in (1, 5, 16, 40):
        x, codes, scale, bias = float_inputs(m, 50, 256, 2, 4, torch.bfloat16)
        out.append(ops.gemm_w4a16(x, packing.pack(codes, 4), scale, bias=bias))
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_amx
def test_instruction_sets_take_turns() -> None:
    try:
        library.cpu_isa("portable")
        expected = products()
        for isa in ("amx", "avx512", "amx", "amx", "avx2", "amx", "portable", "amx"):
            assert library.cpu_isa(isa) == isa
            assert same(products(), expected)
    finally:
        library.cpu_isa("amx")


@needs_amx
def test_other_users_of_the_matrix_unit() -> None:
    # torch multiplies with it too, and leaves its own configuration behind.
    expected = products()
    for _ in range(3):
        wide = torch.randn(64, 128).bfloat16()
        before = wide @ wide.T
        assert same(products(), expected)
        assert torch.equal(wide @ wide.T, before)


@needs_amx
def test_threads_have_their_own_matrix_unit() -> None:
    expected = [products(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, wanted in zip(pool.map(products, range(4)), expected, strict=True):
                assert same(got, wanted)


def _products_in_child(expected: list[Tensor]) -> None:
    torch.set_num_threads(1)
    sys.exit(0 if same(products(), expected) else 1)


@needs_amx
def test_after_a_fork() -> None:
    expected = products()
    child = multiprocessing.get_context("fork").Process(
        target=_products_in_child, args=(expected,), daemon=True
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert same(products(), expected)


# Denies arch_prctl(ARCH_REQ_XCOMP_PERM), by which a process asks for the matrix unit.
_WITHOUT_PERMISSION = """
    import ctypes, struct, sys

    program = b"".join(
        struct.pack("HBBI", *step)
        for step in (
            (0x20, 0, 0, 0),  # the system call
            (0x15, 0, 3, 158),
            (0x20, 0, 0, 16),  # its first argument
            (0x15, 0, 1, 0x1023),
            (0x06, 0, 0, 0x00050001),  # EPERM
            (0x06, 0, 0, 0x7FFF0000),  # allowed
        )
    )
    steps = ctypes.create_string_buffer(program, len(program))
    filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 6, ctypes.addressof(steps)))
    libc = ctypes.CDLL(None)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0):
        sys.exit(77)

    import torch
    from flatquant_cuda import library, ops, packing

    assert library.cpu_isa() == "avx512", library.cpu_isa()
    assert library.cpu_isa("amx") == "avx512"
    codes = torch.ones(40, 64, dtype=torch.int64)
    packed, scale = packing.pack_nibbles(codes), torch.ones(40)
    assert (ops.gemm_w4a4(packed, scale, packed, scale) == 64).all()
"""


@needs_amx
@pytest.mark.skipif(ctypes.sizeof(ctypes.c_void_p) != 8, reason="64-bit structures")
def test_without_permission_avx512_does_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WITHOUT_PERMISSION)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 77:
        pytest.skip("this process may not filter system calls")
    assert done.returncode == 0, done.stderr
