"""Every quoted number has its line in docs/results, and the pages are up to date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import record  # noqa: E402


def test_pages_are_up_to_date():
    topics = record.read()
    assert (ROOT / "docs/results.md").read_text() == record.page(topics), "run make docs"
    readme = (ROOT / "README.md").read_text()
    assert readme == record.fill_in(readme, topics), "run make docs"


def test_readme_quotes_figures_and_states_none():
    readme = (ROOT / "README.md").read_text()
    quoted = record._QUOTE.findall(readme)
    assert len(quoted) >= 5
    table = [line for line in readme.splitlines() if line.startswith("|")]
    for line in table[2:]:
        assert not re.search(r"\d\.\d", record._QUOTE.sub("", line)), line


def test_append_and_read(tmp_path, capsys):
    record.append("speed", "a/b", 2.5, "us", folder=tmp_path, command="make bench")
    record.append("speed", "a/b", 3.5, "us", folder=tmp_path, command="make bench")
    assert "a/b: 3.5 us" in capsys.readouterr().out
    topics = record.read(tmp_path)
    assert [figure.value for figure in topics["speed"]] == [2.5, 3.5]
    assert [figure.value for figure in record.newest(topics["speed"])] == [3.5]
    text = "x <!-- result: a/b -->?<!-- end --> <!-- result: no -->1<!-- end -->"
    filled = record.fill_in(text, topics)
    assert filled == (
        "x <!-- result: a/b -->3.5 us<!-- end --> <!-- result: no -->not measured<!-- end -->"
    )
    page = record.page(topics)
    assert "| a/b | 3.5 us | `make bench` |" in page and "2.5" not in page


def test_kernels_without_a_gpu_figure_are_listed():
    figure = record.Figure(
        what="csrc/cuda/quantize.cu/has run", value=1.0, unit="", machine="m", device="H100",
        commit="c", command="x", date="d",
    )  # fmt: skip
    assert "quantize.cu" in record.never_run({})
    assert "quantize.cu" not in record.never_run({"gpu": [figure]})
    assert "csrc/cuda/quantize.cu" in record.page({})


@pytest.mark.parametrize("line", ["{", "[]", '{"what": "x"}'])
def test_a_line_that_is_no_figure_is_named(tmp_path, line):
    good = json.dumps(
        dict.fromkeys(("unit", "machine", "device", "commit", "command", "date"), "")
        | {"what": "w", "value": 1}
    )
    (tmp_path / "t.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:2 is not a figure"):
        record.read(tmp_path)


def test_a_value_must_be_a_number():
    with pytest.raises(ValueError, match="it must be a number"):
        record.append("t", "w", "fast")  # type: ignore[arg-type]
