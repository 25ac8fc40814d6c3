"""Which scheme a processor runs fastest, and why, from what the kernels' planners expect of it.

A GPU's numbers come from the planners (csrc/cuda/plan_*.h): nominal clocks, bandwidths and rates of
the table in csrc/cuda/gpu.h, whose ratios decide which kernel is launched. They are estimates, made
without the GPU, of the four products of a decoder layer; docs/results.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from flatquant_cuda.library import cpu_isa, loaded

DECODE, PREFILL = 1, 2048  # tokens

#: Output and input features of the products of a Llama-3-8B layer, joined as on CUDA.
LAYER = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))

#: Bits of activations and weights; 16: floats.
SCHEMES = {"W4A4": (4, 4), "W4A8": (8, 4), "W8A8": (8, 8), "W4A16": (16, 4)}

_SAME = 1.05  # times that differ by less are the same to a model of nominal numbers
_INT4 = (80, 86, 89)  # compute capabilities with INT4 tensor cores
_NO_PLANNERS = "flatquant_cuda._native is not built (it needs pybind11): no planners to ask"

#: What the instructions of a CPU multiply; all of them widen 4-bit activations to bytes.
_CPUS = {
    "portable": "plain C++: every product widens its codes to int32",
    "avx2": "AVX2 multiplies pairs of bytes; there is no 4-bit product",
    "avx512": "AVX-512 VNNI multiplies four bytes at a time; there is no 4-bit product",
    "amx": "AMX multiplies tiles of bytes; there is no 4-bit product",
}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to choose for a processor.

    Attributes:
        target: the processor.
        prefill: the fastest scheme for prompts and large batches.
        decode: the fastest scheme for single tokens.
        choice: W4A4KV4 where INT4 tensor cores make it faster, else W4A8KV4: more accurate.
        reason: why.
        microseconds: scheme -> (decode, prefill), of a layer; empty for a CPU.
    """

    target: str
    prefill: str
    decode: str
    choice: str
    reason: str
    microseconds: dict[str, tuple[float, float]]


def advise(target: str) -> Advice:
    """Advice for a processor.

    Args:
        target: the name of a GPU in the table, "sm_90" and the like for the first GPU of that
            compute capability, or an instruction set of CPUs; "cpu" is the one in use here.

    Raises:
        ValueError: there is no such processor.
        ImportError: a GPU is asked for, and the planners are not built.
    """
    isa = (cpu_isa() if loaded else "portable") if target == "cpu" else target
    if isa in _CPUS:
        reason = f"{_CPUS[isa]}, so A8 costs nothing over A4 and is more accurate"
        return Advice(
            target=f"CPU, {isa}",
            prefill="W4A8",
            decode="W4A8",
            choice="W4A8KV4",
            reason=reason,
            microseconds={},
        )
    gpus = _gpus()
    gpu = next((g for g in gpus if target in (g["name"], f"sm_{g['arch']}")), None)
    if gpu is None:
        known = [gpu["name"] for gpu in gpus]
        raise ValueError(f"device is {target!r}: it must be cpu, {', '.join([*_CPUS, *known])}")
    return _advise_gpu(gpu)


def targets() -> list[str]:
    """Every processor there is advice for: instruction sets, then GPUs."""
    return [*_CPUS, *(gpu["name"] for gpu in _gpus())]


def here() -> tuple[list[str], list[str]]:
    """Processors of this machine with advice, the CPU first; and the others, with the reason."""
    found, others = ["cpu"], []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        target = f"sm_{10 * major + minor}"
        try:
            advise(target)
        except (ImportError, ValueError) as error:
            why = f"{error}" if major >= 8 else "the CUDA kernels need sm_80 or newer"
            others.append(f"{torch.cuda.get_device_name(index)} ({target}): no advice: {why}")
        else:
            found.append(target)
    return list(dict.fromkeys(found)), others


