"""Emulated are exactly the files that CMake compiles for the GPU, and nearly all their lines."""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path

from . import build
from .emulated import Emulated
from .rows import EVERY_ROW, OPS

LEAST_COVERED = 0.90


def sources_of_cmake() -> set[Path]:
    """The .cu files of CMakeLists.txt, by its own patterns."""
    text = (build.ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    globs = re.findall(r"file\(GLOB\s+\w+\s+(?:CONFIGURE_DEPENDS\s+)?([^)]*)\)", text)
    patterns = [p for words in globs for p in words.split() if p.endswith(".cu")]
    assert patterns, "CMakeLists.txt names no .cu files by file(GLOB ...)"
    named = {build.ROOT / name for name in re.findall(r"csrc/[\w/]+\.cu\b", text)}
    return named | {path for pattern in patterns for path in build.ROOT.glob(pattern)}


def test_emulated_sources_are_those_that_cmake_compiles() -> None:
    for_the_gpu_only = {path for path in sources_of_cmake() if not_emulated(path)}
    assert sources_of_cmake() - for_the_gpu_only == set(build.kernel_sources())
    # What is left out is what it says: CUTLASS, and the one file that asks for device attributes.
    assert {path.name for path in for_the_gpu_only if "_cutlass_" not in path.name} == {"gpu.cu"}
    for path in for_the_gpu_only:
        wanted = "cutlass" if "_cutlass_" in path.name else "cudaDeviceGetAttribute"
        assert wanted in path.read_text(encoding="utf-8"), path


def not_emulated(path: Path) -> bool:
    return any(path.match(pattern) for pattern in build.NOT_EMULATED)


def test_every_cuda_op_is_emulated(emulated: Emulated) -> None:
    text = (build.ROOT / "csrc/torch/ops_cuda.cpp").read_text(encoding="utf-8")
    registered = set(re.findall(r"^\s+FQ_CUDA_OP\w*\((\w+),", text, re.MULTILINE))
    assert registered == set(OPS)
    assert all(emulated.has(op) for op in OPS)


def functions_of(path: Path) -> set[str]:
    """Names of the functions that a header defines at the left margin of namespace fq::cuda."""
    text = path.read_text(encoding="utf-8").split("namespace fq::cuda {")[-1]
    return set(re.findall(r"^(?:static|inline)\b[^=;{]*?(\w+)\(", text, re.MULTILINE))


def test_every_instruction_has_its_twin() -> None:
    """ptx.cuh and emulated_ptx.h define the same functions; there is no assembly elsewhere."""
    raw_addresses = {"shared_address", "cluster_address"}
    found = functions_of(build.CUDA_FOLDER / "ptx.cuh") - raw_addresses
    assert found == functions_of(build.HERE / "emulated_ptx.h")
    assert len(found) > 25
    for path in [*build.kernel_sources(), *build.CUDA_FOLDER.glob("*.cuh")]:
        assembly = re.search(r"\basm\b", path.read_text(encoding="utf-8"))
        assert assembly is None or path.name == "ptx.cuh", path


def line_counts() -> dict[str, dict[int, int]]:
    """How often each line of csrc/cuda ran, by file: the most of all instances of a template."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for source in build.kernel_sources():
        data = build.FOLDER / build.PLAIN.name / f"{source.stem}.gcda"
        command = [build.gcov(), "--json-format", "--stdout", str(data)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for file in json.loads(text)["files"]:
            path = Path(file["file"])
            if build.CUDA_FOLDER in path.parents:
                for line in file["lines"]:
                    number, count = line["line_number"], line["count"]
                    counts[path.name][number] = max(counts[path.name][number], count)
    return counts


def test_nearly_every_line_runs(emulated: Emulated) -> None:
    """Rows that other tests have not run in this process run here."""
    for row in EVERY_ROW:
        if row.id not in emulated.checked:
            row.check(emulated)
    emulated.library.flatquant_emulated_dump_coverage()
    counts = line_counts()
    lines = sum(len(file) for file in counts.values())
    silent = {name: [n for n, c in sorted(f.items()) if c == 0] for name, f in counts.items()}
    missing = sum(map(len, silent.values()))
    report = "\n".join(f"{name}: {numbers}" for name, numbers in sorted(silent.items()) if numbers)
    print(f"{lines - missing} of {lines} lines of csrc/cuda ran; not these:\n{report}")
    assert lines > 300
    assert missing <= (1 - LEAST_COVERED) * lines
