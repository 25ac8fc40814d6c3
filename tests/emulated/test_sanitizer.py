"""Rows under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own.

It watches tensors, dynamic and static shared memory, and the fibers' stacks; shared memory is
poisoned as always.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import build


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program with the sanitizer's library in front of all others."""
    # libstdc++ too: Python does not load it early enough for the sanitizer to find __cxa_throw.
    preload = [library_of_compiler("libasan.so"), library_of_compiler("libstdc++.so.6")]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(preload)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=build.ROOT,
        env=os.environ | options | {"OMP_NUM_THREADS": "1"},
    )


def library_of_compiler(name: str) -> str:
    command = [build.compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{build.compiler()} has no {name}")
    return path


@pytest.mark.parametrize(("order", "every", "shift"), [("shuffled:2", 7, 0), ("forward", 11, 1)])
def test_rows_are_clean(sanitized: Path, order: str, every: int, shift: int) -> None:
    options = [f"--orders={order}", f"--every={every}", f"--shift={shift}"]
    run = run_sanitized("-m", "tests.emulated.run_rows", str(sanitized), *options)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-3000:]
    assert run.stdout.count(": ok") > 20, run.stdout


@pytest.mark.long
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled:3"])
def test_every_row_is_clean(sanitized: Path, order: str) -> None:
    run = run_sanitized("-m", "tests.emulated.run_rows", str(sanitized), f"--orders={order}")
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-3000:]


FAULTS = """
import ctypes
shim = ctypes.CDLL("{library}")
words = (ctypes.c_int64 * 128)()
print(shim.shim_fault(words, words, {fault}, 64, 256, 256))
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (8, "use-after-poison"),  # writes behind dynamic shared memory
        (9, "use-after-poison"),  # writes before it
        (13, "use-after-poison"),  # reads behind it
        (14, "global-buffer-overflow"),  # reads behind a static array
        (15, "misaligned address"),
        (0, ""),
    ],
)
def test_the_sanitizer_sees_shared_memory(sanitized: Path, fault: int, message: str) -> None:
    library = build.build("shim", [build.HERE / "shim.cu"], build.SANITIZED)
    run = run_sanitized("-c", FAULTS.format(library=library, fault=fault))
    if fault == 0:
        assert run.returncode == 0 and run.stdout == "0\n", run.stderr
    else:
        assert run.returncode != 0 and message in run.stderr, run.stdout + run.stderr
