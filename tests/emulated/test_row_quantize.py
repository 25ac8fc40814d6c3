"""The row quantizer that the CUDA kernels share, against the contract, number by number.

Its division is a proof with a finite remainder (csrc/cuda/row_quantize.cuh): the program tries
every case of that remainder, and millions of random ones next to half-integers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "c++")


def flags() -> list[str]:
    """As kernels are compiled for the host: no fused operation but those that are written."""
    cpuinfo = Path("/proc/cpuinfo")
    fma = cpuinfo.exists() and " fma " in cpuinfo.read_text(encoding="utf-8")
    plain = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-unknown-pragmas"]
    return [*plain, "-DFQ_EMULATED", f"-I{HERE}", *(["-mfma"] if fma else [])]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_every_hard_division_and_millions_of_others(tmp_path: Path) -> None:
    program = tmp_path / "test_row_quantize"
    source = HERE / "test_row_quantize.cpp"
    subprocess.run([COMPILER, *flags(), str(source), "-o", str(program)], check=True, timeout=120)
    done = subprocess.run(
        [str(program), "20"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 50_000_000
