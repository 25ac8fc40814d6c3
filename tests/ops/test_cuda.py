"""What only a GPU can show: streams, graphs, real sizes, batch invariance. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant.transforms.split import kronecker_split
from flatquant_cuda import library, ops, packing

from .cases import CASES, CHECKS, Call, Case, every_case, first_case
from .test_gemm import integer_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

#: Channel counts of real models: hidden sizes and MLP widths.
WIDTHS = (576, 896, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 5120, 8192, 8960)
WIDTHS += (11008, 13824, 14336, 18944, 28672, 29568)
HALVES = (torch.bfloat16, torch.float16)
CUDA_OPS = tuple(op for op in library.OPS if library.backend(op, "cuda") == "native")


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Bit for bit, and a NaN equals a NaN."""
    return all(
        g.dtype == w.dtype and torch.equal(g.cpu().nan_to_num(-9e9), w.cpu().nan_to_num(-9e9))
        if g.is_floating_point()
        else torch.equal(g.cpu(), w.cpu())
        for g, w in zip(got, want, strict=True)
    )


def on_gpu(call: Call) -> tuple[Tensor, ...]:
    """The answer of the CUDA kernels."""
    return call.map(Tensor.cuda).run(getattr(ops, call.op))


def transform_options() -> Iterator[dict[str, Any]]:
    """What a decoder layer asks of the transform."""
    yield {"rms_eps": 1e-5, "channel_scale": True}
    yield {"gate": True, "bits": 8}
    yield {"clip": True, "symmetric": False}
    yield {"layout": packing.BYTES, "clip": True}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", WIDTHS)
def test_transform_of_real_widths(width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 3):
        for options in transform_options():
            call = Case("kronecker_quantize", (tokens, *kronecker_split(width)), options).call(
                dtype
            )
            got = tuple(t.cpu() for t in on_gpu(call))
            CHECKS[call.op](call, got, call.run(ops.kronecker_quantize))


@pytest.mark.parametrize("heads", [9, 14, 15, 16, 24, 28, 32, 40, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_transform_over_heads(heads: int, head_dim: int) -> None:
    for op in ("kronecker", "kronecker_quantize"):
        call = Case(op, (5, heads, head_dim), {"sides": "left"}).call(torch.bfloat16)
        got = tuple(t.cpu() for t in on_gpu(call))
        CHECKS[op](call, got, call.run(getattr(ops, op)))


@pytest.mark.parametrize("width", [576, 4096, 11008, 14336])
def test_a_token_does_not_depend_on_its_batch(width: int) -> None:
    """Neither on how many blocks share it, nor on the tokens beside it."""
    case = Case("kronecker_quantize", (600, *kronecker_split(width)), {"rms_eps": 1e-5})
    call = case.call(torch.bfloat16)
    whole = on_gpu(call)
    for first, last in ((0, 1), (1, 4), (100, 117), (470, 600)):
        part = Call(call.op, (call.args[0][first:last], *call.args[1:]), call.kwargs)
        assert same(on_gpu(part)[:2], tuple(t[first:last] for t in whole[:2]))


@pytest.mark.parametrize("op", ["gemm_w4a4", "gemm_w4a8", "gemm_w8a8"])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_of_every_small_batch(op: str, dtype: torch.dtype) -> None:
    """No answer depends on the tile: all M to 130, and around the larger boundaries."""
    for n, k in ((136, 160), (1000, 576), (64, 4864)):
        inputs = integer_inputs(op, 1030, n, k)
        bias, residual = torch.randn(n), torch.randn(1030, n).to(dtype)
        options = {"bias": bias, "out_dtype": dtype}
        call = Call(op, (inputs["a"], inputs["a_scale"], inputs["w"], inputs["w_scale"]), options)
        whole = call.run(getattr(ops, op))[0]
        plus = (residual.float() + whole.float()).to(dtype)
        moved = call.map(Tensor.cuda)
        for m in (*range(1, 131), 191, 192, 193, 255, 256, 257, 511, 513, 1023, 1025, 1030):
            args = (moved.args[0][:m], moved.args[1][:m], *moved.args[2:])
            got = Call(op, args, moved.kwargs).run(getattr(ops, op))
            assert torch.equal(got[0].cpu(), whole[:m]), f"m={m}"
            if m % 7 == 0:
                kwargs = {**moved.kwargs, "residual": residual[:m].cuda()}
                got = Call(op, args, kwargs).run(getattr(ops, op))
                assert torch.equal(got[0].cpu(), plus[:m]), f"m={m} with a residual"


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (4608, 3584)])
@pytest.mark.parametrize("op", ["gemm_w4a4", "gemm_w4a8"])
def test_products_of_real_layers(op: str, shape: tuple[int, int]) -> None:
    for m in (1, 17, 300):
        inputs = integer_inputs(op, m, *shape)
        args = (inputs["a"], inputs["a_scale"], inputs["w"], inputs["w_scale"])
        call = Call(op, args, {"out_dtype": torch.bfloat16})
        assert same(on_gpu(call), call.run(getattr(ops, op)))


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_inputs(offset: int) -> None:
    for case, dtype in every_case():
        if case.op not in CUDA_OPS:
            continue
        plain = case.call(dtype, "cuda")

        def shifted(t: Tensor) -> Tensor:
            buffer = t.new_empty(t.numel() + offset)
            view = buffer[offset:].view(t.shape)
            return view.copy_(t)

        want, got = plain.run(getattr(ops, case.op)), plain.map(shifted).run(getattr(ops, case.op))
        if case.op.startswith("gemm"):
            assert same(got, want), case.id
        else:  # another kernel may answer: another order of additions
            moved = [tuple(t.cpu() for t in answer) for answer in (got, want)]
            CHECKS[case.op](plain.map(Tensor.cpu), *moved)


