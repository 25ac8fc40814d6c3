"""What the emulated tests compute: rows of the op table and of real models' sizes, per GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flatquant.transforms.split import kronecker_split
from flatquant_cuda import packing, reference
from tests.ops.cases import CASES, CHECKS, Call, Case

from .emulated import GPUS, ORDERS, Emulated
from .stacks import STACKS, StackRow

OPS = (
    "quantize_activation",
    "kronecker",
    "kronecker_quantize",
    "hadamard",
    "gemm_w4a4",
    "gemm_w4a8",
    "gemm_w8a8",
    "gemm_w4a16",
    "kv_quantize_append",
    "kv_dequantize",
    "attention_decode",
    "decoder_stack",
)


@dataclass(frozen=True)
class Row:
    """A case, a dtype, and the GPU whose plan is emulated."""

    case: Case
    dtype: torch.dtype
    gpu: str
    few_tokens: bool = False
    most_blocks: int = 0  # of a launch: kernels must then go on to further rows; 0: any number

    @property
    def id(self) -> str:
        """The row in pytest's output."""
        blocks = f"-{self.most_blocks}blocks" if self.most_blocks else ""
        name = f"{self.case.id}-{self.dtype}-{self.gpu}{blocks}"
        return name.replace("torch.", "").replace(" ", "_")

    def call(self) -> Call:
        """The arguments; in models, factors are float32, and rounded to the dtype by the op."""
        call = self.case.call(self.dtype)
        if self.few_tokens and self.case.op.startswith("kronecker"):
            x, *factors = call.args
            call = Call(
                call.op, (x, *(f if f is None else f.float() for f in factors)), call.kwargs
            )
        return call

    def check(self, emulated: Emulated, *orders: str, shift: int = 0) -> list[list[bytes]]:
        """Compare the emulated answers with the reference; returns their bytes."""
        call = self.call()
        want = call.run(getattr(reference, self.case.op))
        answers = []
        for order in orders or ORDERS[:1]:
            emulated.choose(self.gpu, order, shift=shift, most_blocks=self.most_blocks)
            got = emulated.run(call)
            if self.few_tokens and self.case.op == "kronecker_quantize":
                emulated.differences[self.id] = codes_that_differ(call, got, want)
            else:
                CHECKS[self.case.op](call, got, want)
            answers.append(bytes_of(got))
        emulated.checked.add(self.id)
        return answers


def codes_that_differ(
    call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]
) -> tuple[int, int]:
    """Check a call of few tokens: codes differ by at most 1, scales within the contract's bound.

    One rounding of the gated input that goes the other way moves a dozen codes of its token, so
    that the contract's rate holds over many tokens only. Returns how many codes differ, of how many
    (8 bits: of ten times as many as there are, because ten times as many may).
    """
    x, bits = call.args[0], call.kwargs.get("bits", 4)
    codes = []
    for stored, _, zero in (got, want):
        packed = bits <= 4 and call.kwargs.get("layout", packing.PACKED) == packing.PACKED
        signed = not zero.numel()
        plain = packing.unpack_nibbles(stored, x.shape[-1], signed=signed) if packed else stored
        codes.append(plain.int() if signed else plain.int() - zero[..., None])
    difference = (codes[0] - codes[1]).abs()
    count = int((difference > 0).sum())
    assert difference.max() <= 1 and count <= max(16, 1e-3 * difference.numel())
    torch.testing.assert_close(got[1], want[1], rtol=2.0**-8, atol=0)
    return count, difference.numel() * (1 if bits <= 4 else 10)


def bytes_of(tensors: tuple[Tensor, ...]) -> list[bytes]:
    """For comparisons that a NaN does not disturb."""
    return [t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors]


# Every row of the op table, on the GPU with the most kernels to choose from.
TABLE = tuple(
    Row(case, dtype, GPUS[-1]) for case in CASES if case.op in OPS for dtype in case.dtypes
)

# More rows than blocks, as if there were millions: a grid cannot have as many.
FURTHER_ROWS = tuple(
    Row(case, dtype, GPUS[-1], most_blocks=2)
    for case in (
        Case("quantize_activation", (7, 577), {"symmetric": False}),
        Case("quantize_activation", (7, 1536)),
        Case("quantize_activation", (300, 64)),  # a warp per row
        Case("hadamard", (5, 1, 1024), {"base": False}),
        Case("hadamard", (5, 3, 4)),
        Case("hadamard", (5, 12, 64)),
        Case("kronecker", (7, 5, 7)),
        Case("kronecker_quantize", (7, 5, 7), {"rms_eps": 1e-5}),
    )
    for dtype in case.dtypes
)

