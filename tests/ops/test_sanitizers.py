"""The CPU ops under AddressSanitizer and UBSan, and between pages that nobody may touch.

The sanitizers see every access of a library that is compiled for them, also to working memory and
the stack; but not what hand-written instructions do, nor what the optimiser makes of it all. The
pages see any access of the installed library that leaves a tensor, for reading or writing, at its
end or at its beginning. Both run every instruction set of this machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flatquant_cuda import decoder, library

from . import sanitized

pytestmark = pytest.mark.skipif(
    not library.loaded or not decoder.available(), reason="no native library"
)


@pytest.fixture(scope="module")
def package(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package on a sanitized library."""
    if reason := sanitized.why_not():
        pytest.skip(reason)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return sanitized.build(tmp_path_factory.mktemp("sanitized"))


def run_rows(folder: Path, tmp_path: Path, *options: str) -> tuple[int, str]:
    """Run them on a sanitized library: how many have run, and what was found."""
    progress = tmp_path / "progress"
    program = ("-m", "tests.ops.sanitized_rows", f"--progress={progress}")
    run = sanitized.run(folder, *program, *options)
    if run.returncode == 0:
        return int(run.stdout.split()[0]), ""
    row = progress.read_text().splitlines()[0] if progress.exists() else "no row"
    return 0, f"{row}\n{run.stdout[-500:]}\n{run.stderr[:4000]}"


def test_rows_are_clean(package: Path, tmp_path: Path) -> None:
    """Each row on every other instruction set."""
    count, found = run_rows(package, tmp_path, "--thin=2")
    assert found == "" and count > 300


@pytest.mark.long
def test_every_row_is_clean(package: Path, tmp_path: Path) -> None:
    count, found = run_rows(package, tmp_path, "--every")
    assert found == "" and count > 5000


SUITE = ("test_ops", "test_gemm", "test_kv_attention", "test_decoder", "test_faults")
# Those start processes without the sanitizer.
OTHERS = "not build_info and not without_a_library"
PYTEST = "import sys, flatquant_cuda, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.long
@pytest.mark.parametrize("name", SUITE)
def test_the_op_suite_is_clean(name: str, package: Path) -> None:
    """The package is imported first: pytest would find the one in the root folder."""
    options = [
        "-q",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-k",
        OTHERS,
        f"--rootdir={sanitized.ROOT}",
    ]
    run = sanitized.run(package, "-c", PYTEST, *options, str(sanitized.HERE / f"{name}.py"))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[:4000]
    assert re.search(r"[1-9]\d+ passed", run.stdout), run.stdout[-300:]


# ---- that they see what they are for -------------------------------------------------------------

HADAMARD = ["hadamard.cpp", "hadamard_avx2.cpp", "hadamard_avx512.cpp"]
PLANTED = {
    "reads one element behind x": (
        ("hadamard_body.h", "r * n, n, row);", "r * n, n + 1, row);", HADAMARD),
        "hadamard-",
        "heap-buffer-overflow",
        "READ of size",
    ),
    "reads one element before x": (
        ("hadamard_body.h", "r * n, n, row);", "r * n - 1, n, row);", HADAMARD),
        "hadamard-",
        "heap-buffer-overflow",
        "READ of size",
    ),
    "writes behind its working memory": (
        ("hadamard_body.h", "0, m * m, base);", "0, m * m, base + 1);", HADAMARD),
        "hadamard-",
        "heap-buffer-overflow",
        "WRITE of size",
    ),
    "shifts by the width of an integer": (
        ("hadamard_body.h", "y[j] * args.scale;", "y[j] * args.scale + (1 << (n + 31));", HADAMARD),
        "hadamard-",
        "runtime error: shift exponent",
        "hadamard_body.h",
    ),
}


def planted(name: str, isa: str, tmp_path: Path) -> None:
    change, rows, message, more = PLANTED[name]
    folder = sanitized.build_changed(*change, tmp_path)
    _, found = run_rows(folder, tmp_path, f"--rows={rows}", f"--isas={isa}")
    assert found.startswith(isa) and message in found and more in found, found


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", list(PLANTED)[:1])
def test_a_planted_bug_is_seen(name: str, tmp_path: Path) -> None:
    planted(name, library.cpu_isa() if library.cpu_isa() != "amx" else "avx512", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_bug_is_seen(name: str, package: Path, isa: str, tmp_path: Path) -> None:
    planted(name, isa, tmp_path)


# ---- pages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guarded_pages.cpp, compiled: to preload."""
    if platform.libc_ver()[0] != "glibc" or (reason := sanitized.emulated.why_not()):
        pytest.skip(f"guarded pages need Linux with glibc and g++: {reason}")
    target = tmp_path_factory.mktemp("pages") / "guarded_pages.so"
    source = sanitized.HERE / "guarded_pages.cpp"
    command = [sanitized.emulated.compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return target


def run_guarded(pages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=sanitized.ROOT,
        env=os.environ | {"LD_PRELOAD": str(pages), "OMP_NUM_THREADS": "2"},
    )


TOUCH = """
import ctypes
libc = ctypes.CDLL(None)
libc.guarded_pages({mode})
out = ctypes.c_void_p()
assert libc.posix_memalign(ctypes.byref(out), ctypes.c_size_t(64), ctypes.c_size_t(4099)) == 0
ctypes.memset(out.value, 7, 4099)
print(ctypes.string_at(out.value + 4098, 1)[0], flush=True)
if {free}:
    libc.free(out)
print(ctypes.string_at(out.value + {offset}, 1)[0])
"""


@pytest.mark.parametrize(
    ("mode", "offset", "free", "faults"),
    [(1, 4098, 0, False), (1, 4099, 0, True), (2, 0, 0, False), (2, -1, 0, True), (2, 9, 1, True)],
    ids=["last byte", "behind", "first byte", "before", "freed"],
)
def test_pages_see_one_byte(pages: Path, mode: int, offset: int, free: int, faults: bool) -> None:
    code = TOUCH.format(mode=mode, offset=offset, free=free)
    run = run_guarded(pages, "-c", code)
    assert run.stdout.startswith("7\n")
    assert run.returncode == (-11 if faults else 0)


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some", "every"]
)
def test_no_kernel_leaves_its_tensors(pages: Path, every: bool, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    options = [f"--progress={progress}", "--pages=end,begin", "--every" if every else "--thin=2"]
    run = run_guarded(pages, "-X", "faulthandler", "-m", "tests.ops.sanitized_rows", *options)
    assert run.returncode == 0, progress.read_text().splitlines()[0] + run.stderr[-2000:]
    assert int(run.stdout.split()[0]) > 700
