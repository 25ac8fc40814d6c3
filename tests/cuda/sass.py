"""Reading the machine code of the CUDA build, which needs no GPU.

A static library holds one object per source and an object one cubin per architecture. ``cuobjdump``
takes the cubins out and knows each kernel's registers and memory; ``nvdisasm`` lists its
instructions. Both come from PyPI (``nvidia-cuda-cuobjdump``, ``nvidia-cuda-nvdisasm``) or from a
CUDA toolkit on PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Resources = dict[str, int]  # "REG", "STACK", "SHARED", "LOCAL": cuobjdump's words


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    source: str  # "quantize.cu"
    arch: str  # "sm_80"
    name: str  # as C++ spells it
    threads: int  # the most of a block
    registers: int  # per thread
    shared: int  # bytes, static; what the driver reserves for itself is left out
    local: int  # bytes per thread, stack included
    opcodes: Counter[str] = field(hash=False)  # "IMMA.16864.S4.S4" -> how many
    calls: frozenset[str]  # names of the subroutines called

    def count(self, *prefixes: str) -> int:
        """How many instructions start with one of the prefixes."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes))

    def __str__(self) -> str:
        name = re.sub(r"\b(fq|cuda|\(anonymous namespace\)|cutlass|cute|gemm)::", "", self.name)
        return f"{self.source} {self.arch} {name[:160]}"


@cache
def tool(name: str) -> str | None:
    """The path of ``cuobjdump`` or ``nvdisasm``, or None."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    wheels = sorted(packages.glob(f"*/bin/{name}"), reverse=True)
    return str(wheels[0]) if wheels else shutil.which(name)


def missing_tools() -> list[str]:
    """What is not installed of all that this module runs."""
    return [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None] + [
        name for name in ("ar", "c++filt") if shutil.which(name) is None
    ]


def _run(*command: str | Path, cwd: Path | None = None, stdin: str | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    # cuobjdump reports an object without device code as an error; the listing is then empty.
    if done.returncode and "does not contain device code" not in done.stdout + done.stderr:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout


def ptx_count(binary: Path) -> int:
    """How many PTX texts an object, a static library or a shared one holds."""
    return len(re.findall(r"PTX file\s+\d+: ", _run(tool("cuobjdump") or "", "-lptx", binary)))


def _resources(binary: Path) -> Iterator[tuple[str, str, Resources]]:
    """Architecture ("" in a cubin), mangled name and resource usage of a binary's kernels."""
    arch = ""
    name = ""
    for line in _run(tool("cuobjdump") or "", "--dump-resource-usage", binary).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif line.startswith("  REG:"):
            yield arch, name, {key: int(n) for key, n in re.findall(r"([A-Z]+):(\d+)", line)}


def kernel_names(binary: Path) -> set[tuple[str, str]]:
    """Architecture and mangled name of every kernel in a binary, a stripped one too."""
    return {(arch, name) for arch, name, _ in _resources(binary)}


def instructions(listing: str) -> dict[str, tuple[Counter[str], set[str]]]:
    """Opcodes and called subroutines of every function in ``nvdisasm -c``'s listing."""
    found: dict[str, tuple[Counter[str], set[str]]] = {}
    opcodes: Counter[str] = Counter()
    calls: set[str] = set()
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\S+):$", line):
            opcodes, calls = found.setdefault(match[1], (Counter(), set()))
        elif match := re.match(
            r"\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line
        ):
            opcodes[match[1]] += 1
            if match[1].startswith("CALL"):
                target = re.search(r"`\((.+?)\)", line)
                calls.add(target[1] if target else "(register)")
    return found


def demangled(names: list[str]) -> list[str]:
    """C++ names. Those of CUTLASS are deep: -r lifts a limit."""
    return _run("c++filt", "-r", stdin="\n".join(names) + "\n").splitlines() if names else []


def _block_sizes(cubin: Path) -> dict[str, int]:
    """The most threads of a block, by mangled name: what __launch_bounds__ said."""
    sizes = {}
    name = ""
    attribute = ""
    for line in _run(tool("cuobjdump") or "", "-elf", cubin).splitlines():
        if match := re.match(r"\.nv\.info\.(\S+)$", line):
            name = match[1]
        elif match := re.match(r"\s+Attribute:\s+(\w+)", line):
            attribute = match[1]
        elif attribute == "EIATTR_MAX_THREADS" and (match := re.match(r"\s+Value:\s+(\w+)", line)):
            sizes[name] = int(match[1], 16)
            attribute = ""
    return sizes


def read_cubin(cubin: Path, source: str, arch: str) -> list[Kernel]:
    """Every kernel of a cubin."""
    code = instructions(_run(tool("nvdisasm") or "", "-c", "-ndf", cubin))
    resources = {name: used for _, name, used in _resources(cubin)}
    sizes = _block_sizes(cubin)
    # From sm_90 on, the driver keeps the first KiB of every block's shared memory.
    reserved = 1024 if int(re.sub(r"\D", "", arch)) >= 90 else 0
    kernels = []
    for mangled, name in zip(code, demangled(list(code)), strict=True):
        used = resources[mangled]
        opcodes, calls = code[mangled]
        kernels.append(
            Kernel(
                source=source,
                arch=arch,
                name=name,
                threads=sizes.get(mangled, 1024),
                registers=used["REG"],
                shared=max(used["SHARED"] - reserved, 0),
                local=used["LOCAL"] + used["STACK"],
                opcodes=opcodes,
                calls=frozenset(calls),
            )
        )
    return kernels


def objects(binary: Path, scratch: Path) -> dict[str, Path]:
    """The objects of a static library by the name of their source; an object stands for itself."""
    if binary.suffix != ".a":
        return {binary.name.removesuffix(".o"): binary.resolve()}
    _run("ar", "x", binary.resolve(), cwd=scratch)
    return {path.name.removesuffix(".o"): path for path in sorted(scratch.glob("*.o"))}


def read_cubins(cubins: list[tuple[Path, str, str]]) -> list[Kernel]:
    """Every kernel of some (cubin, source, architecture)."""
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda cubin: read_cubin(*cubin), cubins)
        return [kernel for part in parts for kernel in part]


def read(files: dict[str, Path], scratch: Path) -> list[Kernel]:
    """Every kernel of some objects, once per architecture."""
    cubins = []
    for source, file in files.items():
        folder = scratch / f"{source}.cubins"
        folder.mkdir()
        _run(tool("cuobjdump") or "", "-xelf", "all", file, cwd=folder)
        # "name.1.sm_80.cubin"
        cubins += [(path, source, path.suffixes[-2][1:]) for path in sorted(folder.iterdir())]
    return read_cubins(cubins)


def read_ptx(files: dict[str, Path], scratch: Path) -> dict[str, list[Path]]:
    """The PTX texts of some objects, by source; those without have an empty list."""
    found = {}
    for source, file in files.items():
        folder = scratch / f"{source}.ptx"
        folder.mkdir()
        if ptx_count(file):
            _run(tool("cuobjdump") or "", "-xptx", "all", file, cwd=folder)
        found[source] = sorted(folder.iterdir())
    return found
