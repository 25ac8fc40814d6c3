"""Time the CUDA ops against their floors and against plain PyTorch, on the current GPU.

    python bench/gpu_ops.py [PART ...] [--seconds-left S]

ceilings: what this card reaches: copy bandwidth, bfloat16 and int8 products of cuBLAS.
transform: transform and quantizer in one launch, over the widths and batches of the FlatQuant
    paper's kernel table (prefill of 2048 tokens and decoding), against unfused PyTorch.
gemm: layers of LLaMA and Qwen models, against cuBLAS bfloat16 and torch's int8 product.
decode: layers past 1 to 32 tokens, 4-bit weights with 4-, 8- and 16-bit activations, against cuBLAS
    bfloat16, torch's int8 product and, where it is installed, Humming.
attention: appending to a 4-bit cache and attending to it, one token per sequence, against SDPA over
    a bfloat16 cache of the same sizes.
splits: the paper's figures 5 and 6: every Kronecker split of 4096 channels, and what each online
    transform of a LLaMA-2-7B layer costs.

Each call is compared with the CPU kernels on a few tokens before it is timed; a wrong answer is
printed, counted and not timed. Calls run inside a CUDA graph and take turns over inputs larger than
the L2 cache. Figures go to $OUT/gpu-*.jsonl, or docs/results without $OUT.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Timing, measure_in_graph, rotate
from record import append, device_name
from torch import Tensor

from flatquant.transforms.split import kronecker_split
from flatquant_cuda import activation_layout, backend, ops, packing

DEVICE = "cuda"  # tests run the tables on a CPU, with other sizes
WIDTHS = (4096, 5120, 8192, 11008, 13824, 14336)
BATCHES = (1, 4, 16, 64)
PREFILL = 2048
LAYERS = {  # model and place: out_features, in_features
    "LLaMA-2-7B qkv": (12288, 4096),
    "LLaMA-2-7B o": (4096, 4096),
    "LLaMA-2-7B gate|up": (22016, 4096),
    "LLaMA-2-7B down": (4096, 11008),
    "LLaMA-3-8B qkv": (6144, 4096),
    "LLaMA-3-8B gate|up": (28672, 4096),
    "LLaMA-3-8B down": (4096, 14336),
    "Qwen2.5-7B qkv": (4608, 3584),
    "Qwen2.5-7B gate|up": (37888, 3584),
    "Qwen2.5-7B down": (3584, 18944),
    "8192x8192": (8192, 8192),
}
TOKENS = (16, 256, 2048, 8192)
DECODE_SHAPES = ((8192, 8192), (4096, 4096), (11008, 4096), (28672, 8192))  # out, in
DECODE_TOKENS = (1, 16, 4, 32, 8, 2, 24)  # the most telling first

wrong: list[str] = []


class Ceilings:
    """Bytes and operations a second that this card reaches, measured once."""

    def __init__(self) -> None:
        big = [torch.empty(2**28, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
        copies = [(big[0], big[1]), (big[2], big[3])]
        timing = measure_in_graph(lambda a, b: a.copy_(b), copies, calls=8)
        self.bytes = 2 * 2**28 / timing.median
        del big, copies
        n = 8192
        a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
        self.bf16 = 2 * n**3 / measure_in_graph(torch.mm, [(a, b)], calls=4, samples=9).median
        c, d = (torch.randint(-128, 127, (n, n), device=DEVICE).to(torch.int8) for _ in range(2))
        int8 = measure_in_graph(torch._int_mm, [(c, d.t())], calls=4, samples=9)
        self.int8 = 2 * n**3 / int8.median

    def record(self) -> None:
        """Put them on record."""
        figure("gpu-ceilings", "copy, bytes read and written", self.bytes / 1e9, "GB/s")
        figure("gpu-ceilings", "cuBLAS bfloat16, 8192 cubed", self.bf16 / 1e12, "TFLOP/s")
        figure("gpu-ceilings", "torch._int_mm, 8192 cubed", self.int8 / 1e12, "TOP/s")


def figure(topic: str, what: str, value: float, unit: str) -> None:
    """Record a figure of this GPU."""
    append(topic, what, float(f"{value:.4g}"), unit, device=device_name())


def unfused(x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes without a kernel: two products, a maximum, a rounding, a packing."""
    n1, n2 = left.shape[0], right.shape[0]
    y = (left @ x.view(-1, n1, n2) @ right).view(x.shape)
    scale = y.abs().amax(-1, keepdim=True).float() / 7
    codes = torch.round(y / scale).clamp_(-8, 7).to(torch.int8)
    return (codes[:, ::2] & 15) | (codes[:, 1::2] << 4), scale


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], bits: int, layout: int) -> bool:
    """The transform's rule (docs/numerics.md) on a few tokens; one flip more for their number."""
    k = got[0].shape[-1] * (2 if bits <= 4 and layout == packing.PACKED else 1)
    a, b = (
        packing.unpack_activation(codes.cpu(), k, bits, layout, True).int()
        for codes in (got[0], want[0])
    )
    flips = (a - b).abs()
    scales = torch.allclose(got[1].cpu(), want[1], rtol=2.0**-8, atol=0)
    return scales and int(flips.max()) <= 1 and int((flips > 0).sum()) <= 1 + 2e-4 * a.numel()


