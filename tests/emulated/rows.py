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

OPS = (
    "quantize_activation",
    "kronecker",
    "kronecker_quantize",
    "hadamard",
    "gemm_w4a4",
    "gemm_w4a8",
    "gemm_w8a8",
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
PRODUCTS = ((128, 128, 256), (129, 136, 320), (64, 264, 1024), (300, 250, 64))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100, RTX_3090, H100 = GPUS
BYTES = {"layout": packing.BYTES}


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
    for size in (48, 64, 80, 112, 128):
        yield Case("kronecker_quantize", (2, 20, size), {"sides": "right"}), BF16, H100
    for sides in ("left", "right", "none"):  # more than shared memory holds
        yield Case("kronecker_quantize", (1, 168, 176), {"sides": sides}), FP32, RTX_3090
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


MODELS = tuple(Row(*row, few_tokens=True) for rows in (_decoding(), _prefilling()) for row in rows)
EVERY_ROW = TABLE + FURTHER_ROWS + MODELS
