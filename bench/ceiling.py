"""What this machine can do at most, measured: products of bytes a second, bytes read a second.

A small C++ file is compiled for the very processor it runs on. Where there is no compiler, torch's
best integer product and its fastest sum stand in for it, and the name of the ceiling says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("ceiling.cpp")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
#: Instructions for products of bytes, the fastest first, and about how many rounds take 1 ms.
_MULTIPLIERS = {"amx": 20_000, "avx512": 200_000, "avx2": 200_000}
_PIECES = 16


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The most that all of `threads` threads did together.

    Attributes:
        int8: operations a second on bytes (a product and its addition are two).
        int8_by: what reached that.
        read: bytes a second out of memory, past the last cache.
        threads: how many took part.
    """

    int8: float
    int8_by: str
    read: float
    threads: int

    def raised(self, other: Ceiling) -> Ceiling:
        """The higher of two measurements: other work on the machine only ever lowers one."""
        int8 = max(self, other, key=lambda ceiling: ceiling.int8)
        return replace(int8, read=max(self.read, other.read))

    def share(self, seconds: float, *, operations: float, bytes_read: float) -> float:
        """The time that the ceilings allow at best, as a share of `seconds`."""
        return max(operations / self.int8, bytes_read / self.read) / seconds

    def __str__(self) -> str:
        return (
            f"{self.int8 / 1e12:.2f} TOP/s on bytes ({self.int8_by}), "
            f"{self.read / 1e9:.1f} GB/s read from memory, {self.threads} threads"
        )


def last_cache() -> int:
    """Bytes of the last-level cache; 64 MiB where the system does not say."""
    sizes = [64 * 2**20] if not _CACHES.is_dir() else []
    for file in _CACHES.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        sizes += [int(match[1]) * _UNITS[match[2]]] if match else []
    return max(sizes, default=64 * 2**20)


def available_memory() -> int:
    """Bytes that can be allocated without swapping; 4 GiB where the system does not say."""
    info = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return int(match[1]) * 2**10 if match else 4 * 2**30


def past_caches() -> int:
    """Bytes to rotate through so that nothing is found in a cache: twice the last one.

    Less where memory is short: no more than a sixteenth of what is available, for there are
    several contestants.
    """
    return min(2 * last_cache(), available_memory() // 16)


def measure_ceiling(seconds: float = 1.0) -> Ceiling:
    """Measure, in about `seconds`, with as many threads as torch has."""
    threads = torch.get_num_threads()
    library = _compile()
    if library is None:
        return Ceiling(
            int8=_torch_rate(seconds / 2),
            int8_by="torch._int_mm, no compiler",
            read=_torch_read(seconds / 2),
            threads=threads,
        )
    rates = {name: _rate(library, name, threads, seconds / 6) for name in _MULTIPLIERS}
    best = max(rates, key=lambda name: rates[name])
    by, int8 = (best, rates[best]) if rates[best] else ("torch._int_mm", _torch_rate(seconds / 2))
    return Ceiling(
        int8=int8, int8_by=by, read=_read(library, threads, seconds / 2), threads=threads
    )


def _compile() -> ctypes.CDLL | None:
    """The library of ceiling.cpp, compiled once for every text of it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    file = Path(tempfile.gettempdir()) / f"flatquant-ceiling-{os.getuid()}-{digest}.so"
    if not file.exists():
        made = file.with_suffix(f".{os.getpid()}")
        options = ["-O3", "-std=c++17", "-march=native", "-Wno-psabi", "-fPIC", "-shared"]
        done = subprocess.run(
            [compiler, *options, str(_SOURCE), "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode != 0:
            return None
        made.replace(file)
    library = ctypes.CDLL(str(file))
    for name in _MULTIPLIERS:
        function = getattr(library, f"fq_multiply_{name}")
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    library.fq_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.fq_read.restype = None
    return library


def _rate(library: ctypes.CDLL, name: str, threads: int, seconds: float) -> float:
    multiply: Callable[[int], int] = getattr(library, f"fq_multiply_{name}")
    rounds = _MULTIPLIERS[name]
    if multiply(1) == 0:
        return 0.0
    done = [0] * threads

    def work(thread: int) -> None:
        done[thread] = multiply(rounds)

    return _best(lambda: sum(done), work, threads, seconds)


def _read(library: ctypes.CDLL, threads: int, seconds: float) -> float:
    # Short pieces, so that some are read while nothing else disturbs the machine; they rotate.
    piece = past_caches() // threads // _PIECES // 1024 * 1024
    memory = [torch.ones(_PIECES, piece // 8, dtype=torch.int64) for _ in range(threads)]
    turns = [0] * threads

    def rate(streams: int) -> float:
        def work(thread: int) -> None:
            part = memory[thread][turns[thread] % _PIECES]
            turns[thread] += 1
            library.fq_read(part.data_ptr(), piece, streams)

        return _best(lambda: piece * threads, work, threads, seconds / 2)

    return max(rate(1), rate(4))


def _best(
    amount: Callable[[], int], work: Callable[[int], None], threads: int, seconds: float
) -> float:
    """The most `amount` a second when every thread does its `work` at once."""
    best, end = 0.0, time.perf_counter() + seconds
    barrier = threading.Barrier(threads + 1)
    more = True

    def run(thread: int) -> None:
        while True:
            barrier.wait()
            if not more:
                return
            work(thread)
            barrier.wait()

    team = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for thread in team:
        thread.start()
    samples = 0
    while time.perf_counter() < end or samples < 2 * _PIECES:
        start = time.perf_counter()
        barrier.wait()
        barrier.wait()
        best = max(best, amount() / (time.perf_counter() - start))
        samples += 1
    more = False
    barrier.wait()
    for thread in team:
        thread.join()
    return best


def _torch_rate(seconds: float) -> float:
    size = 2048
    left, right = (torch.ones(size, size, dtype=torch.int8) for _ in range(2))
    return 2 * size**3 / _least(lambda: torch._int_mm(left, right.t()), seconds)


def _torch_read(seconds: float) -> float:
    memory = torch.ones(past_caches() // 8, dtype=torch.int64)
    return memory.numel() * 8 / _least(lambda: memory.sum(), seconds)


def _least(call: Callable[[], object], seconds: float) -> float:
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or least == float("inf"):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least