# Channels of real models, from SmolLM2 135M to Qwen2.5 72B; and (heads, head_dim) before o_proj.
# fmt: off
SIZES = (576, 896, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 5120, 8192, 8960, 11008, 13824, 14336,
         18944, 28672, 29568)
# fmt: on
HEADS = ((9, 64), (14, 64), (12, 128), (16, 128), (28, 128), (32, 128), (40, 128), (64, 128))
# (base, power) with base * power a size of such a model.
HADAMARDS = ((1, 4096), (1, 16384), (28, 512), (172, 64), (148, 128), (20, 256), (7, 4096))
# Queries per key, keys and values, head_dim: SmolLM2, Phi-2, Phi-3, Llama-3, Qwen2.5, Gemma.
CACHES = ((3, 2, 64), (1, 2, 80), (1, 3, 96), (4, 2, 128), (7, 1, 128), (8, 1, 256))
PRODUCTS = ((128, 128, 256), (129, 136, 320), (64, 264, 1024), (300, 250, 64))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100, RTX_3090, H100 = GPUS
BYTES = {"layout": packing.BYTES}


def _cached() -> Iterator[tuple[Case, torch.dtype, str]]:
    """A token or a few against a packed cache; lengths around the kernels' chunks of 256."""
    append, read, attend = "kv_quantize_append", "kv_dequantize", "attention_decode"
    for i, (group, heads, d) in enumerate(CACHES):
        gpu, dtype = GPUS[i % 3], (BF16, FP16)[i % 2]
        bits = {"k_bits": (4, 3, 2)[i % 3], "v_bits": (4, 4, 8)[i % 3]}
        options = {"transform": True, "clip": True, "capacity": 4, "halves": i % 2 == 0}
        yield Case(append, (2, heads, 2, d), {**options, "bits": 4}), dtype, gpu
        yield Case(append, (1, 2, 40, d), {"capacity": 16, "blocks": 3}), dtype, gpu
        yield Case(append, (1, 2, 70, d), {**options, "capacity": 70}), dtype, f"{gpu}/1"
        yield Case(read, (1, heads, 64, d), {"length": 61}), dtype, gpu
        for length in (255, 256, 257, 511 + i):
            sizes = (1, group * heads, heads, 1 + length % 2, d, 528)
            yield Case(attend, sizes, {"length": length, **bits}), dtype, f"{gpu}/{1 + i}"
        paged = {"blocks": 20, "lengths": (257, 300), "window": 100 * i}
        yield Case(attend, (2, group * heads, heads, 1 + i, d, 16), {**paged, **bits}), dtype, gpu
    yield Case(attend, (1, 8, 2, 16, 64, 64), {"mask": "causal"}), BF16, H100
    yield Case(attend, (1, 2, 1, 1, 256, 320), {"k_bits": 8, "v_bits": 8}), BF16, RTX_3090
    yield Case(attend, (1, 2, 1, 1, 256, 320), {"k_bits": 2, "v_bits": 2}), FP16, H100
    yield Case(attend, (1, 2, 1, 1, 264, 32)), BF16, H100  # larger than tensor cores take


def _decoding() -> Iterator[tuple[Case, torch.dtype, str]]:
    """One or two tokens: what the inputs of attention, MLP and down_proj are put through."""
    for n in SIZES:
        op, split = "kronecker_quantize", kronecker_split(n)
        yield Case(op, (2, *split), {"rms_eps": 1e-5}), BF16, A100
        yield Case(op, (1, *split), {"gate": True, "symmetric": False}), FP16, A100
        yield Case(op, (1, *split), {"channel_scale": True, "rms_eps": 1e-6}), BF16, RTX_3090
        yield Case(op, (2, *split), {"gate": True, "clip": True}), FP16, RTX_3090
        yield Case(op, (1, *split), {"rms_eps": 1e-5, "clip": True, **BYTES}), BF16, H100
        yield Case(op, (2, *split), {"gate": True, **BYTES}), BF16, H100
        yield Case(op, (1, *split), {"bits": 8}), FP16, H100
        yield Case("kronecker", (1, *split)), BF16, H100
        yield Case("kronecker", (1, *split), {"out_dtype": FP32}), FP16, A100
        yield Case("kronecker", (1, *split)), FP32, RTX_3090
        yield Case(op, (1, *split), {"rms_eps": 1e-5}), FP32, RTX_3090
        yield Case("quantize_activation", (2, n)), BF16, H100
        yield Case("gemm_w4a4", ((1,), 24, n)), BF16, A100
        yield Case("gemm_w4a8", ((2,), 24, n)), BF16, H100
        yield Case("gemm_w8a8", ((3,), 24, n), {"symmetric": False}), FP16, RTX_3090
        yield Case("gemm_w4a16", ((2,), 24, n, 1)), BF16, A100
    for size in (48, 64, 80, 112, 128):
        yield Case("kronecker_quantize", (2, 20, size), {"sides": "right"}), BF16, H100
    for sides in ("left", "right", "none"):  # more than shared memory holds
        yield Case("kronecker_quantize", (1, 168, 176), {"sides": sides}), FP32, RTX_3090
    yield from _cached()
    for heads, size in HEADS:
        for gpu, dtype in zip(GPUS, (BF16, FP16, BF16), strict=True):
            yield Case("kronecker_quantize", (2, heads, size), {"sides": "left"}), dtype, gpu
    for base, power in HADAMARDS:
        yield Case("hadamard", (1, base, power), {"base": base > 1}), BF16, H100
        yield Case("hadamard", (2, base, power), {"base": base > 1}), FP16, RTX_3090


