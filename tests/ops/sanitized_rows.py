"""Runs rows in a process of its own: ``python -m tests.ops.sanitized_rows [options]``.

For libraries and memory that may end the process (sanitizers, guarded pages). Writes the row that
is about to run into the file ``--progress``, and prints how many have run.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatquant_cuda import head as native_head
from flatquant_cuda import library, ops
from flatquant_cuda.decoder import Sizes

from .cases import Case, every_case
from .test_decoder import SIZES, WIDTHS, check

MODES = {"off": 0, "end": 1, "begin": 2}  # of guarded_pages.cpp
FUSED: dict[str, Any] = {"symmetric": False, "bias": torch.bfloat16, "residual": True}


def edges(every: bool) -> Iterator[Case]:
    """Sizes beside those of registers, tiles and bytes: all of them, or a few."""
    ks = (1, 2, 3, 7, 31, 63, 64, 65, 127, 129, 255, 257, 1023) if every else (1, 2, 65, 257)
    ns = (1, 2, 3, 15, 16, 17, 31, 33, 47, 65) if every else (1, 17, 33)
    ms = (1, 2, 3, 5, 16, 17, 33, 65) if every else (1, 3, 33)
    for k in ks:
        for n in ns:
            for m in ms:
                for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8"):
                    yield Case(op, ((m,), n, k), {} if (m + n) % 2 else FUSED)
                bits = 2 + (m + n + k) % 3
                groups = next(g for g in (7, 4, 3, 1) if k % g == 0)
                yield Case("gemm_w4a16", ((m,), n, k, groups), {"bits": bits})
    for d in (64, 80, 96, 128, 256):
        widths = range(2, 9) if every else (2, 4, 7)
        for bits in widths:
            sizes: dict[str, Any] = {"bits": bits, "capacity": 3}
            yield Case("kv_quantize_append", (1, 2, 2, d), {**sizes, "start": 1, "clip": True})
            yield Case("kv_quantize_append", (1, 1, 3, d), {**sizes, "transform": True})
            yield Case("kv_dequantize", (1, 2, 3, d), {"bits": bits})
        lengths = (1, 2, 15, 16, 17, 33, 65, 130, 257) if every else (1, 17, 65)
        for length in lengths:
            for tq in (1, 2, 5, 33) if every else (1, 5):
                k_bits, v_bits = ((4, 4), (2, 8), (3, 5), (8, 2))[(length + tq) % 4]
                kinds = ("causal", "additive", None) if tq <= length else ("additive",)
                options = {"k_bits": k_bits, "v_bits": v_bits, "mask": kinds[length % len(kinds)]}
                yield Case("attention_decode", (1, 4, 2, tq, d, length), options)
        # so long that threads share the chunks of a head
        options = {"k_bits": 4, "v_bits": 4, "mask": "causal"}
        yield Case("attention_decode", (1, 2, 1, 1, d, 1100), options)
    for k in ks:
        yield Case("quantize_activation", (3, k), {"symmetric": False})
        yield Case("kronecker_quantize", (2, 3, k), {"gate": True, "rms_eps": 1e-5, "clip": True})
        yield Case("kronecker", (2, k, 1) if k < 300 else (1, 1, k), {"channel_scale": True})


def rows(every: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names of rows, and what runs one."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    table = every_case()
    beside = list(edges(every))
    table += [(case, dtypes[i % 3]) for i, case in enumerate(beside)]
    for case, dtype in table:
        yield f"{case.id}-{dtype}".replace("torch.", ""), lambda c=case, t=dtype: call(c, t)
    some = WIDTHS if every else WIDTHS[:2] + WIDTHS[4:6]
    heads = [{"heads": 2, "kv_heads": 1, "head_dim": d} for d in (64, 80, 96, 128, 256)]
    for widths in (*some, *(heads if every else heads[1:3])):
        sizes = dataclasses.replace(SIZES, **widths)
        for dtype in dtypes if every else dtypes[1:2]:
            yield f"decoder_stack-{widths}-{dtype}", lambda s=sizes, t=dtype: decode(s, t)
    for m, n, k in product((1, 4), (1, 16, 33), (1, 31, 32, 97)):
        yield f"head-{m}x{n}x{k}", lambda shape=(m, n, k): run_head(*shape)


def run_head(m: int, n: int, k: int) -> None:
    """Run the output head on tensors of their own."""
    with guarded():
        x, w = (torch.randn(rows, k).bfloat16() for rows in (m, n))
        out = native_head.head(x, w, torch.randn(n).bfloat16())
    assert bool(out.isfinite().all())


def decode(sizes: Sizes, dtype: torch.dtype) -> None:
    """Run a stack of layers, and the single ops to compare it with."""
    with guarded():
        check(sizes, dtype)


def call(case: Case, dtype: torch.dtype) -> None:
    """Run a case on tensors of their own."""
    made = case.call(dtype)
    with guarded():
        made.map(Tensor.clone).run(getattr(ops, case.op))


_mode = MODES["off"]


@contextmanager
def guarded() -> Iterator[None]:
    """Tensors that are made now lie between guards, if guarded_pages.cpp was preloaded."""
    if _mode == MODES["off"]:
        yield
        return
    pages = ctypes.CDLL(None).guarded_pages
    pages(_mode)
    try:
        yield
    finally:
        pages(MODES["off"])


def main() -> None:
    """Run it."""
    global _mode
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--every", action="store_true", help="all sizes, not a few")
    parser.add_argument("--rows", default="", help="regular expression of row names")
    parser.add_argument("--isas", default=",".join(library.ISAS), help="separated by commas")
    parser.add_argument("--thin", type=int, default=1, help="on one of so many instruction sets")
    parser.add_argument("--pages", default="off", help=f"of {', '.join(MODES)}, with commas")
    options = parser.parse_args()
    wanted = [(n, f) for n, f in rows(options.every) if re.search(options.rows, n)]
    isas = [isa for isa in options.isas.split(",") if library.cpu_isa(isa) == isa]
    count = 0
    with options.progress.open("wb", buffering=0) as progress:
        for side, (i, isa) in product(options.pages.split(","), enumerate(isas)):
            _mode = MODES[side]
            library.cpu_isa(isa)
            for name, run in wanted[i % options.thin :: options.thin]:
                progress.seek(0)
                progress.write(f"{isa} {name} {side}\n".encode())
                run()
                count += 1
    print(f"{count} rows ran")


if __name__ == "__main__":
    main()
