"""The benchmarks: who takes turns with whom, what a ceiling is, and that pictures are pictures."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_models
import bench_ops
import ceiling
import contestant
import entrants
import harness
import plots
import record
import shapes


def test_race_takes_turns_and_counts_up():
    calls: list[tuple[str, int]] = []

    def call(name):
        def once(index):
            calls.append((name, index))
            time.sleep(0.003)

        return once

    timings = harness.race({"a": call("a"), "b": call("b")}, seconds=0, rounds=3)
    assert [timing.samples for timing in timings.values()] == [3, 3]
    order = "".join(name for name, _ in calls)
    # two estimates each, then three rounds of a warm-up call and a burst of one
    assert order == "aabb" + "aabb" * 3
    for name in "ab":
        assert [index for who, index in calls if who == name] == list(range(8))
    assert 0.003 <= timings["a"].least <= timings["a"].median <= timings["a"].p90
    with pytest.raises(ValueError, match="rounds"):
        harness.race({}, seconds=0, rounds=0)


def test_summary_of_samples():
    timing = harness.timing([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (timing.least, timing.median, timing.p10, timing.p90) == (1.0, 3.0, 1.0, 5.0)
    assert timing.spread == pytest.approx(4 / 3)


def test_ceiling_is_the_slower_of_arithmetic_and_reading():
    top = ceiling.Ceiling(int8=1e12, int8_by="avx512", read=1e10, threads=2)
    assert top.share(1e-3, operations=5e8, bytes_read=0) == pytest.approx(0.5)
    assert top.share(1e-3, operations=5e8, bytes_read=8e6) == pytest.approx(0.8)
    higher = top.raised(ceiling.Ceiling(int8=5e11, int8_by="avx2", read=2e10, threads=2))
    assert (higher.int8, higher.int8_by, higher.read) == (1e12, "avx512", 2e10)


def test_ceiling_can_be_measured(monkeypatch):
    monkeypatch.setattr(ceiling, "past_caches", lambda: 2**22)
    assert ceiling.last_cache() >= 2**15 and ceiling.available_memory() > 2**20
    for compile_ in (ceiling._compile, lambda: None):
        monkeypatch.setattr(ceiling, "_compile", compile_)
        top = ceiling.measure_ceiling(0.01)
        assert top.int8 > 1e9 and top.read > 1e7, top


def test_shapes_and_tokens():
    named = {str(linear) for linear in shapes.LINEARS}
    assert len(named) == 16 and plots._SMOOTH_SHAPE in named
    assert all(any(name.startswith(quick) for name in named) for quick in shapes.QUICK)
    smooth = next(linear for linear in shapes.LINEARS if str(linear) == plots._SMOOTH_SHAPE)
    assert shapes.tokens_for(smooth, quick=False)[:7] == (1, 2, 4, 8, 16, 32, 64)


def test_contestants_agree_with_the_reference():
    linear = shapes.Linear(model="m", place="p", in_features=128, out_features=48)
    everyone = list(bench_ops.contestants(linear, memory=2**16))
    for entry in everyone:
        entry.check(2)
        if entry.name != "kronecker_quantize":
            size = sum(tensor.nbytes for weights in entry.weights for tensor in weights)
            assert size >= 2**16 and len({id(weights[0]) for weights in entry.weights}) > 1
            assert entry.calls(32)(7).shape == (32, 48)
    broken = next(entry for entry in everyone if entry.name == "gemm_w4a4")
    object.__setattr__(broken, "call", lambda *arguments: torch.zeros(2, 48))
    with pytest.raises(AssertionError):
        broken.check(2)


def test_pictures_are_valid_and_reproducible(tmp_path):
    def figure(topic, what, value, unit):
        return record.append(topic, what, value, unit, folder=tmp_path, quiet=True)

    for batch in (1, 2, 4):
        task = f"SmolLM2-135M/decode at 32/batch {batch}/step"
        figure("model-speed", f"{task}/ours & <co>", 10.0 * batch, "tok/s")
        figure("model-speed", f"{task}/ours over theirs", 2.0, "x")
        figure("op-speed", f"{plots._SMOOTH_SHAPE}/{batch} tokens/gemm_w4a4", 3.0, "us")
    topics = record.read(tmp_path)
    drawn = {}
    for topic in topics:
        drawn |= plots.draw(topic, topics[topic])
    assert sorted(drawn) == ["gemm-batches.svg", "model-batches.svg", "model-speed.svg"]
    for text in drawn.values():
        assert ElementTree.parse(io.StringIO(text)).getroot().tag.endswith("svg")
    assert "ours &amp; &lt;co&gt;" in drawn["model-batches.svg"]
    assert "over" not in drawn["model-batches.svg"]
    assert (
        drawn["model-speed.svg"]
        == plots.draw("model-speed", topics["model-speed"])["model-speed.svg"]
    )
    assert plots.draw("accuracy", topics["op-speed"]) == {} and plots.draw("op-speed", []) == {}
    page = record.page(topics)
    assert "| us | gemm_w4a4 |" in page and "![model-speed.svg](results/model-speed.svg)" in page
    assert "| SmolLM2-135M/decode at 32/batch 2/step | 20 |" in page


def test_tasks_and_entries_of_whole_models():
    tasks = {task.name: task for task in entrants.tasks()}
    for context in (32, 1024):
        for batch in (1, 4, 16):
            for way in ("step", "generate"):
                assert tasks[f"decode at {context}/batch {batch}/{way}"].tokens == batch
    assert tasks["prefill 2048/batch 1"].tokens == 2048
    assert {entry.name for entry in entrants.ENTRIES} >= {*entrants.PEERS}
    assert sum(task.quick for task in tasks.values()) == 5


def test_a_contestant_that_dies_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_models, "WORK", tmp_path)
    entry = entrants.Entry(name="nobody", kind="llama.cpp", folder="missing.gguf")
    monkeypatch.setattr(bench_models, "HERE", tmp_path)
    (tmp_path / "contestant.py").write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match="exit 1: no such thing"):
        bench_models.Worker(entry)


def test_a_contestant_answers_orders(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_models, "WORK", tmp_path)
    monkeypatch.setattr(bench_models, "HERE", tmp_path)
    (tmp_path / "contestant.py").write_text(
        "import json, sys\n"
        "print('\"ready\"', flush=True)\n"
        "for line in sys.stdin: print(json.dumps([json.loads(line)['do']]), flush=True)\n"
    )
    worker = bench_models.Worker(entrants.Entry(name="echo", kind="k", folder="f"))
    assert worker.ask({"do": "step"}) == ["step"]
    worker.close()
    assert worker.process.returncode == 0


def test_repeat_and_prompt():
    done = []
    times = contestant.repeat(lambda: done.append(1), 0.0)
    assert len(times) == 4 and len(done) == 6
    ids = contestant.token_ids(2048)
    assert len(set(ids)) > 2000 and max(ids) < 49000
    assert json.dumps(times)


def test_rows_on_record_are_those_of_this_code(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "read", lambda folder=tmp_path: _read(folder))
    record.append("t", "a/b/c", 1.0, folder=tmp_path, quiet=True)
    old = record.append("t", "x/y", 1.0, folder=tmp_path, quiet=True)
    line = json.dumps(vars(old) | {"commit": "another"})
    text = (tmp_path / "t.jsonl").read_text().splitlines()[0]
    (tmp_path / "t.jsonl").write_text(f"{text}\n{line}\n")
    assert record.rows_on_record("t") == {"a/b"}


_read = record.read
