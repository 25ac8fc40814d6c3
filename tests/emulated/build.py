"""Compiles CUDA sources for the emulator: a library per variant, objects cached by content.

In build/emulated, or the folder that FQ_EMULATED_BUILD names.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
CUDA_FOLDER = ROOT / "csrc/cuda"
FOLDER = Path(os.environ.get("FQ_EMULATED_BUILD", ROOT / "build/emulated"))
JOBS = 2

# What CMake compiles and the host cannot: CUTLASS, and questions to the CUDA runtime.
NOT_EMULATED = ("*_cutlass_*.cu", "gpu.cu")
BINDING = ("schema.cpp", "args.cpp", "decoder_plan.cpp", "decoder_stack.cpp")  # of csrc/torch
EMULATOR = ("launch", "scheduler", "shared_memory", "fiber", "tensor_core", "emulated_gpu")


@dataclass(frozen=True)
class Variant:
    """A set of compiler flags: for the CUDA sources, and for all files and the link."""

    name: str
    kernel_flags: tuple[str, ...]
    flags: tuple[str, ...]


PLAIN = Variant("plain", ("-O1", "--coverage", "-fsanitize=alignment"), ("-DFQ_COVERAGE",))
SANITIZED = Variant(
    "sanitized",
    # Checks by calls: twice as quick to compile as checks in place.
    ("-O1", "--param=asan-instrumentation-with-call-threshold=0"),
    ("-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
)


def why_not() -> str | None:
    """Why nothing can be emulated here, or None."""
    if platform.system() != "Linux":
        return f"the emulator is for Linux, this is {platform.system()}"
    if shutil.which(compiler()) is None:
        return f"no compiler: {compiler()}"
    if "clang" in _version():
        return f"{compiler()} is clang: the emulator needs g++"
    return None


def compiler() -> str:
    """The host compiler."""
    return os.environ.get("CXX", "g++")


def gcov() -> str:
    """The coverage tool of the compiler's version."""
    return next((t for t in (f"gcov-{_major()}", "gcov") if shutil.which(t)), "gcov")


@cache
def _version() -> str:
    return subprocess.run(
        [compiler(), "--version"], capture_output=True, text=True, check=True
    ).stdout.lower()


@cache
def _major() -> int:
    text = subprocess.run([compiler(), "-dumpversion"], capture_output=True, text=True, check=True)
    return int(text.stdout.split(".")[0])


def kernel_sources() -> list[Path]:
    """The files of csrc/cuda that run here."""
    found = sorted(CUDA_FOLDER.glob("*.cu"))
    return [path for path in found if not any(path.match(pattern) for pattern in NOT_EMULATED)]


def _flags(source: Path, variant: Variant) -> list[str]:
    flags = ["-std=c++17", "-fPIC", "-g1", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
    flags += ["-DFQ_EMULATED", f"-I{HERE}", *variant.flags]
    if source.suffix == ".cu":
        flags += ["-iquote", str(CUDA_FOLDER)]  # for copies of a kernel elsewhere
        flags += ["-Wno-unknown-pragmas", "-fno-strict-aliasing", *variant.kernel_flags]
        if _major() >= 12:  # numbers that a kernel forgot to set: -1.7e38, or a NaN
            flags.append("-ftrivial-auto-var-init=pattern")
        return [*flags, "-x", "c++"]
    if source.name in ("binding.cpp", *BINDING):
        headers = Path(torch.__file__).parent / "include"
        flags += [f"-isystem{headers}", f"-isystem{headers}/torch/csrc/api/include"]
        flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
        flags.append("-DFQ_LIBRARY=flatquant_emulated")
    return [*flags, "-O2"]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "absent"


def _dependencies(rule: Path) -> list[Path]:
    """The files a make rule names behind its colon, those of the system left out."""
    words = rule.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return [Path(word) for word in words if not word.startswith(("/usr/", str(torch.__path__[0])))]


def compile_object(source: Path, variant: Variant, folder: Path) -> Path:
    """Compile a file, unless an object of the same flags and contents is there."""
    target = folder / f"{source.stem}.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler(), *_flags(source, variant), "-MD", "-MF", f"{target}.d"]
    command += ["-c", str(source), "-o", str(target)]
    stamp = target.with_suffix(".json")
    wanted = [*command, _version(), torch.__version__]
    if target.exists() and stamp.exists():
        seen = json.loads(stamp.read_text())
        if seen["command"] == wanted and all(
            _digest(Path(path)) == digest for path, digest in seen["contents"].items()
        ):
            return target
    begin = time.perf_counter()
    stamp.unlink(missing_ok=True)
    for left_over in ("gcno", "gcda"):
        target.with_suffix(f".{left_over}").unlink(missing_ok=True)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode or run.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
    contents = {str(path): _digest(path) for path in _dependencies(Path(f"{target}.d"))}
    stamp.write_text(json.dumps({"command": wanted, "contents": contents}))
    print(f"emulated: {variant.name} {source.name} {time.perf_counter() - begin:.1f} s", flush=True)
    return target


def build(name: str, sources: Sequence[Path], variant: Variant = PLAIN) -> Path:
    """Build a shared library of these files and the emulator."""
    return link(FOLDER / variant.name / f"{name}.so", compile_all(sources, variant), variant)


def build_ops(variant: Variant = PLAIN) -> Path:
    """Build the torch library flatquant_emulated."""
    return link(FOLDER / variant.name / "ops.so", compile_all(ops_sources(), variant), variant)


def build_changed_ops(source: Path, variant: Variant, folder: Path) -> Path:
    """Link it anew with another version of the kernel file that has the name of ``source``.

    The other objects stay those of :func:`build_ops`.
    """
    emulator = [HERE / f"{name}.cpp" for name in EMULATOR]
    kept = [path for path in (*ops_sources(), *emulator) if path.name != source.name]
    objects = [FOLDER / variant.name / f"{path.stem}.o" for path in kept]
    return link(folder / "ops.so", [*objects, compile_object(source, variant, folder)], variant)


def ops_sources() -> list[Path]:
    """The files of flatquant_emulated, the emulator's own left out."""
    binding = [HERE / "binding.cpp", *(ROOT / "csrc/torch" / name for name in BINDING)]
    return [*kernel_sources(), *binding]


def compile_all(sources: Sequence[Path], variant: Variant) -> list[Path]:
    """Compile these files and the emulator, those that changed."""
    everything = [*sources, *(HERE / f"{name}.cpp" for name in EMULATOR)]
    with ThreadPoolExecutor(JOBS) as pool:
        folder = FOLDER / variant.name
        return list(pool.map(lambda path: compile_object(path, variant, folder), everything))


def link(target: Path, objects: Sequence[Path], variant: Variant) -> Path:
    """Link objects, unless they are older than the library."""
    command = [compiler(), "-shared", *map(str, objects), "-o", str(target), *variant.flags]
    command += [f"-Wl,-T,{HERE}/shared_section.ld"]
    command += [flag for flag in variant.kernel_flags if flag.startswith(("--cov", "-fsan"))]
    if any(path.stem == "binding" for path in objects):
        libraries = Path(torch.__file__).parent / "lib"
        command += ["-Wl,--no-as-needed", f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    stamp = target.with_suffix(".link")
    newest = max(path.stat().st_mtime_ns for path in [*objects, HERE / "shared_section.ld"])
    text = " ".join(command)
    if not (
        target.exists()
        and target.stat().st_mtime_ns >= newest
        and stamp.exists()
        and stamp.read_text() == text
    ):
        subprocess.run(command, check=True)
        stamp.write_text(text)
    return target
