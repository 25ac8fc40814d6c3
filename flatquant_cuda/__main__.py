"""``python -m flatquant_cuda``: what is built and why not the rest; ``--json`` for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from .library import build_info


def describe(info: dict[str, Any]) -> str:
    """Format :func:`flatquant_cuda.build_info` for people."""
    build = info["build"]
    torch = f"{info['torch']}, " + (f"CUDA {info['torch_cuda']}" if info["torch_cuda"] else "CPU")
    rows = [
        ("library", info["library"]),
        ("python", f"{info['python']} on {info['machine']}"),
        ("torch", torch),
        ("CPU runs on", info["cpu_isa"]),
        ("CUDA devices", ", ".join(info["cuda_devices"]) or "none"),
    ]
    if build:
        rows += [
            ("built with", f"{build['setting']}; torch {build['torch']}; {build['compiler']}"),
            ("nvcc", build["nvcc"] or "none"),
            ("CPU variants", ", ".join(build["cpu_isas"])),
        ]
        rows += _by_architecture(build["cuda_architectures"])
        rows += [(f"not built: {what}", why) for what, why in build["not_built"].items()]
    for device, ops in info["ops"].items():
        for backend in ("native", "reference"):
            names = [op for op, found in ops.items() if found == backend]
            why = f" ({_why(info, device)})" if backend == "reference" else ""
            if names:
                rows.append((f"{device} {backend}", ", ".join(names) + why))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _by_architecture(sources: dict[str, list[str]]) -> list[tuple[str, str]]:
    """One row per set of architectures: the kernel files compiled for just these."""
    groups: dict[str, list[str]] = {}
    for source, names in sources.items():
        targets = ", ".join(names).replace("compute_80", "newer (PTX)")
        groups.setdefault(targets, []).append(source.removesuffix(".cu"))
    return [(f"CUDA {targets}", ", ".join(files)) for targets, files in groups.items()]


def _why(info: dict[str, Any], device: str) -> str:
    """Why the ops that the reference answers on a device have no kernel there."""
    if info["library"] != "loaded":
        return "the library is not loaded"
    reason = info["build"].get("not_built", {}).get("cuda") if device == "cuda" else None
    return f"not built: {reason}" if reason else "this version has no kernel for them"


def main(arguments: list[str]) -> int:
    """Print the description; returns the exit status."""
    if arguments not in ([], ["--json"]):
        print("usage: python -m flatquant_cuda [--json]", file=sys.stderr)
        return 2
    info = build_info()
    print(json.dumps(info, indent=2) if arguments else describe(info))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