def transform_arguments(
    tokens: int, width: int, split: tuple[int, int], *, gate: bool = False
) -> Callable[[int], list[Tensor]]:
    """Fresh arguments for one call."""

    def make(index: int) -> list[Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(index)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE, generator=generator)

        x = [normal(tokens, width).bfloat16() for _ in range(1 + gate)]
        return [x[0], *(normal(n, n) / n**0.5 for n in split), *x[1:]]

    return make


def time_transform(
    name: str, tokens: int, width: int, split: tuple[int, int], ceilings: Ceilings, **options: Any
) -> Timing | None:
    """Check, time and record one setting of kronecker_quantize."""
    gate = options.pop("gate", False)
    bits, layout = options.get("bits", 4), options.setdefault("layout", packing.PACKED)

    def call(x: Tensor, left: Tensor, right: Tensor, *gates: Tensor) -> tuple[Tensor, ...]:
        gated = gates[0] if gates else None
        return ops.kronecker_quantize(x, left, right, gate=gated, **options)

    inputs = rotate(transform_arguments(tokens, width, split, gate=gate))
    few = [t[:3] if t.shape[-1] == width and t.dim() == 2 and t.shape[0] == tokens else t
           for t in inputs[0]]  # fmt: skip
    want = call(*(t.cpu() for t in few))
    if not close(call(*few), want, bits, layout):
        wrong.append(name)
        print(f"WRONG: {name}", flush=True)
        return None
    timing = measure_in_graph(call, inputs)
    moved = tokens * ((1 + gate) * 2 * width + (width if layout else width / 2) + 4)
    figure("gpu-transform", f"{name}/time", timing.median * 1e6, "us")
    figure("gpu-transform", f"{name}/p90", timing.p90 * 1e6, "us")
    share = moved / timing.median / ceilings.bytes
    figure("gpu-transform", f"{name}/share of copy bandwidth", share * 100, "%")
    return timing


def transform_table(ceilings: Ceilings, left_s: Callable[[], float]) -> None:
    """The paper's kernel table, prefill and decoding."""
    settings = [(PREFILL, "prefill"), (1, "decode")]
    for batch in BATCHES:
        for width in WIDTHS:
            for length, phase in settings:
                if left_s() < 20:
                    return print("no time left for more of the transform table")
                tokens, split = batch * length, kronecker_split(width)
                name = f"kronecker_quantize/{width} channels/{phase} of {batch}"
                timing = time_transform(name, tokens, width, split, ceilings, rms_eps=1e-5)
                if timing is None or (phase == "prefill" and batch > 16):
                    continue
                make = transform_arguments(tokens, width, split)
                halves = [[t.bfloat16() for t in make(index)] for index in range(3)]
                plain = measure_in_graph(unfused, halves, calls=8)
                ratio = plain.median / timing.median
                figure("gpu-transform", f"{name}/against unfused PyTorch", ratio, "x")