def big_calls() -> list[Call]:
    """A call of each op that takes the fast kernels."""
    cases = [
        Case("quantize_activation", (64, 4096)),
        Case("kronecker", (64, 64, 64)),
        Case("kronecker_quantize", (64, 64, 64), {"rms_eps": 1e-5}),
        Case("hadamard", (64, 1, 4096), {"base": False}),
        *(Case(op, ((64,), 512, 1024)) for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w8a8")),
        Case("kv_quantize_append", (2, 8, 40, 128), {"capacity": 40, "transform": True}),
        Case("kv_dequantize", (2, 8, 600, 128)),
        Case("attention_decode", (2, 32, 8, 1, 128, 4096), {"lengths": (4000, 77)}),
    ]
    calls = [case.call(torch.bfloat16, "cuda") for case in cases]
    return [call for call in calls if call.op in CUDA_OPS]


def test_current_stream_is_used() -> None:
    """A late input on a side stream must be waited for, and no other stream is touched."""
    for call in big_calls():
        function = getattr(ops, call.op)
        want = call.run(function)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = call.map(lambda t: torch.empty_like(t).copy_(t.clone()))
            torch.cuda._sleep(20_000_000)
            for target, source in zip(late.args, call.args, strict=True):
                if isinstance(target, Tensor):
                    target.zero_().copy_(source)
            got = late.run(function)
        stream.synchronize()
        assert same(got, want), call.op


def test_graphs_replay() -> None:
    for call in big_calls():
        function = getattr(ops, call.op)
        want = call.run(function)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call.run(function)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call.run(function)
        for tensor in got:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert same(got, want), call.op


def test_one_graph_serves_all_lengths() -> None:
    """Captured for the largest; lengths, slots and blocks change on the device."""
    batch, most = 2, 4096
    options = {"blocks": most // 16, "lengths": (1, 1)}
    call = Case("attention_decode", (batch, 32, 8, 1, 128, 16), options).call(HALVES[0], "cuda")
    q, *cache = call.args
    table = torch.arange(batch * most // 16, device="cuda", dtype=torch.int32).view(batch, -1)
    lengths = torch.ones(batch, dtype=torch.int32, device="cuda")
    slots = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    new = torch.randn(batch, 8, 1, 128, device="cuda").to(HALVES[0])

    def step(planned: int) -> Tensor:
        ops.kv_quantize_append(new, *cache[:3], slots=slots)
        ops.kv_quantize_append(new, *cache[3:], slots=slots)
        return ops.attention_decode(
            q, *cache, block_table=table, lengths=lengths, length=planned, window=1000
        )

    step(most)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step(most)
    for used in (1, 16, 255, 256, 257, 1025, 4096):
        lengths.copy_(torch.tensor([used, max(1, used - 3)]))
        slots.copy_((torch.arange(batch, device="cuda") * most + lengths - 1)[:, None])
        graph.replay()
        assert same((answer,), (step(used),)), used


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Nor does appending: both are the same bits in any batch."""
    options = {"capacity": 2100, "transform": True, "clip": True}
    call = Case("kv_quantize_append", (8, 8, 2048, 128), options).call(dtype, "cuda")
    whole = call.run(ops.kv_quantize_append)
    for b in (0, 5):
        one = slice(b, b + 1)
        part = Call(call.op, tuple(t[one, :, :2048].contiguous() for t in call.args), call.kwargs)
        got = part.run(ops.kv_quantize_append)
        assert same(got, tuple(t[one, :, :2048] for t in whole))
        few = Call(call.op, tuple(t[:, :, :1].contiguous() for t in part.args), call.kwargs)
        assert same(few.run(ops.kv_quantize_append), tuple(t[:, :, :1] for t in got))
    call = Case("attention_decode", (64, 32, 8, 1, 128, 2048), {"length": 2000}).call(dtype, "cuda")
    answers = call.run(ops.attention_decode)[0]
    for b in (0, 40):
        part = Call(call.op, tuple(t[b : b + 1] for t in call.args), call.kwargs)
        assert same(part.run(ops.attention_decode), (answers[b : b + 1],))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_append_is_that_of_the_cpu(d: int, bits: int) -> None:
    for dtype in (*HALVES, torch.float32):
        for t in (1, 3000):
            options = {"capacity": t, "transform": True, "bits": bits}
            call = Case("kv_quantize_append", (1, 3, t, d), options).call(dtype)
            assert same(on_gpu(call), call.run(ops.kv_quantize_append))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_another_device_than_the_current_one() -> None:
    for call in big_calls():
        there = call.map(lambda t: t.to("cuda:1")).run(getattr(ops, call.op))
        assert all(t.device.index == 1 for t in there)
        assert same(there, call.run(getattr(ops, call.op)))


@pytest.mark.parametrize("op", CUDA_OPS)
def test_opcheck(op: str) -> None:
    call = first_case(op).call(
        torch.bfloat16 if not op.startswith("fake") else torch.float32, "cuda"
    )
    torch.library.opcheck(getattr(torch.ops.flatquant_cuda, op).default, call.schema_args())


@pytest.mark.parametrize("op", CUDA_OPS)
def test_compiles_without_graph_breaks(op: str) -> None:
    call = first_case(op).call(torch.float32, "cuda")
    function = getattr(ops, op)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert same(call.run(compiled), call.run(function))


def test_every_row_of_the_table_twice() -> None:
    """The same call gives the same bits: no race, no uninitialised memory."""
    for case in CASES:
        if case.op in CUDA_OPS:
            call = case.call(case.dtypes[-1], "cuda")
            function = getattr(ops, case.op)
            assert same(call.run(function), call.run(function)), case.id
