"""Compare CUDA kernels with the reference on the rows of the case table, on the current GPU.

    python bench/gpu_cases.py [--op NAME ...] [--small]

Needs neither pytest nor the introspection module, so that it also runs under compute-sanitizer
(--small: a few rows of every op). Records, for every CUDA source, how many settings that reach it
agreed: docs/results.md lists a source without such a line as one that has never run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from record import append, device_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flatquant_cuda import backend, decoder, library, ops, packing, reference  # noqa: E402
from tests.ops.cases import CHECKS, Call, Case, every_case  # noqa: E402

#: The sources of csrc/cuda that answer an op.
SOURCES = {
    "quantize_activation": ("quantize*.cu",),
    "kronecker": ("transform*.cu",),
    "kronecker_quantize": ("transform*.cu",),
    "hadamard": ("hadamard*.cu",),
    "gemm_w4a4": ("gemm.cu", "gemm_mma*.cu", "gemm_stream*.cu", "gemm_s4*.cu"),
    "gemm_w4a8": ("gemm.cu", "gemm_mma*.cu", "gemm_stream*.cu", "gemm_s8s4*.cu", "gemm_mixed*.cu"),
    "gemm_w8a8": ("gemm.cu", "gemm_mma*.cu", "gemm_stream*.cu", "gemm_bytes*.cu"),
    "gemm_w4a16": ("gemm_w4a16*.cu",),
    "kv_quantize_append": ("kv_cache_append.cu",),
    "kv_dequantize": ("kv_cache.cu",),
    "attention_decode": ("attention*.cu",),
    "decoder_stack": ("decoder.cu", "heads.cu"),
}

PRODUCTS = ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8")
SWEPT = 2100  # tokens, to which the boundaries of the planners are looked for

EXTRA = [  # rows that reach the fast kernels, which the small rows of the table do not
    Case("quantize_activation", (40, 4096)),
    Case("quantize_activation", (3, 28672), {"bits": 8}),
    *(
        Case("kronecker_quantize", (rows, n1, n2), options)
        for n1, n2 in ((24, 24), (64, 64), (64, 76), (86, 128), (112, 128), (128, 224), (168, 176))
        for rows in (2, 200)
        for options in ({"rms_eps": 1e-5, "channel_scale": True}, {"gate": True})
    ),
    Case("kronecker_quantize", (50, 32, 128), {"sides": "left", "layout": packing.BYTES}),
    Case("kronecker", (50, 32, 128), {"sides": "left"}),
    Case("hadamard", (9, 1, 8192), {"base": False}),
    Case("hadamard", (9, 28, 512)),
    *(
        Case(op, ((m,), 512, 1024), options)
        for op in PRODUCTS
        for m in (1, 17, 130, 700)
        for options in ({}, {"bias": torch.bfloat16, "residual": True}, {"symmetric": False})
    ),
    *(
        Case(op, ((m,), 1000 + 8 * m, 4096))  # every number of tokens that weights stream past
        for op in PRODUCTS
        for m in range(1, 34)
    ),
    *(Case(op, ((m,), 264, 512)) for op in PRODUCTS for m in range(34, 131)),
    *(
        Case("gemm_w4a16", ((m,), 520 + m, 2048, groups), {"bits": 2 + m % 3})
        for m in (*range(1, 34), 70, 300)
        for groups in (1, 64)
    ),
    *(
        Case("kv_quantize_append", (2, 4, t, d), {"capacity": 1200, "transform": True, "bits": b})
        for t in (1, 1100)
        for d, b in ((64, 4), (80, 2), (96, 3), (128, 4), (256, 8))
    ),
    Case("kv_quantize_append", (4, 8, 300, 128), {"capacity": 16, "blocks": 80}),
    Case("kv_dequantize", (2, 8, 1024, 128), {"length": 1000}),
    Case("kv_dequantize", (4, 2, 64, 128), {"blocks": 9, "lengths": (576, 1, 300, 64)}),
    *(
        Case("attention_decode", (2, group * heads, heads, tq, d, 4096), {"length": 4001, **bits})
        for group, heads, d in ((3, 3, 64), (1, 4, 80), (1, 4, 96), (4, 8, 128), (8, 1, 256))
        for tq in (1, 4)
        for bits in ({}, {"k_bits": 2, "v_bits": 8})
    ),
    *(
        Case(
            "attention_decode",
            (4, 32, 8, tq, 128, 16),
            {"blocks": 300, "lengths": (4700, 256, 257, 1), "window": window},
        )
        for tq, window in ((1, 0), (1, 1000), (16, 0))
    ),
]


def boundaries(op: str) -> list[Case]:
    """Rows on both sides of every number of tokens at which this GPU's planner changes its mind.

    None where the planners' introspection is not built.
    """
    bits = {"gemm_w4a4": (4, 4), "gemm_w4a8": (8, 4), "gemm_w8a8": (8, 8)}
    try:
        planners = import_module("flatquant_cuda._native")
    except ImportError:
        print("gpu_cases: no flatquant_cuda._native: the planners' boundaries are not swept")
        return []
    device = torch.cuda.get_device_properties(0)
    arch = 10 * device.major + device.minor
    near = [gpu for gpu in planners.gpus() if gpu["arch"] == arch]
    if not near or op not in (*bits, "gemm_w4a16"):
        return []
    gpu = near[0] | {"sms": device.multi_processor_count}
    tokens, n, k = list(range(1, SWEPT)), 264, 512
    if op == "gemm_w4a16":
        plans = planners.plan_w4a16(gpu, tokens, n, k)
        fields: tuple[str, ...] = ("kernel", "tokens", "rows", "stages")
    else:
        plans = planners.plan_gemm(gpu, tokens, n, k, a_bits=bits[op][0], w_bits=bits[op][1])
        fields = ("kernel", "tile_m", "tile_n", "tile_k", "stages", "warps", "cluster")
    sides = list(zip(*(plans[field].tolist() for field in fields), strict=True))
    edges = [m for m in range(1, SWEPT - 1) if sides[m] != sides[m - 1]]  # sides[m]: of m + 1
    counts = sorted({count for m in edges for count in (m, m + 1, m + 2)})
    sizes = (n, k, 1) if op == "gemm_w4a16" else (n, k)
    return [Case(op, ((m,), *sizes)) for m in counts]


def sources(op: str) -> list[str]:
    """Names of the CUDA sources that an op's rows run on this GPU."""
    major, _ = torch.cuda.get_device_capability()
    testing_s4 = library.build_info()["build"].get("testing_s4", False)
    found = []
    for pattern in SOURCES[op]:
        for path in sorted((ROOT / "csrc/cuda").glob(pattern)):
            older, hopper = "_sm8x" in path.name, "_sm90" in path.name
            if not (older and major != 8 and not testing_s4) and not (hopper and major != 9):
                found.append(path.name)
    return found


