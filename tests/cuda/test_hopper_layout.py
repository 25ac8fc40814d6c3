"""The Hopper GEMMs between the copy engine and wgmma, and behind it, thread by thread on the host.

CUTLASS' templates are plain C++ to a host compiler: hopper_layout.cpp runs what this project adds
to them (weights that widen, the epilogue, the layouts of its arguments) for every thread of every
compiled tile, at the edges too, and compares with the numeric contract bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated import build

SOURCE = Path(__file__).parent / "hopper_layout.cpp"
CACHE = build.ROOT / "build" / "cmake" / "CMakeCache.txt"
FLAGS = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-DNDEBUG"),
    # The headers are nvcc's: names that only it knows, in templates that are never used.
    *("-fpermissive", "-w", "-DCUTLASS_SM90_COLLECTIVE_BUILDER_SUPPORTED"),
)


def cuda_folders() -> Iterator[Path]:
    """Where a CUDA toolkit's headers may be, the one that built the kernels first."""
    cache = CACHE.read_text(encoding="utf-8") if CACHE.exists() else ""
    for line in cache.splitlines():
        if line.startswith("CMAKE_CUDA_COMPILER:"):
            yield Path(line.partition("=")[2]).parent.parent / "include"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if name in os.environ:
            yield Path(os.environ[name]) / "include"
    yield Path("/usr/local/cuda/include")


def cutlass_folders() -> Iterator[Path]:
    """Where CUTLASS' headers may be."""
    if "CUTLASS_DIR" in os.environ:
        yield Path(os.environ["CUTLASS_DIR"])
    found = importlib.util.find_spec("cutlass_library")
    for folder in (found.submodule_search_locations or []) if found else []:
        yield Path(folder) / "source" / "include"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program."""
    why_not = build.why_not()
    cuda = next((f for f in cuda_folders() if (f / "cuda_runtime.h").exists()), None)
    cutlass = next((f for f in cutlass_folders() if (f / "cutlass" / "cutlass.h").exists()), None)
    if why_not or cuda is None or cutlass is None:
        pytest.skip(why_not or f"no {'CUDA' if cuda is None else 'CUTLASS'} headers")
    target = tmp_path_factory.mktemp("hopper_layout") / "hopper_layout"
    headers = [f"-isystem{cuda}", f"-isystem{cutlass}", f"-isystem{cuda / 'cccl'}"]
    command = [build.compiler(), *FLAGS, *headers, str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def test_every_tile_computes_the_contract(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tiles = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok ")]
    compiled = build.CUDA_FOLDER.glob("gemm_*x*_cutlass_sm90.cu")
    names = ["".join(path.name.split("_")[1:3]).capitalize() for path in compiled]
    assert sorted(tiles) == sorted(names)
