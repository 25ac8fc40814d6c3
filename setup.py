"""Build: kernels by CMake, op library by torch's C++ extension (stable ABI), a pybind11 module.

Three settings, told apart here and named by `python -m flatquant_cuda`:
  no nvcc                  CPU ops only
  nvcc, CPU-only torch     all; the CUDA kernels are compiled as a check (FLATQUANT_CUDA=0: not)
  nvcc, torch with CUDA    all
torch is not a build requirement (it would pull gigabytes into pip's build environment): it is taken
from the environment that is installed into. Environment: FLATQUANT_CUDA=0, CUDA_HOME, CUTLASS_DIR,
MAX_JOBS; FLATQUANT_TEST_S4=1 builds the INT4 products of sm_8x for sm_90a, where they are exact and
slow: only to test them on a Hopper card.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent.resolve()
CMAKE_DIR = ROOT / "build" / "cmake"
SITE = Path(sysconfig.get_paths()["purelib"])  # the target's, also from pip's isolated build
LEAST_TORCH = (2, 11)

os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
if importlib.util.find_spec("torch") is None:
    sys.path.append(str(SITE))
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "flatquant: PyTorch is not installed in this environment: install torch >= 2.11 first "
        f"(pip's isolated build finds it there; uv needs --no-build-isolation). [{error}]"
    ) from None
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < LEAST_TORCH:
    raise SystemExit(f"flatquant: torch is {torch.__version__}: it must be 2.11 or newer")


def find_cuda_home() -> Path | None:
    """The toolkit: bin/nvcc and include/cuda_runtime.h (what is on PATH may be a wrapper)."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    candidates += sorted((SITE / "nvidia").glob("cu*"), reverse=True)
    for home in map(Path, filter(None, candidates)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def find_cutlass() -> Path | None:
    """CUTLASS headers: CUTLASS_DIR, or the nvidia-cutlass wheel in the target environment."""
    candidates = [os.environ.get("CUTLASS_DIR"), SITE / "cutlass_library/source/include"]
    return next((p for p in map(Path, filter(None, candidates)) if (p / "cutlass").is_dir()), None)


def output_of(*command: str) -> str:
    """What a command prints, or an empty string if there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


testing_s4 = os.environ.get("FLATQUANT_TEST_S4") == "1"
switched_off = os.environ.get("FLATQUANT_CUDA") == "0"
cuda_home = None if switched_off else find_cuda_home()
cutlass = find_cutlass() if cuda_home else None


def build_facts(native_module: bool) -> dict[str, object]:
    """What was built, with what, and for everything that was not, why."""
    not_built = {}
    if cuda_home is None:
        reason = (
            "FLATQUANT_CUDA=0 was set" if switched_off else "no nvcc with its headers was found"
        )
        not_built["cuda"] = reason
    elif cutlass is None:
        not_built["cutlass kernels"] = "no CUTLASS headers (nvidia-cutlass wheel, or CUTLASS_DIR)"
    if not native_module:
        not_built["flatquant_cuda._native"] = "pybind11 was not installed"
    sources = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))
    sources = [name for name in sources if cutlass or "_cutlass_" not in name]
    version = re.search(r"V([\d.]+)", output_of(f"{cuda_home}/bin/nvcc", "--version"))
    has_cuda = torch.version.cuda is not None
    with_nvcc = "nvcc and a torch with CUDA" if has_cuda else "nvcc and a CPU-only torch"
    return {
        "setting": with_nvcc if cuda_home else "CUDA off" if switched_off else "no nvcc",
        "torch": torch.__version__,
        "compiler": output_of(os.environ.get("CXX", "c++"), "--version").split("\n")[0],
        "nvcc": version.group(1) if version and cuda_home else None,
        "cpu_isas": ["portable", "avx2", "avx512", "amx"] if is_x86() else ["portable"],
        "cuda_architectures": {name: architectures(name) for name in sources if cuda_home},
        "testing_s4": testing_s4,
        "not_built": not_built,
    }


def is_x86() -> bool:
    """Whether the AVX variants are compiled (CMakeLists.txt has the same rule)."""
    return os.uname().machine in ("x86_64", "AMD64")


def architectures(source: str) -> list[str]:
    """Architectures of a CUDA source, from its name (CMakeLists.txt has the same rule)."""
    if source.endswith("_sm90.cu"):
        return ["sm_90a"]
    if source.endswith("_sm8x.cu"):
        return ["sm_90a"] if testing_s4 else ["sm_80", "sm_86", "sm_89"]
    return ["sm_80", "sm_86", "sm_89", "sm_90a", "compute_80"]


def forget_moved_build() -> None:
    """CMake refuses a build folder that was made elsewhere (a copied tree): start it anew."""
    cache = CMAKE_DIR / "CMakeCache.txt"
    if cache.exists():
        home = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache.read_text(), re.MULTILINE)
        if home is None or Path(home.group(1)) != ROOT:
            shutil.rmtree(CMAKE_DIR)


def run_cmake() -> None:
    """Build the static libraries; ptxas notes that a kernel runs serialised are errors."""
    forget_moved_build()
    ninja = shutil.which("ninja")
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(CMAKE_DIR)]
    configure += [f"-DFLATQUANT_CUDA={'ON' if cuda_home else 'OFF'}"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure += [f"-DCMAKE_CUDA_COMPILER={cuda_home}/bin/nvcc"] if cuda_home else []
    configure += [f"-DCUTLASS_DIR={cutlass or ''}"]
    configure += [f"-DFLATQUANT_TEST_S4={'ON' if testing_s4 else 'OFF'}"]
    subprocess.run(configure, check=True)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    build = ["cmake", "--build", str(CMAKE_DIR), "--parallel", jobs]
    with subprocess.Popen(build, stdout=subprocess.PIPE, text=True) as process:
        serialised = False
        for line in process.stdout or ():
            print(line, end="", flush=True)
            serialised |= "(C75" in line
    if process.returncode or serialised:
        raise SystemExit(
            f"flatquant: `{' '.join(build)}` failed; the messages above say where"
            if process.returncode
            else "flatquant: ptxas reports a serialised kernel, (C75..) above: that is an error"
        )


class Build(BuildExtension):
    """Runs CMake before the extensions are linked, and leaves the build facts beside them."""

    def build_extensions(self) -> None:
        """Build everything."""
        run_cmake()
        super().build_extensions()
        self.write_facts()

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the package is the source folder."""
        super().copy_extensions_to_source()
        self.write_facts()

    def write_facts(self) -> None:
        """Write _build.json into the package being built."""
        native = any(ext.name == "flatquant_cuda._native" for ext in self.extensions)
        folder = Path(self.get_ext_fullpath("flatquant_cuda._ops")).parent
        facts = json.dumps(build_facts(native), indent=2)
        (folder / "_build.json").write_text(facts + "\n", encoding="utf-8")


def extensions() -> list:
    """The op library, and the contract's scalars for tests if pybind11 is there."""
    sources = ["schema.cpp", "args.cpp", "ops_cpu.cpp"]
    sources += [f"decoder_{part}.cpp" for part in ("plan", "stack", "cpu")]
    sources += ["head.cpp"]
    sources += ["ops_cuda.cpp"] if cuda_home else []
    flags = [
        "-std=c++17",
        "-O2",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    headers = [str(path) for path in ROOT.glob("csrc/**/*.h")]
    objects = [str(CMAKE_DIR / "libfq_cpu.a")]
    link = ["-Wl,--no-as-needed", "-Wl,--exclude-libs,ALL", "-Wl,-s"]
    if cuda_home:
        objects.append(str(CMAKE_DIR / "libfq_cuda.a"))
        static = next(
            p for p in ("lib64", "lib") if (cuda_home / p / "libcudart_static.a").exists()
        )
        link += [f"-L{cuda_home / static}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    found = [
        CppExtension(
            "flatquant_cuda._ops",
            [f"csrc/torch/{name}" for name in sources],
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030a0000")],
            extra_compile_args={"cxx": flags},
            extra_objects=objects,
            extra_link_args=link,
            depends=[*objects, *headers],
        )
    ]
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        warnings.warn(
            "flatquant: pybind11 is not installed: without flatquant_cuda._native some "
            "tests are skipped",
            stacklevel=1,
        )
        return found
    found.append(
        Pybind11Extension(
            "flatquant_cuda._native",
            sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/native/*.cpp")),
            cxx_std=17,
            extra_compile_args=["-O2", "-ffp-contract=off"],
            depends=headers,
        )
    )
    return found


setup(
    packages=[
        "flatquant_cuda",
        *find_namespace_packages("python", include=["flatquant*"], exclude=["*.__pycache__*"]),
    ],
    package_dir={"flatquant_cuda": "flatquant_cuda", "flatquant": "python/flatquant"},
    package_data={"flatquant_cuda": ["py.typed"], "flatquant": ["py.typed", "report/templates/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=True)},
)