def online_transforms(ceilings: Ceilings) -> None:
    """Every split of 4096 (figure 5), then the transforms of a LLaMA-2-7B layer (figure 6)."""
    for log in range(0, 7):
        split = (2**log, 4096 >> log)
        time_transform(f"split {split[0]}x{split[1]}/2048 tokens", PREFILL, 4096, split, ceilings)
    bytes_wanted = activation_layout(torch.device(DEVICE))
    for name, width, split, options in (
        ("before q/k/v", 4096, (64, 64), {"rms_eps": 1e-5}),
        ("before gate/up", 4096, (64, 64), {"rms_eps": 1e-5}),
        ("before down, with SiLU(gate) x up", 11008, (86, 128), {"gate": True}),
        ("before q/k/v, one byte a code", 4096, (64, 64), {"layout": bytes_wanted}),
    ):
        title = f"LLaMA-2-7B layer, {name}/2048 tokens"
        time_transform(title, PREFILL, width, split, ceilings, **options)


def gemm_table(ceilings: Ceilings, left_s: Callable[[], float]) -> None:
    """Integer GEMMs against cuBLAS bfloat16 and torch's int8 product in the same run."""
    layout = activation_layout(torch.device(DEVICE))
    layers = sorted(LAYERS.items(), key=lambda item: item[0] != "8192x8192")
    for m in sorted(TOKENS, reverse=True):
        for place, (n, k) in layers:
            if left_s() < 15:
                return print("no time left for more of the GEMM table")

            def make(index: int, m: int = m, n: int = n, k: int = k) -> list[Tensor]:
                generator = torch.Generator(DEVICE).manual_seed(index)
                options: dict[str, Any] = {"device": DEVICE, "generator": generator}
                a = torch.randint(-8, 8, (m, k), **options).to(torch.int8)
                w = torch.randint(0, 256, (n, k // 2), **options).to(torch.uint8)
                return [a, torch.rand(m, **options), w, torch.rand(n, **options)]

            inputs = rotate(make, most=8)
            a, w = inputs[0][0], inputs[0][2]
            assert isinstance(a, Tensor) and isinstance(w, Tensor)
            floats = [
                [torch.randn(rows, k, device=DEVICE).bfloat16() for rows in (m, n)] for _ in inputs
            ]
            plain = measure_in_graph(torch.nn.functional.linear, floats, calls=8)
            del floats
            times = {"cuBLAS bfloat16": plain}
            if m > 16:
                wide = packing.unpack_nibbles(w, k).t()
                times["torch._int_mm"] = measure_in_graph(torch._int_mm, [(a, wide)], calls=8)
            for op in ("gemm_w4a4", "gemm_w4a8"):
                nibbles = op == "gemm_w4a4" and layout == packing.PACKED
                if op == "gemm_w4a4" and not nibbles:
                    continue  # the same kernel and the same codes as gemm_w4a8 here
                function = getattr(ops, op)
                given = [[packing.pack_nibbles(i[0]), *i[1:]] if nibbles else i for i in inputs]

                def call(*args: Tensor, function: Any = function) -> Tensor:
                    result: Tensor = function(*args, out_dtype=torch.bfloat16)
                    return result

                first = [t for t in given[0] if isinstance(t, Tensor)]
                rows = [first[0][:5], first[1][:5], first[2], first[3]]
                want = getattr(ops, op)(*(t.cpu() for t in rows), out_dtype=torch.bfloat16)
                name = f"{op}/{place} {k}->{n}/{m} tokens"
                if not torch.equal(call(*first)[:5].cpu(), want):
                    wrong.append(name)
                    print(f"WRONG: {name}", flush=True)
                    continue
                timing = measure_in_graph(call, given, calls=8)
                rate = 2 * m * n * k / timing.median
                figure("gpu-gemm", f"{name}/time", timing.median * 1e6, "us")
                figure("gpu-gemm", f"{name}/rate", rate / 1e12, "TOP/s")
                moved = n * k / 2 + m * k + 2 * m * n
                figure("gpu-gemm", f"{name}/bytes", moved / timing.median / 1e9, "GB/s")
                for baseline, other in times.items():
                    ratio = other.median / timing.median
                    figure("gpu-gemm", f"{name}/against {baseline}", ratio, "x")


def humming_times(n: int, k: int, tokens: int) -> dict[str, Timing]:
    """The same product by the kernels of humming-kernels, where they are installed and run."""
    try:
        from humming.layer import HummingLayer  # type: ignore[import-not-found]
    except ImportError:
        return {}
    times = {}
    for name, config in (("W4A8", {"dtype": "int8"}), ("W4A16", None)):
        try:
            weight = torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE)

            def make(index: int, config: Any = config, weight: Tensor = weight) -> list[Any]:
                layer = HummingLayer(
                    shape_n=n,
                    shape_k=k,
                    weight_config={"dtype": "int4"},
                    input_config=config,
                    torch_dtype=torch.bfloat16,
                ).cuda()
                layer.load_from_unquantized(weight)
                layer.transform()
                x = torch.randn(tokens, k, dtype=torch.bfloat16, device=DEVICE)
                if config is None:
                    return [layer, x, None]
                codes = torch.randint(-127, 128, (tokens, k), device=DEVICE).to(torch.int8)
                return [layer, codes, torch.rand(tokens, 1, device=DEVICE)]

            def call(layer: Any, x: Tensor, scale: Tensor | None) -> Tensor:
                result: Tensor = layer(x, input_scale=scale)
                return result

            count = min(64, -(-3 * 64 * 2**20 // (n * k // 2)))  # layers: past the caches
            inputs = [make(index) for index in range(count)]
            times[f"Humming {name}"] = measure_in_graph(call, inputs, calls=16)
        except Exception as error:  # a contestant that fails is no reason to stop
            print(f"humming {name} {k}->{n}: {str(error).splitlines()[:1]}", flush=True)
    return times


def decode_inputs(op: str, m: int, n: int, k: int) -> Callable[[int], list[Tensor]]:
    """Fresh arguments of a product with 4-bit weights."""

    def make(index: int) -> list[Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(index)
        options: dict[str, Any] = {"device": DEVICE, "generator": generator}
        w = torch.randint(0, 256, (n, k // 2), **options).to(torch.uint8)
        if op == "gemm_w4a16":
            x = torch.randn(m, k, **options).bfloat16()
            return [x, w, torch.rand(n, k // 128, **options)]
        codes = torch.randint(-8, 8, (m, k), **options).to(torch.int8)
        a = packing.pack_nibbles(codes) if op == "gemm_w4a4" else codes
        return [a, torch.rand(m, **options), w, torch.rand(n, **options)]

    return make


def decode_answers(op: str, inputs: list[Tensor]) -> bool:
    """Whether the first tokens' answers are right: bit for bit, or those of the float product."""
    rows = [t[:2] if i < (1 if op == "gemm_w4a16" else 2) else t for i, t in enumerate(inputs)]
    function = getattr(ops, op)
    if op != "gemm_w4a16":
        got = function(*inputs, out_dtype=torch.bfloat16)[:2].cpu()
        want = function(*(t.cpu() for t in rows), out_dtype=torch.bfloat16)
        return torch.equal(got, want)
    want = function(*(t.cpu() for t in rows)).float()
    got = function(*inputs)[:2].cpu().float()
    return bool(((got - want).abs() <= 2.0**-7 * want.abs() + 2.0**-8 * want.abs().max()).all())


def decode_table(ceilings: Ceilings, left_s: Callable[[], float]) -> None:
    """Few tokens: weights, rotated past the L2 cache, against the copy bandwidth of this card."""
    for m in DECODE_TOKENS:
        for n, k in DECODE_SHAPES:
            if left_s() < 15:
                return print("no time left for more of the decode table")
            floats = [[torch.randn(rows, k, device=DEVICE).bfloat16() for rows in (m, n)]]
            while len(floats) * n * k * 2 < 3 * 64 * 2**20:
                floats.append([t.clone() for t in floats[0]])
            plain = measure_in_graph(torch.nn.functional.linear, floats, calls=16)
            del floats
            times = {"cuBLAS bfloat16": plain}
            if m > 16:  # torch's rule for its int8 product
                make = decode_inputs("gemm_w4a8", m, n, k)
                bytes_ = [
                    (a, packing.unpack_nibbles(w, k).t()) for a, _, w, _ in map(make, range(4))
                ]
                times["torch._int_mm"] = measure_in_graph(torch._int_mm, bytes_, calls=16)
                del bytes_
            if m in (1, 16):
                times |= humming_times(n, k, m)
            for op in ("gemm_w4a8", "gemm_w4a4", "gemm_w4a16"):
                if backend(op, DEVICE) != "native":
                    continue
                name = f"decode {op}/{k}->{n}/{m} tokens"
                inputs = rotate(decode_inputs(op, m, n, k))
                if not decode_answers(op, list(inputs[0])):
                    wrong.append(name)
                    print(f"WRONG: {name}", flush=True)
                    continue
                timing = measure_in_graph(getattr(ops, op), inputs, calls=16)
                moved = sum(t.numel() * t.element_size() for t in inputs[0]) + 2 * m * n
                share = moved / timing.median / ceilings.bytes
                figure("gpu-decode", f"{name}/time", timing.median * 1e6, "us")
                figure("gpu-decode", f"{name}/share of copy bandwidth", share * 100, "%")
                for baseline, other in times.items():
                    ratio = other.median / timing.median
                    figure("gpu-decode", f"{name}/against {baseline}", ratio, "x")


#: Decoding: batch, query heads, heads of the cache, positions; head_dim 128.
CONTEXTS = (
    *((1, 32, 8, length) for length in (4096, 32768, 131072)),
    *((1, 32, 32, length) for length in (4096, 32768)),
    (16, 32, 8, 4096),
    (16, 32, 32, 4096),
)


def cache_side(
    batch: int, heads: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of 4 bits, head_dim 128."""
    options: dict[str, Any] = {"device": DEVICE, "generator": generator}
    codes = torch.randint(0, 256, (batch, heads, length, 64), dtype=torch.uint8, **options)
    scale = torch.rand(batch, heads, length, **options) * 0.2 + 0.01
    return codes, scale, torch.randint(0, 16, scale.shape, dtype=torch.uint8, **options)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What PyTorch has for it."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def attention_table(ceilings: Ceilings, left_s: Callable[[], float]) -> None:
    """Append and attend, against SDPA over bfloat16 in the same run."""
    for batch, heads, kv_heads, length in CONTEXTS:
        if left_s() < 15:
            return print("no time left for more of the attention table")
        name = f"{heads}/{kv_heads} heads of 128/{length} positions/batch {batch}"

        def make(
            index: int, batch: int = batch, heads: int = heads, n: int = kv_heads, t: int = length
        ) -> list[Tensor]:
            generator = torch.Generator(DEVICE).manual_seed(index)
            sides = [*cache_side(batch, n, t, generator), *cache_side(batch, n, t, generator)]
            x = torch.randn(3, batch, heads, 128, device=DEVICE, generator=generator).bfloat16()
            new = [side[:, :n, None].contiguous() for side in x[1:]]
            matrix = torch.randn(128, 128, device=DEVICE, generator=generator).bfloat16() / 11
            slots = torch.arange(batch, device=DEVICE)[:, None] * t + t - 1
            lengths = torch.full((batch,), t, dtype=torch.int32, device=DEVICE)
            return [x[0, :, :, None].contiguous(), *sides, *new, matrix, slots, lengths]

        def attend(*a: Tensor) -> Tensor:
            return ops.attention_decode(*a[:7], lengths=a[11])

        def append(*a: Tensor) -> None:
            ops.kv_quantize_append(a[7], *a[1:4], transform=a[9], slots=a[10])
            ops.kv_quantize_append(a[8], *a[4:7], slots=a[10])

        def step(*a: Tensor) -> Tensor:
            append(*a)
            return attend(*a)

        inputs = rotate(make, most=32)
        first = [t for t in inputs[0] if isinstance(t, Tensor)]
        few = [first[0][:1], *(t[:1].clone() for t in first[1:9]), first[9]]
        few += [first[10][:1], first[11][:1]]
        on_cpu = [t.cpu() for t in few]
        got, want = step(*few), step(*on_cpu)
        codes_agree = torch.equal(few[4].cpu(), on_cpu[4])
        if not codes_agree or (got.cpu().float() - want.float()).abs().max() > 2e-2:
            wrong.append(name)
            print(f"WRONG: {name}", flush=True)
            continue
        times = {
            part: measure_in_graph(call, inputs, calls=8)
            for part, call in (("attend", attend), ("append", append), ("append, attend", step))
        }
        del inputs, first, few

        def dense(
            index: int, batch: int = batch, heads: int = heads, n: int = kv_heads, t: int = length
        ) -> list[Tensor]:
            generator = torch.Generator(DEVICE).manual_seed(index)
            options: dict[str, Any] = {"device": DEVICE, "generator": generator}
            cache = [torch.randn(batch, n, t, 128, **options).bfloat16() for _ in range(2)]
            return [torch.randn(batch, heads, 1, 128, **options).bfloat16(), *cache]

        plain = measure_in_graph(dense_attention, rotate(dense, most=8), calls=8)
        for part, timing in times.items():
            figure("gpu-attention", f"{part}/{name}/time", timing.median * 1e6, "us")
        figure("gpu-attention", f"SDPA bfloat16/{name}/time", plain.median * 1e6, "us")
        both = times["append, attend"].median
        figure("gpu-attention", f"append, attend/{name}/against SDPA", plain.median / both, "x")
        moved = batch * kv_heads * length * 138
        share = moved / times["attend"].median / ceilings.bytes
        figure("gpu-attention", f"attend/{name}/share of copy bandwidth", share * 100, "%")


def main() -> int:
    """Run the parts that are asked for; 1 without a GPU or after a wrong answer."""
    parts = ("ceilings", "attention", "transform", "gemm", "decode", "splits")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; none given: all")
    parser.add_argument("--seconds-left", type=float, default=1e9, help="stop in time")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown parts {sorted(unknown)}: they must be of {', '.join(parts)}")
    options.parts = options.parts or list(parts)
    end = time.monotonic() + options.seconds_left
    if not torch.cuda.is_available() or backend("kronecker_quantize", "cuda") != "native":
        print("gpu_ops: no GPU, or no CUDA kernel (see python -m flatquant_cuda)", file=sys.stderr)
        return 1
    ceilings = Ceilings()
    if "ceilings" in options.parts:
        ceilings.record()

    def left_s() -> float:
        return end - time.monotonic()

    if "decode" in options.parts:
        decode_table(ceilings, left_s)
    if "attention" in options.parts:
        attention_table(ceilings, left_s)
    if "gemm" in options.parts:
        gemm_table(ceilings, left_s)
    if "transform" in options.parts:
        transform_table(ceilings, left_s)
    if "splits" in options.parts and left_s() > 20:
        online_transforms(ceilings)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
