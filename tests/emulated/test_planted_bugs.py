"""Bugs planted in copies of the kernels: every kind that the emulator is for must be caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import build
from .conftest import Libraries
from .emulated import ORDERS
from .test_sanitizer import run_sanitized


@dataclass(frozen=True)
class Bug:
    """A change of one text in one file, and the rows that must notice."""

    name: str
    file: str  # of csrc/cuda
    source: str  # the .cu file that is compiled again
    before: str
    after: str
    rows: str  # a regular expression of row ids
    symptom: str  # in the output of the process that runs them


WRONG_ANSWER = ": differs from the reference"

BUGS = [
    Bug(
        name="missing barrier",
        file="row_quantize.cuh",
        source="quantize.cu",
        before="__syncthreads();",
        after="",
        rows=r"^quantize_activation-\(3,1536\)",
        symptom=WRONG_ANSWER,
    ),
    Bug(
        name="missing wait",
        file="gemm_mma.cuh",
        source="gemm_mma.cu",
        before="copy_async_wait<Tile::kStages - 2>();",
        after="",
        rows=r"^gemm_w4a4-\(\(4,\),5,24\)",
        symptom=WRONG_ANSWER,
    ),
    Bug(
        name="missing wait of a warp",
        file="gemm_stream.cuh",
        source="gemm_stream.cu",
        before="copy_async_wait_but(ahead - 1);",
        after="",
        rows=r"^gemm_w4a4-\(\(1,\),24,576\)",
        symptom=WRONG_ANSWER,
    ),
    Bug(
        name="missing barrier of a warp",
        file="gemm_w4a16.cuh",
        source="gemm_w4a16_fp16.cu",
        before="__syncwarp();  // this slice",
        after="//",
        rows=r"^gemm_w4a16-\(\(3,\),133,2048,2\)",
        symptom=WRONG_ANSWER,
    ),
    Bug(
        name="divergent barrier",
        file="gemm_mma.cuh",
        source="gemm_mma.cu",
        before="if (Tile::kWarpsK > 1) __syncthreads();",
        after="if (Tile::kWarpsK > 1 && lane.column(block) < columns) __syncthreads();",
        rows=r"^gemm_w4a4-\(\(4,\),5,24\)",
        symptom="deadlock: ",
    ),
    Bug(
        name="copies nobody waits for",
        file="attention_mma.cuh",
        source="attention_mma.cu",
        before="copy_async_wait<1>();",
        after="copy_async_wait<2>();",
        rows=r"^attention_decode-\(1,8,2,1,128,272\)|^attention_decode-\(1,16,2,1,128,272\)",
        symptom=WRONG_ANSWER,
    ),
    Bug(
        name="rows of a joined product taken for rows of one of its parts",
        file="decoder.cu",
        source="decoder.cu",
        before="mlp_out.stride = memory_.mlp_stride;",
        after="",
        rows=r"^decoder_stack-2-.*-joined-",
        symptom=WRONG_ANSWER,
    ),
    Bug(
        name="a half turned the wrong way",
        file="heads.cu",
        source="heads.cu",
        before="-high * load(args.sin",
        after="high * load(args.sin",
        rows=r"^decoder_stack-1-",
        symptom=WRONG_ANSWER,
    ),
    Bug(
        name="a row of shared memory read too early",
        file="kv_cache_append.cu",
        source="kv_cache_append.cu",
        before="v[2], v[3]);\n      __syncthreads();",
        after="v[2], v[3]);",
        rows=r"^kv_quantize_append-\(1,2,3,128\)-.*transform=True",
        symptom=WRONG_ANSWER,
    ),
]
OUT_OF_BOUNDS = Bug(
    name="out of bounds",
    file="transform_load.cuh",
    source="transform_bf16.cu",
    before="squares[tile] = sum;",
    after="squares[tile + 1] = sum;",
    rows=r"^kronecker_quantize-\(1,32,48\)-channel_scale.*bfloat16-RTX",
    symptom="AddressSanitizer: use-after-poison",
)


def plant(bug: Bug, folder: Path) -> Path:
    """Write a copy of the source with the bug in it, its headers beside it; returns the source."""
    for path in [*build.CUDA_FOLDER.glob("*.cuh"), build.CUDA_FOLDER / bug.source]:
        shutil.copy2(path, folder)
    text = (folder / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.before) == 1, (
        f"csrc/cuda/{bug.file} has no single {bug.before!r} any more"
    )
    (folder / bug.file).write_text(text.replace(bug.before, bug.after), encoding="utf-8")
    return folder / bug.source


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught(bug: Bug, libraries: Libraries, tmp_path: Path) -> None:
    assert libraries.ops.exists()  # with the objects that stay
    library = build.build_changed_ops(plant(bug, tmp_path), build.PLAIN, tmp_path)
    command = [sys.executable, "-m", "tests.emulated.run_rows", str(library), f"--rows={bug.rows}"]
    run = subprocess.run(
        [*command, f"--orders={','.join(ORDERS)}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=build.ROOT,
        env=os.environ | {"GCOV_PREFIX": str(tmp_path)},  # no part of the coverage
    )
    assert run.returncode == 1 and bug.symptom in run.stdout, run.stdout + run.stderr


def test_access_out_of_bounds_is_caught(sanitized: Path, tmp_path: Path) -> None:
    bug = OUT_OF_BOUNDS
    library = build.build_changed_ops(plant(bug, tmp_path), build.SANITIZED, tmp_path)
    run = run_sanitized("-m", "tests.emulated.run_rows", str(library), f"--rows={bug.rows}")
    assert run.returncode != 0 and bug.symptom in run.stderr, run.stdout + run.stderr
