"""The native op library: loading it, and knowing which op it answers on which device."""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .packing import BYTES, PACKED

OPS = (
    "quantize_activation",
    "kronecker",
    "kronecker_quantize",
    "hadamard",
    "gemm_w4a4",
    "gemm_w4a8",
    "gemm_w8a8",
    "gemm_w4a16",
    "kv_quantize_append",
    "kv_dequantize",
    "attention_decode",
    "fake_quantize",
    "fake_quantize_backward",
)
ISAS = ("portable", "avx2", "avx512", "amx")

_HERE = Path(__file__).parent
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}


_file = next(iter(sorted(_HERE.glob("_ops*.so"))), None)


def _load() -> str | None:
    """Load the op library; returns why that failed, or None."""
    if _file is None:
        return "it was not built (no _ops*.so beside flatquant_cuda/__init__.py)"
    try:
        torch.ops.load_library(str(_file))
    except (OSError, RuntimeError) as error:
        return f"{_file.name} does not load: {error}"
    return None


_failure = _load()
loaded = _failure is None
_native: frozenset[tuple[str, str]] = frozenset()  # (op, device type) pairs with a kernel
_warned = False


def find_kernels() -> None:
    """Ask the dispatcher which ops have kernels; ops.py calls it once its fakes are registered."""
    global _native
    if loaded:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        _native = frozenset(
            (op, device)
            for op in OPS
            for device, key in _KEYS.items()
            if has_kernel(f"flatquant_cuda::{op}", key)
        )


def register_fake(op: str, function: Callable[..., object]) -> None:
    """Make ``function`` the shape function of ``op``, if the library is there.

    It is also what answers if some tensor is on the device ``meta``: so it refuses tensors on two
    devices, as the kernels do.
    """
    if not loaded:
        return
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: object, **kwargs: object) -> object:
        tensors = []
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            values = {name: value}
            if isinstance(value, list | tuple):
                values = {f"{name}[{i}]": entry for i, entry in enumerate(value)}
            tensors += [(n, v.device) for n, v in values.items() if isinstance(v, torch.Tensor)]
        for name, device in tensors:
            if device != tensors[0][1]:
                raise RuntimeError(
                    f"{op}: {name} is on another device than {tensors[0][0]}: they must be on one"
                )
        return function(*args, **kwargs)

    torch.library.register_fake(f"flatquant_cuda::{op}")(checked)


def backend(op_name: str, device: str = "cpu") -> str:
    """Say what answers ``op_name`` on ``device``: ``"native"`` or ``"reference"``.

    Raises ValueError for an unknown op.
    """
    if op_name not in OPS:
        raise ValueError(f"backend: op_name is {op_name!r}: it must be one of {', '.join(OPS)}")
    return "native" if (op_name, device.split(":")[0]) in _native else "reference"


def is_native(op_name: str, x: torch.Tensor) -> bool:
    """Whether a kernel answers ``op_name`` on ``x``'s device; warns once if nothing is loaded."""
    global _warned
    if not loaded and not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"flatquant_cuda answers from its slow PyTorch reference: {_failure}. "
            "Run `python -m flatquant_cuda` for details.",
            UserWarning,
            stacklevel=3,
        )
    return (op_name, x.device.type) in _native


def activation_layout(device: torch.device) -> int:
    """Layout in which ``device``'s fastest GEMM reads 4-bit activation codes.

    ``packing.BYTES`` on CUDA devices of compute capability 9.0, whose matrix units have no 4-bit
    product, else ``packing.PACKED``.
    """
    return PACKED if device.type != "cuda" else _cuda_activation_layout(device.index or 0)


@torch.compiler.assume_constant_result
def _cuda_activation_layout(index: int) -> int:
    return BYTES if torch.cuda.get_device_capability(index) == (9, 0) else PACKED


def build_info() -> dict[str, Any]:
    """Describe this installation as JSON data: build facts, versions, ISA, ops per device."""
    facts_file = _HERE / "_build.json"
    facts: dict[str, Any] = {}
    if facts_file.exists():
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
    devices = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            devices.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return {
        "library": "loaded" if loaded else f"not loaded: {_failure}",
        "build": facts,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_isa": _described_isa(),
        "ops": {d: {op: backend(op, d) for op in OPS} for d in ("cpu", "cuda")},
        "cuda_devices": devices,
    }


def cpu_isa(force: str | None = None) -> str:
    """Name the instruction set the CPU kernels run on; ``force`` lowers it (for tests).

    Raises RuntimeError if the library is not loaded, ValueError for an unknown name.
    """
    if _file is None or not loaded:
        raise RuntimeError(f"cpu_isa: the library is not loaded: {_failure}")
    if force is not None and force not in ISAS:
        raise ValueError(f"cpu_isa: force is {force!r}: it must be one of {', '.join(ISAS)}")
    choose = ctypes.CDLL(str(_file)).flatquant_cpu_isa
    choose.restype = ctypes.c_char_p
    name: bytes = choose(ctypes.c_int32(-1 if force is None else ISAS.index(force)))
    return name.decode()


def _described_isa() -> str:
    wanted = os.environ.get("FLATQUANT_CPU_ISA")
    note = "" if wanted in (None, *ISAS) else f" (FLATQUANT_CPU_ISA={wanted} is unknown: ignored)"
    return cpu_isa() + note if loaded else "none: the library is not loaded"
