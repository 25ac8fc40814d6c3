"""Other processors: the same bits without AMX, AVX-512 and AVX2, in processes of their own.

``python -m tests.ops.test_processors`` prints what this processor answers, a digest per op.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flatquant_cuda import decoder, library, ops

from .cases import every_case
from .test_threads import Tokens

ROOT = Path(__file__).resolve().parent.parent.parent
PAGED = ("slots", "block_table", "lengths")  # the reference answers these on a CPU
STATIC = ROOT / "build/cmake/libfq_cpu.a"

pytestmark = pytest.mark.skipif(not library.loaded, reason="no native library")


def digests() -> dict[str, str]:
    """Of all answers to the case table, and of the decoder's."""
    found = {op: hashlib.sha256() for op in library.OPS}
    for case, dtype in every_case():
        call = case.call(dtype)
        if any(call.named().get(name) is not None for name in PAGED):
            continue
        for tensor in call.run(getattr(ops, case.op)):
            found[case.op].update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    answers = {op: digest.hexdigest() for op, digest in found.items()}
    if decoder.available():
        answers["decoder_stack"] = hashlib.sha256(b"".join(Tokens().run())).hexdigest()
    return answers


# Environment variables of processes, and what they run on if this machine has everything.
ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "as it is": ({}, "amx"),
    "no AMX": ({"FLATQUANT_CPU_ISA": "avx512", "OMP_NUM_THREADS": "1"}, "avx512"),
    "no AVX-512": ({"FLATQUANT_CPU_ISA": "avx2", "OMP_NUM_THREADS": "5"}, "avx2"),
    "no AVX2": ({"FLATQUANT_CPU_ISA": "portable", "OMP_NUM_THREADS": "1"}, "portable"),
    "an unknown name": ({"FLATQUANT_CPU_ISA": "AVX2", "OMP_DYNAMIC": "true"}, "amx"),
}


def answer(environment: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The instruction set and the digests of a process with these environment variables."""
    inherited = {n: v for n, v in os.environ.items() if n != "FLATQUANT_CPU_ISA"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_processors"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=inherited | environment,
    )
    isa, answers = json.loads(run.stdout.splitlines()[-1])
    return isa, answers


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[str, dict[str, str]]]:
    """The answers of all these processes, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(answer, (variables for variables, _ in ENVIRONMENTS.values()))
        return dict(zip(ENVIRONMENTS, answers, strict=True))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_another_processor_gives_the_same_bits(
    name: str, found: dict[str, tuple[str, dict[str, str]]]
) -> None:
    best, wanted = found["as it is"]
    isa, answers = found[name]
    assert isa == min(ENVIRONMENTS[name][1], best, key=library.ISAS.index)
    assert answers == wanted


# ---- what the compiler made ----------------------------------------------------------------------

# Instructions and registers that a processor with less does not have, and who may use them.
SUFFIXES = ("_avx2.cpp.o", "_avx512.cpp.o", "_amx.cpp.o")
REGISTERS = {
    r"%ymm\d|\tv(?!er[rw])\w+ .*%xmm": SUFFIXES,
    r"%zmm\d|%[xy]mm(1[6-9]|2\d|3[01])|%k[1-7]\b": ("_avx512.cpp.o", "_amx.cpp.o"),
    r"%tmm\d": ("_amx.cpp.o",),
}


def objects() -> list[str]:
    """Names of the compiled kernels of this build."""
    if not STATIC.exists() or not shutil.which("objdump") or not shutil.which("ar"):
        pytest.skip("no build/cmake/libfq_cpu.a, or no binutils")
    names = subprocess.run(["ar", "t", str(STATIC)], capture_output=True, text=True, check=True)
    return names.stdout.split()


def test_no_kernel_runs_instructions_of_a_better_processor(tmp_path: Path) -> None:
    names = objects()
    subprocess.run(["ar", "x", str(STATIC)], cwd=tmp_path, check=True)
    for name in names:
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", name],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout
        for registers, allowed in REGISTERS.items():
            if not name.endswith(allowed):
                assert not (match := re.search(registers, code)), f"{name}: {match}"


def test_kernels_of_one_processor_lend_no_function_to_another() -> None:
    """The linker keeps one of several inline functions of a name, compiled for whichever."""
    objects()
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", str(STATIC)], capture_output=True, text=True, check=True
    ).stdout
    assert " T fq::cpu::gemm_w4a4(" in symbols
    name, lent = "", []
    for line in symbols.splitlines():
        name = line[:-1] if line.endswith(":") else name
        if re.match(r"\S+ [Ww] ", line) and name.endswith(SUFFIXES):
            lent.append((name, line))
    assert lent == []


ARM = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(not shutil.which(ARM), reason=f"no {ARM}")
def test_the_portable_kernels_compile_for_arm(tmp_path: Path) -> None:
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    portable = [path for path in sources if not re.search(r"_(avx\d+|amx)$", path.stem)]
    assert 10 < len(portable) < len(sources)
    for source in portable:
        command = [ARM, "-std=c++17", "-O2", "-Wall", "-ffp-contract=off", "-c", str(source)]
        subprocess.run([*command, "-o", str(tmp_path / f"{source.stem}.o")], check=True)
    symbols = subprocess.run(
        ["aarch64-linux-gnu-nm", "-C", *map(str, tmp_path.glob("*.o"))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    defined = set(re.findall(r" [TDBV] (fq::.*)", symbols))
    assert set(re.findall(r" U (fq::.*)", symbols)) <= defined


if __name__ == "__main__":
    print(json.dumps([library.cpu_isa(), digests()]))
