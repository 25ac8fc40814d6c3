"""Threads: more than rows, other numbers of them, several callers at once; forks after use.

The bits never depend on any of that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from flatquant_cuda import decoder, library, ops
from flatquant_cuda.decoder import DecoderPlan

from .cases import CASES, Case
from .test_decoder import SCALING, SIZES, inputs, make_cache, make_layer
from .test_ops import bits_of

pytestmark = pytest.mark.skipif(not library.loaded, reason="no native library")
needs_decoder = pytest.mark.skipif(not decoder.available(), reason="no native decoder_stack")

# Much work in few rows, so that an op has more threads than rows.
WIDE = {
    case.op: case
    for case in (
        Case("quantize_activation", (2, 99_999)),
        Case("kronecker", (2, 40, 128)),
        Case("kronecker_quantize", (2, 40, 128), {"gate": True, "rms_eps": 1e-5}),
        Case("hadamard", (2, 12, 4096)),
        Case("gemm_w4a4", ((1,), 70, 40_001)),
        Case("gemm_w4a8", ((2,), 33, 65_537), {"symmetric": False}),
        Case("gemm_w8a8", ((1,), 129, 20_001), {"bias": torch.float32}),
        Case("gemm_w4a16", ((1,), 70, 20_000, 4)),
        Case("kv_quantize_append", (1, 1, 2, 512), {"capacity": 2, "transform": True}),
        Case("kv_dequantize", (1, 1, 3, 80_000)),
        Case("attention_decode", (1, 2, 1, 1, 64, 4000), {"mask": "additive"}),
        Case("fake_quantize", (2, 50_001), {}, (torch.float32,)),
        Case("fake_quantize_backward", (2, 50_001), {}, (torch.float32,)),
    )
}


def test_every_op_is_here() -> None:
    assert set(WIDE) == set(library.OPS)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", library.OPS)
def test_more_threads_than_rows(op: str, isa: str) -> None:
    call = WIDE[op].call(WIDE[op].dtypes[-1])
    torch.set_num_threads(1)
    wanted = bits_of(call.run(getattr(ops, op)))
    torch.set_num_threads(16)
    assert bits_of(call.run(getattr(ops, op))) == wanted


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_may_change_between_calls(isa: str) -> None:
    calls = [case.call(case.dtypes[0]) for case in (*CASES, *WIDE.values())]
    answers = []
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        answers.append([bits_of(call.run(getattr(ops, call.op))) for call in calls])
    assert all(answer == answers[0] for answer in answers)


class Tokens:
    """A prompt and two tokens through a stack of layers, on a cache of one's own."""

    def __init__(self) -> None:
        sizes = dataclasses.replace(SIZES, hidden=256, intermediate=384, heads=4, head_dim=64)
        self.sizes, self.layers = sizes, [make_layer(sizes, seed) for seed in range(2)]
        self.plan = DecoderPlan(self.layers, sizes, SCALING)

    def run(self) -> list[bytes]:
        cache = make_cache(self.sizes, 2, 2, 20)
        bound, found, past = self.plan.bind_cache(cache), [], 0
        for t in (9, 1, 1):
            arguments = inputs(self.sizes, torch.bfloat16, 2, t, seed=past)
            found.append(self.plan.run(*arguments, bound, past=past))
            past += t
        return bits_of((*found, *cache))


@needs_decoder
@pytest.mark.usefixtures("threads")
def test_the_decoder_with_other_numbers_of_threads() -> None:
    tokens = Tokens()
    answers = []
    for count in (1, 2, 5, 1, 16, 1):
        torch.set_num_threads(count)
        answers.append(tokens.run())
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2])
def test_calls_from_several_threads_at_once(count: int) -> None:
    """Each op in two threads, and the decoder in two more that share a plan."""
    torch.set_num_threads(count)
    calls = [WIDE[op].call(WIDE[op].dtypes[-1]) for op in library.OPS]
    tokens = Tokens()
    wanted, decoded = [bits_of(c.run(getattr(ops, c.op))) for c in calls], tokens.run()
    ready = threading.Barrier(4)

    def many(order: int) -> bool:
        torch.set_num_threads(count)
        ready.wait(60)
        found = [bits_of(c.run(getattr(ops, c.op))) for _ in range(3) for c in calls[::order]]
        return found == wanted[::order] * 3

    def decode() -> bool:
        torch.set_num_threads(count)
        ready.wait(60)
        return all(tokens.run() == decoded for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        found = [
            pool.submit(many, 1),
            pool.submit(many, -1),
            pool.submit(decode),
            pool.submit(decode),
        ]
        assert all(future.result(120) for future in found)


# ---- fork ----------------------------------------------------------------------------------------


def pools_can_end() -> bool:
    """Whether torch's OpenMP can end its threads before a fork; see csrc/torch/ops_cpu.cpp."""
    return library._file is not None and hasattr(
        ctypes.CDLL(str(library._file)), "omp_pause_resource_all"
    )


needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or not pools_can_end(),
    reason="no fork, or no OpenMP 5 that can end its threads before it",
)


def in_child(work: Callable[[], None], timeout: float = 60.0) -> str:
    """Run it in a fork of this process: "", or what went wrong."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + timeout
    try:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "it hangs"
            time.sleep(0.01)
        return os.read(reader, 4000).decode()
    finally:
        os.close(reader)


class Everything:
    """Every op on several threads, torch's own among them; the same bits each time."""

    def __init__(self) -> None:
        self.calls = [WIDE[op].call(WIDE[op].dtypes[-1]) for op in library.OPS]
        self.x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
        self.tokens = Tokens() if decoder.available() else None
        self.wanted = self.run()

    def run(self) -> list[Any]:
        own = [bits_of(call.run(getattr(ops, call.op))) for call in self.calls]
        torchs = [bits_of((self.x + 1,)), self.x @ self.x is not None]
        return [own, torchs, self.tokens.run() if self.tokens else None]

    def check(self) -> None:
        assert self.run() == self.wanted


@needs_fork
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("later", [None, 1, 5], ids=lambda n: f"then {n}")
def test_fork_after_use(later: int | None) -> None:
    torch.set_num_threads(2)
    everything = Everything()

    def child() -> None:
        if later:
            torch.set_num_threads(later)
        everything.check()
        assert in_child(everything.check) == ""

    for _ in range(2):
        assert in_child(child) == ""
        everything.check()


@needs_fork
@pytest.mark.usefixtures("threads")
def test_fork_in_a_thread_after_use() -> None:
    torch.set_num_threads(2)
    everything = Everything()

    def forks() -> str:
        torch.set_num_threads(2)
        everything.check()
        return in_child(everything.check)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(forks).result(120) == ""
    everything.check()


_everything: Everything | None = None


def _in_worker(count: int) -> bool:
    assert _everything is not None
    torch.set_num_threads(count)
    _everything.check()
    return True


@needs_fork
@pytest.mark.usefixtures("threads")
def test_a_pool_of_processes_after_use() -> None:
    global _everything
    torch.set_num_threads(2)
    _everything = Everything()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_in_worker, [1, 2, 3, 2]).get(120) == [True] * 4
    _everything = None