def agrees(call: Call) -> str | None:
    """Why the GPU's answer to a call is wrong, or None."""
    try:
        got = call.map(lambda t: t.cuda()).run(getattr(ops, call.op))
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).split("\n")[0]
    want = call.run(getattr(reference, call.op))
    try:
        CHECKS[call.op](call, tuple(t.cpu() for t in got), want)
    except AssertionError as error:
        return str(error).split("\n")[0] or "differs from the reference"
    return None


def stack_failures() -> tuple[int, int]:
    """How many settings of decoder_stack were compared with its ops one by one, and differ."""
    from tests.ops import test_decoder_cuda as stacks  # needs pytest

    compared, different = 0, 0
    for widths in stacks.SETTINGS:
        for dtype, biases in ((torch.bfloat16, False), (torch.float16, True)):
            sizes = replace(stacks.SIZES, **widths)
            compared += 1
            try:
                reason = stacks.difference(sizes, dtype, 2, biases=biases)
            except RuntimeError as error:
                reason = str(error).split("\n")[0]
            if reason:
                different += 1
                print(
                    f"WRONG: decoder_stack {widths} {dtype} biases={biases}: {reason}", flush=True
                )
    print(f"decoder_stack: {compared - different} of {compared} agree", flush=True)
    return compared, different


def main() -> int:
    """Compare; 1 where there is no GPU or something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = [*library.OPS, "decoder_stack"]
    parser.add_argument("--op", nargs="+", choices=names, default=names)
    parser.add_argument("--small", action="store_true", help="few rows, nothing recorded")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_cases: no GPU", file=sys.stderr)
        return 1
    failures, ran = 0, list[str]()
    for op in options.op:
        if op == "decoder_stack":
            if not options.small and decoder.available("cuda"):
                compared, different = stack_failures()
                failures += different
                append("gpu-cases", f"{op}/settings compared", compared, device=device_name())
                append("gpu-cases", f"{op}/settings that differ", different, device=device_name())
                ran += sources(op)
            continue
        if backend(op, "cuda") != "native":
            continue
        rows = [(case, dtype) for case, dtype in every_case() if case.op == op]
        further = [case for case in EXTRA if case.op == op] + boundaries(op)
        rows += [(case, dtype) for case in further for dtype in case.dtypes[1:]]
        if options.small:
            rows = rows[:: max(1, len(rows) // 12)]
        reasons = [(case, dtype, agrees(case.call(dtype))) for case, dtype in rows]
        bad = [entry for entry in reasons if entry[2]]
        failures += len(bad)
        for case, dtype, reason in bad[:20]:
            print(f"WRONG: {case.id} {dtype}: {reason}", flush=True)
        print(f"{op}: {len(rows) - len(bad)} of {len(rows)} agree", flush=True)
        if not options.small:
            device = device_name()
            append("gpu-cases", f"{op}/settings compared", len(rows), device=device)
            append("gpu-cases", f"{op}/settings that differ", len(bad), device=device)
            ran += sources(op)
    if ran:
        for name in sorted(set(ran)):
            append("gpu-cases", f"csrc/cuda/{name}/has run", 1, device=device_name())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
