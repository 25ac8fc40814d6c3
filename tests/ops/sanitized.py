"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer: building and running it.

In build/sanitized. The flags of the kernels are those of CMakeLists.txt, but for the optimisation;
objects are kept by the contents of what they were made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from tests.emulated import build as emulated
from tests.emulated.test_sanitizer import library_of_compiler

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
FOLDER = ROOT / "build/sanitized"
TORCH = Path(torch.__file__).parent
PATH = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))

# Not `null`: AddressSanitizer sees that too, and it takes a third of the time to compile.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=all")
FLAGS = ("-g1", "-fno-omit-frame-pointer", *SANITIZE)
# Checks by calls: quicker to compile than checks in place.
KERNEL_FLAGS = ("-O1", "--param=asan-instrumentation-with-call-threshold=0", *FLAGS)
# Working memory that ends where the kernel said: takes the place of a source of this name.
SCRATCH = HERE / "sanitized_scratch.cpp"
REPLACED = {"scratch.cpp": SCRATCH}
HEADERS = ("*.h", "cpu/*.h", "torch/*.h")  # of csrc; a change of any compiles all anew


def why_not() -> str | None:
    """Why nothing can be sanitized here, or None."""
    if reason := emulated.why_not():
        return reason
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=PATH) is None:
            return f"no {tool}"
    for name in ("libasan.so", "libubsan.so"):
        command = [emulated.compiler(), f"-print-file-name={name}"]
        if not Path(subprocess.check_output(command, text=True).strip()).is_absolute():
            return f"{emulated.compiler()} has no {name}"
    return None


@cache
def kernel_commands() -> dict[str, list[str]]:
    """How CMake compiles each file of csrc/cpu, by its name; without input, output and -O."""
    folder = FOLDER / "cmake"
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    configure += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DFLATQUANT_CUDA=OFF"]
    configure += [f"-DCMAKE_CXX_COMPILER={emulated.compiler()}"]
    cached = folder / "CMakeCache.txt"
    if cached.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cached.read_text():
        shutil.rmtree(folder)
    environment = os.environ | {"PATH": PATH}
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL, env=environment)
    found = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        words = [w for w in shlex.split(entry["command"]) if not re.fullmatch(r"-O\d|-DNDEBUG", w)]
        end = words.index("-o")
        assert words[end + 2] == "-c", words
        found[Path(entry["file"]).name] = words[:end]
    return found


def command_of(source: Path) -> list[str]:
    """How to compile it, but for input and output."""
    if source.parent.name == "cpu":
        return [*kernel_commands()[source.name], *KERNEL_FLAGS]
    command = [emulated.compiler(), "-std=c++17", "-fPIC", "-fvisibility=hidden", "-O0", *FLAGS]
    if source in REPLACED.values():
        return [*command, f"-I{ROOT / 'csrc/cpu'}"]
    headers = TORCH / "include"
    command += [f"-isystem{headers}", f"-isystem{headers}/torch/csrc/api/include"]
    return [*command, "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]


def sources() -> list[Path]:
    """Of the whole library: kernels, then the binding."""
    kernels = [REPLACED.get(name, ROOT / "csrc/cpu" / name) for name in kernel_commands()]
    binding = sorted((ROOT / "csrc/torch").glob("*.cpp"))
    return [*kernels, *(path for path in binding if path.name != "ops_cuda.cpp")]


def compile_object(source: Path, folder: Path) -> Path:
    """Compile a file, unless an object of the same command and contents is there."""
    target = folder / f"{source.parent.name}_{source.stem}.o"
    command = command_of(source)
    contents = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    tree = source.parents[1] if source.parents[1].name == "csrc" else ROOT / "csrc"
    for path in (source, *(p for f in HEADERS for p in sorted(tree.glob(f)))):
        contents.update(path.read_bytes())
    stamp = target.with_suffix(".sha256")
    if target.exists() and stamp.exists() and stamp.read_text() == contents.hexdigest():
        return target
    stamp.unlink(missing_ok=True)
    new = target.with_suffix(f".{os.getpid()}")  # another process may compile it too
    command += ["-c", str(source), "-o", str(new)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
    new.replace(target)
    stamp.write_text(contents.hexdigest())
    return target


def link(objects: Sequence[Path], folder: Path) -> Path:
    """Copy the package flatquant_cuda to a folder, on a library of these objects."""
    package = folder / "flatquant_cuda"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "flatquant_cuda", package, ignore=ignored)
    command = [emulated.compiler(), "-shared", *map(str, objects), *SANITIZE]
    command += ["-Wl,--no-as-needed", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(package / "_ops.so")], check=True)
    return folder


def build(to: Path) -> Path:
    """Build the whole library into a folder; returns it."""
    begin = time.perf_counter()
    folder = FOLDER / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda path: compile_object(path, folder), sources()))
    print(f"sanitized: compiled in {time.perf_counter() - begin:.0f} s")
    return link(objects, to)


def build_changed(header: str, before: str, after: str, changed: Sequence[str], to: Path) -> Path:
    """Build it with another text in a header of csrc/cpu, which these of its files include.

    The other objects stay those of :func:`build`.
    """
    copy = to / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    text = (copy / "cpu" / header).read_text(encoding="utf-8")
    assert text.count(before) == 1, f"csrc/cpu/{header} has no single {before!r} any more"
    (copy / "cpu" / header).write_text(text.replace(before, after), encoding="utf-8")
    new = {f"cpu_{Path(name).stem}.o": compile_object(copy / "cpu" / name, to) for name in changed}
    old = [FOLDER / "objects" / f"{path.parent.name}_{path.stem}.o" for path in sources()]
    assert new.keys() <= {path.name for path in old}
    return link([new.get(path.name, path) for path in old], to)


def run(folder: Path, *arguments: str, threads: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a Python program on the package in a folder, the sanitizer in front of all libraries."""
    # libstdc++ too: Python does not load it early enough for the sanitizer to find __cxa_throw.
    preload = [library_of_compiler("libasan.so"), library_of_compiler("libstdc++.so.6")]
    environment = {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python"))),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,  # comes before PYTHONPATH
        env=os.environ | environment,
    )
