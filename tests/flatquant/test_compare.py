"""Comparisons: what the numbers mean, that they are those of the single commands, and resuming."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import flatquant
from flatquant.cli import main
from flatquant.compare import (
    Comparison,
    Row,
    as_csv,
    as_json,
    as_text,
    beside,
    compare,
    paper,
)
from flatquant.compare import run as run_module
from flatquant.compare.agreement import AgreementMeter, Reference, capture
from flatquant.compare.job import Job
from flatquant.sources import load_model
from flatquant.text import tokenize_file

from .conftest import build_tiny_model
from .word_tokenizer import word_tokenizer


def _write(file: Path, seed: int) -> Path:
    ids = torch.randint(2, 128, (200,), generator=torch.Generator().manual_seed(seed))
    file.write_text(" ".join(f"w{index}" for index in ids.tolist()))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    build_tiny_model().save_pretrained(root / "model")
    word_tokenizer().save_pretrained(root / "model")
    _write(root / "test.txt", 0)
    _write(root / "valid.txt", 1)
    return root


def _what(folder: Path, **changes: object) -> Comparison:
    what = Comparison(
        model=folder / "model",
        methods=("rtn", "flatquant", "rtn+gptq"),
        schemes=("W4A4KV4",),
        calibration=folder / "valid.txt",
        texts={"test": folder / "test.txt"},
        samples=2,
        seqlen=16,
        epochs=1,
        window=32,
        speed=False,
    )
    return dataclasses.replace(what, **changes)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    found, _ = compare(_what(folder), folder / "work", progress=False)
    assert [row.error for row in found] == [None] * 4, [row.error for row in found]
    return found


def test_numbers_are_those_of_quantize_and_eval(folder, rows):
    for row in rows:
        model, tokenizer = load_model(folder / "model")
        ids = tokenize_file(tokenizer, folder / "test.txt")
        if row.job.method != "fp":
            crops = flatquant.random_crops(tokenize_file(tokenizer, folder / "valid.txt"), 2, 16, 0)
            flatquant.quantize(
                model, row.job.method, row.job.scheme, crops, epochs=1,
                weights=row.job.weights, progress=False,
            )  # fmt: skip
        expected = flatquant.perplexity(model, ids, 32, progress=False)
        assert row.values["texts"]["test"]["perplexity"] == expected


def test_divergence_is_its_definition(tmp_path):
    model, other = build_tiny_model(), build_tiny_model(seed=1)
    ids = torch.randint(2, 128, (64,), generator=torch.Generator().manual_seed(2))
    capture(model, ids, tmp_path, 32, None)
    meter = AgreementMeter(Reference.of(tmp_path, model))
    flatquant.perplexity(other, ids, 32, progress=False, observe=meter)
    found = meter.result()
    with torch.no_grad():
        logits = [[m(part[None]).logits[0, :-1] for part in ids.split(32)] for m in (model, other)]
    theirs, ours = (log_softmax(torch.cat(parts).double(), -1) for parts in logits)
    each = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    assert found.kl_mean == pytest.approx(float(each.mean()), rel=1e-4)
    assert found.kl_p99 == pytest.approx(float(each.sort().values[int(0.99 * 61)]), rel=1e-3)
    assert found.top1 == pytest.approx(
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    )


def test_a_model_agrees_with_itself(tmp_path):
    model = build_tiny_model()
    ids = torch.arange(2, 66)
    value = capture(model, ids, tmp_path, 32, 2)
    meter = AgreementMeter(Reference.of(tmp_path, model))
    assert flatquant.perplexity(model, ids, 32, progress=False, observe=meter) == value
    assert meter.result().kl_mean == pytest.approx(0, abs=1e-6)
    assert meter.result().top1 == 1
    with pytest.raises(ValueError, match="no window 2"):
        meter.reference.logits(2)


def test_a_second_call_runs_nothing(folder, rows, monkeypatch):
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a finished job was run again")

    monkeypatch.setattr(run_module, "_launch", never)
    again, _ = compare(_what(folder), folder / "work", progress=False)
    assert [row.values for row in again] == [row.values for row in rows]


def test_what_changed_runs_again(folder, rows, tmp_path):
    ran = []
    text = tmp_path / "test.txt"
    text.write_text((folder / "test.txt").read_text() + " w7" * 40)
    what = _what(folder, methods=("rtn",), texts={"test": text})
    work = tmp_path / "work"
    first, _ = compare(_what(folder, methods=("rtn",)), work, progress=False)
    second, _ = compare(what, work, progress=False)
    ran = [row.values["texts"]["test"]["perplexity"] for row in (*first, *second)]
    assert len(set(ran)) == 4


def test_a_failing_method_is_a_row(folder, tmp_path):
    what = _what(folder, methods=("rtn",), schemes=("W4A16-g48", "W4A16"))
    rows, _ = compare(what, tmp_path, progress=False)
    assert rows[1].error is not None and "w_group=48" in rows[1].error
    assert rows[2].error is None
    assert "rtn W4A16-g48 failed" in as_text(rows, ["test"])


def test_tables(rows):
    text = as_text(rows, ["test"])
    assert text.count("\n|") >= 5 and "rtn+gptq" in text and "bits/weight" in text
    table = list(csv.DictReader(io.StringIO(as_csv(rows, ["test"]))))
    assert [line["method"] for line in table] == ["fp", "rtn", "flatquant", "rtn"]
    assert float(table[1]["test.perplexity"]) == rows[1].values["texts"]["test"]["perplexity"]
    content = json.loads(as_json(rows, {"commit": "x"}))
    assert [row["name"] for row in content["rows"]][1:3] == [
        "rtn-W4A4KV4-seed0",
        "flatquant-W4A4KV4-seed0",
    ]


def test_a_published_table_beside_ours(folder, rows):
    text = beside(paper("flatquant-table1"), rows, _what(folder))
    ours = rows[2].values["texts"]["test"]["perplexity"]
    line = next(line for line in text.splitlines() if line.startswith("| FlatQuant-RTN"))
    assert line.endswith(f"| {ours:.4g} |") and "5.79" in line
    assert "They differ. Published: LLaMA" in text and "2 samples of 16 tokens of valid.txt" in text
    with pytest.raises(ValueError, match=r"'table9' is unknown.*flatquant-table1"):
        paper("table9")


def test_seeds_become_mean_and_spread():
    job = Job(model="m", method="rtn", scheme="W4A4", texts={}, reference="r")
    values = [{"texts": {"t": {"perplexity": value}}} for value in (10.0, 12.0)]
    rows = [Row(dataclasses.replace(job, seed=i), value) for i, value in enumerate(values)]
    assert "11 ±1" in as_text(rows, ["t"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "methods is empty"),
        ({"texts": {}}, "texts is empty"),
        ({"seeds": 0}, "seeds is 0"),
        ({"methods": ("nonsense",)}, "'nonsense' is unknown"),
        ({"methods": ("rtn+nonsense",)}, "'nonsense' is unknown"),
        ({"schemes": ("W4B4",)}, "W4B4"),
        ({"calibration": None}, "needs calibration text"),
    ],
)
def test_bad_settings_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        _what(folder, **changes)


def test_calibrating_on_the_test_is_refused(folder, tmp_path):
    copy = tmp_path / "other.txt"
    copy.write_bytes((folder / "test.txt").read_bytes())
    with pytest.raises(ValueError, match="is the calibration text itself"):
        _what(folder, calibration=copy)


def test_command(folder, tmp_path, capsys):
    arguments = ["compare", str(folder / "model"), "--methods", "rtn", "--scheme", "W4A16"]
    arguments += ["--eval", str(folder / "test.txt"), "--window", "32", "--no-speed"]
    arguments += ["--work-dir", str(tmp_path / "w"), "--json", str(tmp_path / "rows.json")]
    assert main(arguments) == 0
    assert "| rtn" in capsys.readouterr().out
    origin = json.loads((tmp_path / "rows.json").read_text())["provenance"]
    assert origin["versions"]["torch"] == torch.__version__
    assert len(origin["data"]) >= 3
    twice = [*arguments, "--eval", str(folder / "test.txt"), str(tmp_path / "test.txt")]
    assert main(twice) == 2
    assert "two files of one name" in capsys.readouterr().err