def as_text(advices: Sequence[Advice]) -> str:
    """A table in Markdown, and the reasons below it."""
    lines = [
        f"| processor | choose | {' | '.join(SCHEMES)} | fastest: prefill | decode |",
        f"|---|---|{'---:|' * len(SCHEMES)}---|---|",
    ]
    for advice in advices:
        times = [
            "{1:.0f} / {0:.0f}".format(*advice.microseconds[scheme]) if advice.microseconds else ""
            for scheme in SCHEMES
        ]
        cells = (advice.target, advice.choice, *times, advice.prefill, advice.decode)
        lines.append(f"| {' | '.join(cells)} |")
    reasons: dict[str, list[str]] = {}
    for advice in advices:
        reasons.setdefault(advice.reason, []).append(advice.target)
    lines.append("")
    lines += [f"- {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return "\n".join(lines)


def _planners() -> Any:
    """The module that asks the planners."""
    try:
        return import_module("flatquant_cuda._native")
    except ImportError as error:
        raise ImportError(_NO_PLANNERS) from error


def _gpus() -> list[dict[str, Any]]:
    """The table of GPUs."""
    found: list[dict[str, Any]] = _planners().gpus()
    return found


def layer_microseconds(gpu: dict[str, Any], scheme: str, tokens: int) -> float:
    """What the planners expect of the products of a layer."""
    planners = _planners()
    a_bits, w_bits = SCHEMES[scheme]
    clocks = 0.0
    for n, k in LAYER:
        if a_bits == 16:
            plan = planners.plan_w4a16(gpu, [tokens], n, k)
        else:
            plan = planners.plan_gemm(gpu, [tokens], n, k, a_bits=a_bits, w_bits=w_bits)
        clocks += float(plan["clocks"][0])
    return clocks / planners.gigahertz(gpu["arch"]) / 1000


def _advise_gpu(gpu: dict[str, Any]) -> Advice:
    times = {
        scheme: (layer_microseconds(gpu, scheme, DECODE), layer_microseconds(gpu, scheme, PREFILL))
        for scheme in SCHEMES
    }
    decode, prefill = (_fastest({scheme: t[i] for scheme, t in times.items()}) for i in (0, 1))
    ratio = times["W4A8"][1] / times["W4A4"][1]
    same = ratio <= _SAME and times["W4A8"][0] <= _SAME * times["W4A4"][0]
    if gpu["arch"] in _INT4 and not same:
        reason = (
            f"INT4 tensor cores make twice the products of INT8: prompts take {ratio:.1f} times as "
            "long with A8; single tokens wait for the weights' bytes, and A8 costs nothing there"
        )
    elif same:
        reason = (
            "there are no INT4 tensor cores: 4-bit activations are multiplied as bytes, so A8 "
            "costs nothing over A4 and is more accurate"
        )
    else:
        reason = (
            "there are no INT4 tensor cores, and A8 is more accurate; A4 would move half the bytes "
            "of activations, but no kernel is tuned for this card, so the estimate is a rough one"
        )
    if prefill == "W8A8":
        gain = times["W4A8"][1] / times["W8A8"][1] - 1
        loss = times["W8A8"][0] / times["W4A8"][0]
        reason += (
            f"; prompts are {100 * gain:.0f}% faster still with W8A8, single tokens {loss:.1f} "
            "times slower, and the weights twice as large"
        )
    return Advice(
        target=f"{gpu['name']} (sm_{gpu['arch']})",
        prefill=prefill,
        decode=decode,
        choice="W4A4KV4" if gpu["arch"] in _INT4 and not same else "W4A8KV4",
        reason=reason,
        microseconds=times,
    )


def _fastest(times: dict[str, float]) -> str:
    """The most accurate scheme of those that are as fast as the fastest."""
    least = min(times.values())
    near = [scheme for scheme, time in times.items() if time <= _SAME * least]
    return max(near, key=lambda s: (SCHEMES[s][0] if SCHEMES[s][0] < 16 else 0, -SCHEMES[s][1]))