def _prefilling() -> Iterator[tuple[Case, torch.dtype, str]]:
    """The plans for many tokens, by GPUs with one multiprocessor."""
    for n in SIZES:
        op, split = "kronecker_quantize", kronecker_split(n)
        tokens = 13 if n < 4096 else 5
        yield Case(op, (tokens, *split), {"rms_eps": 1e-5}), BF16, f"{A100}/1"
        yield Case(op, (tokens, *split), {"gate": True, "symmetric": False}), FP16, f"{RTX_3090}/1"
        yield Case(op, (tokens, *split), {"channel_scale": True, **BYTES}), BF16, f"{H100}/1"
        yield Case("quantize_activation", (9, n)), FP16, f"{A100}/1"
    yield Case("kronecker_quantize", (13, 40, 128), {"sides": "right"}), BF16, f"{A100}/1"
    for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8"):
        for m, n, k in PRODUCTS:
            fused = {"bias": torch.float32, "residual": True}
            yield Case(op, ((m,), n, k), fused), BF16, f"{A100}/1"
            yield Case(op, ((m,), n, k), {"symmetric": False}), FP16, f"{H100}/4"
    for base, power in HADAMARDS:
        yield Case("hadamard", (5, base, power), {"base": base > 1}), BF16, f"{A100}/1"


def _streaming() -> Iterator[Row]:
    """Weights past few tokens: every batch, odd sizes, splits over warps and blocks, all widths."""
    fused = {"bias": torch.float32, "residual": True}
    for m in range(1, 34):
        op = ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8")[m % 3]
        gpu, dtype = GPUS[m // 3 % 3], (BF16, FP16, FP32)[m % 2]
        options = (fused, {"symmetric": False}, {})[m // 9 % 3]
        yield Row(Case(op, ((m,), 16 + 3 * m, 64 * (m % 5 + 1)), options), dtype, gpu)
        options = {"bits": 2 + m % 3, "bias": torch.float32}
        case = Case("gemm_w4a16", ((m,), 40 + m, 32 * (m % 7 + 1), 1), options)
        yield Row(case, dtype, f"{gpu}/1" if m % 4 == 0 else gpu)
    for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8"):
        yield Row(Case(op, ((12,), 70, 2048), {"symmetric": False, **fused}), BF16, H100)
        yield Row(Case(op, ((5,), 50, 1088), fused), FP32, A100)
        yield Row(Case(op, ((37,), 33, 640)), FP16, RTX_3090)
    for groups, k in ((1, 1100), (9, 1152), (20, 640), (5, 640), (3, 288), (2, 2048), (1, 70)):
        for m in (3, 11, 20, 66):
            case = Case("gemm_w4a16", ((m,), 133, k, groups), {"bits": 4 - groups % 3})
            yield Row(case, (BF16, FP16)[m % 2], H100 if m < 20 else f"{A100}/1")
        case = Case("gemm_w4a16", ((62,), 127, k, groups), {"bits": 2 + groups % 3})  # large tiles
        yield Row(case, (BF16, FP16)[k % 3 % 2], f"{A100}/1")


STREAMS = tuple(_streaming())
MODELS = tuple(Row(*row, few_tokens=True) for rows in (_decoding(), _prefilling()) for row in rows)
EVERY_ROW: tuple[Row | StackRow, ...] = TABLE + FURTHER_ROWS + STREAMS + MODELS + STACKS
