"""The scripts for a GPU window, dry: every line that a GPU would run, on the CPU, with small sizes.

Times mean nothing here. What must not happen is that a short loan of a GPU ends at a typo.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.cache_utils import StaticLayer

from flatquant_cuda import decoder, library

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"

pytestmark = pytest.mark.skipif(not library.loaded, reason="no native library")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of bench/ whose figures go to a folder of the test."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("OUT", str(tmp_path))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return __import__(name)

    yield load
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and BENCH in Path(str(sys.modules[name].__file__)).parents
        ):
            del sys.modules[name]


@pytest.fixture
def ops(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu_ops on the CPU, with one small size of everything; figures are collected."""
    module: Any = bench("gpu_ops")
    harness: Any = bench("harness")
    figures: list[tuple[str, float]] = []

    def measure(call: Callable[..., Any], inputs: Any, **_: Any) -> Any:
        for arguments in inputs:
            call(*arguments)
        return harness.timing([1e-3, 2e-3])

    def figure(topic: str, what: str, value: float, unit: str) -> None:
        figures.append((f"{topic}/{what}", value))

    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "measure_in_graph", measure)
    monkeypatch.setattr(module, "rotate", lambda make, most=2: [make(0), make(1)])
    monkeypatch.setattr(module, "figure", figure)
    monkeypatch.setattr(module, "wrong", [])
    sizes = {
        "WIDTHS": (64,),
        "BATCHES": (1,),
        "PREFILL": 8,
        "LAYERS": {"8192x8192": (64, 64)},
        "TOKENS": (16, 24),
        "DECODE_SHAPES": ((64, 128),),
        "DECODE_TOKENS": (1, 24),
        "CONTEXTS": ((2, 4, 2, 40),),
    }
    for name, value in sizes.items():
        assert type(getattr(module, name)) is type(value), name
        monkeypatch.setattr(module, name, value)
    module.collected = figures
    return module


class Ceilings:
    """What the card reaches."""

    bytes, bf16, int8 = 1e12, 1e14, 2e14


def test_tables_of_ops(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (ops.decode_table, ops.attention_table, ops.gemm_table, ops.transform_table):
        ops.collected.clear()
        table(Ceilings(), lambda: 1e9)
        assert ops.collected and not ops.wrong, table
        assert all(value > 0 for _, value in ops.collected), table
    ops.online_transforms(Ceilings())
    assert any("before down" in what for what, _ in ops.collected)
    ops.collected.clear()
    ops.decode_table(Ceilings(), lambda: 1.0)
    assert not ops.collected  # out of time


def test_answers_are_checked(ops: Any) -> None:
    for op in ("gemm_w4a4", "gemm_w4a8", "gemm_w4a16"):
        inputs = ops.decode_inputs(op, 4, 64, 128)(0)
        assert ops.decode_answers(op, inputs), op


def test_models(bench: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    if not decoder.available():
        pytest.skip("no native decoder_stack")
    if not hasattr(StaticLayer(max_cache_len=1), "cumulative_length"):
        pytest.skip("the static cache of this transformers does not count on the device")
    models: Any = bench("gpu_models")
    assert models.main(["--dry-run", "--scheme", "W4A8KV4", "W4A4KV4"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "decode at 16",
        "peak memory",
        "prefill 24",
        "text of 6",
        "a layer of tiny/decode",
    ):
        assert re.search(rf"{part}.*/W4A8KV4 against bfloat16: ", shown), part
    assert "W4A4KV4 against bfloat16" in shown and "no fast path" not in shown
    assert models.main(["--dry-run", "--seconds-left", "1"]) == 0
    assert "no time left for tiny" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        models.main(["sing"])


def test_sizes_of_the_random_models(bench: Callable[[str], ModuleType]) -> None:
    contestants: Any = bench("gpu_contestants")
    for name, billions in (("7B", 6.74), ("8B", 8.03)):
        model = contestants.empty_model(contestants.config_of(name))
        count = sum(p.numel() for p in model.parameters())
        assert abs(count / 1e9 - billions) < 0.01, name
    config = contestants.config_of("7B", layers=1)
    assert (config.num_hidden_layers, config.hidden_size) == (1, 4096)


def test_cases_need_a_gpu(bench: Callable[[str], ModuleType], monkeypatch: Any) -> None:
    cases: Any = bench("gpu_cases")
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu_cases.py"])
        assert cases.main() == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    sources = {
        op: cases.sources(op) for op in [*library.OPS, "decoder_stack"] if op in cases.SOURCES
    }
    everything = {path.name for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert all(found and set(found) <= everything for found in sources.values())
    ran = {name for found in sources.values() for name in found}
    # without a line of their own: what asks the device, and what is for other cards
    assert {n for n in everything - ran if "_sm8x" not in n} == {"gpu.cu", "gemm_cutlass_sm90.cu"}


STEPS = {
    "ops": ["info", "cases", "tests", "memcheck", "racecheck", "synccheck", "bench"],
    "models": ["info", "stack", "graphs", "7B", "8B", "layer", "compiled"],
}


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
@pytest.mark.parametrize(("what", "failing"), [("ops", "cases"), ("models", "stack")])
def test_the_window_notes_failures_and_goes_on(what: str, failing: str, tmp_path: Path) -> None:
    """Every step is started, in order; a failing one does not stop the next."""
    python, tool = tmp_path / "python", tmp_path / "compute-sanitizer"
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *gpu_cases*) exit 3;; esac\n')
    tool.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    tool.chmod(0o755)
    settings = {"OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    run = subprocess.run(
        ["bash", str(BENCH / "gpu_window.sh"), what],
        env=os.environ | settings | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    steps = re.findall(r'"step": "(\w+)", "rc": (\d+)', run.stdout)
    assert [name for name, _ in steps] == STEPS[what], run.stdout
    assert [name for name, rc in steps if rc != "0"] == [failing] and run.returncode == 1
    log = (tmp_path / "out/log.txt").read_text()
    for script in re.findall(r"bench/\w+\.py|tests/\S+\.py", log):
        assert (ROOT / script).exists(), script
    lines = (tmp_path / "out/steps.jsonl").read_text().splitlines()
    assert len(lines) == len(steps)
