"""Advice on schemes: from the planners' numbers, for every processor, and as the docs quote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flatquant import kernels
from flatquant.cli import main
from flatquant.kernels import SCHEMES, advise, as_text, here, layer_microseconds, targets

native: Any = pytest.importorskip(
    "flatquant_cuda._native", reason="flatquant_cuda._native was not built (pybind11)"
)
GPUS = {gpu["name"]: gpu for gpu in native.gpus()}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def test_every_processor_has_advice() -> None:
    assert targets() == ["portable", "avx2", "avx512", "amx", *GPUS]
    for target in targets():
        advice = advise(target)
        assert advice.choice in ("W4A4KV4", "W4A8KV4") and advice.reason
        assert {advice.prefill, advice.decode} <= set(SCHEMES)
        assert all(time > 0 for pair in advice.microseconds.values() for time in pair)


@pytest.mark.parametrize("name", GPUS)
def test_the_choice_follows_from_the_times(name: str) -> None:
    advice, arch = advise(name), GPUS[name]["arch"]
    decode, prefill = ({s: t[i] for s, t in advice.microseconds.items()} for i in (0, 1))
    assert decode["W4A8"] <= 1.05 * min(decode.values())  # bytes of weights decide
    assert decode["W8A8"] > 1.5 * decode["W4A8"] and advice.decode == "W4A8"
    assert prefill[advice.prefill] <= 1.05 * min(prefill.values())
    if arch in (80, 86, 89):
        assert advice.choice == "W4A4KV4" and prefill["W4A8"] > 1.5 * prefill["W4A4"]
        assert "INT4 tensor cores make twice" in advice.reason
    else:
        assert advice.choice == "W4A8KV4" and "no INT4 tensor cores" in advice.reason
    if arch == 90:  # A8 costs nothing over A4
        assert prefill["W4A8"] <= prefill["W4A4"]


def test_times_are_those_of_the_planner() -> None:
    gpu = GPUS["H100 SXM"]
    clocks = sum(
        float(native.plan_gemm(gpu, [1], n, k, a_bits=8, w_bits=4)["clocks"][0])
        for n, k in kernels.LAYER
    )
    assert layer_microseconds(gpu, "W4A8", 1) == clocks / native.gigahertz(90) / 1000
    weights = sum(n * k / 2 for n, k in kernels.LAYER)
    assert layer_microseconds(gpu, "W4A8", 1) > weights / gpu["bandwidth_gb"] / 1000  # the floor


def test_names() -> None:
    assert advise("sm_90") == advise("H100 SXM")
    assert advise("cpu").target.startswith("CPU, ")
    with pytest.raises(ValueError, match="device is 'sm_75': it must be cpu, portable"):
        advise("sm_75")


def test_cards_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(9, 0), (7, 5), (9, 0), (8, 7)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    found, others = here()
    assert found == ["cpu", "sm_90"]
    assert others[0] == "card 1 (sm_75): no advice: the CUDA kernels need sm_80 or newer"
    assert others[1].startswith("card 3 (sm_87): no advice: device is 'sm_87': it must be")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--device", "H100 SXM", "avx2"]) == 0
    shown = capsys.readouterr().out
    assert shown == as_text([advise("H100 SXM"), advise("avx2")]) + "\n"
    assert main(["kernels"]) == 0
    assert "| CPU, " in capsys.readouterr().out
    assert main(["kernels", "--device", "abacus"]) == 2
    assert "device is 'abacus'" in capsys.readouterr().err


def test_the_docs_quote_it() -> None:
    """Between the marks of docs/kernels.md stands what `flatquant kernels --device all` prints."""
    text = PAGE.read_text(encoding="utf-8")
    quoted = text.split("<!-- advice -->\n")[1].strip()
    assert quoted == as_text([advise(target) for target in targets()]), (
        "put the output of `flatquant kernels --device all` into docs/kernels.md"
    )
