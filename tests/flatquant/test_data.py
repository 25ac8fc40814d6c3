"""Calibration data: reading, the named preprocessings, and what is said of a set."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import flatquant
from flatquant.analysis.ranking import as_csv, as_json, as_text
from flatquant.analysis.suites import as_text as scores_as_text
from flatquant.analysis.suites import run_suite
from flatquant.analysis.texts import Limits, divergence, rank_texts
from flatquant.cli import main
from flatquant.data import (
    PREPROCESSINGS,
    SUITES,
    Task,
    calibration_samples,
    calibration_tokens,
    read_documents,
)
from flatquant.data.tasks import EvalTask, Suite, unavailable
from flatquant.text import tokenize_file

from .conftest import build_tiny_model
from .word_tokenizer import word_tokenizer

LENGTHS = (5, 40, 12, 25, 8, 60, 30, 3)


def words(count: int, seed: int, low: int = 2, high: int = 128) -> str:
    ids = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{index}" for index in ids.tolist())


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "set.jsonl"
    records = [{"text": words(length, seed)} for seed, length in enumerate(LENGTHS)]
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def task(source: Path, **changes: object) -> Task:
    options = {"samples": 4, "seqlen": 12, "seed": 3, **changes}
    return Task(documents=read_documents(source), tokenizer=word_tokenizer(), **options)


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def inside(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def test_kinds_of_files(tmp_path, lines):
    texts = read_documents(lines).texts
    assert [len(text.split()) for text in texts] == list(LENGTHS)
    records = [{"body": text, "content": text} for text in texts]
    (tmp_path / "list.json").write_text(json.dumps(records))
    assert read_documents(tmp_path / "list.json", "body").texts == texts
    (tmp_path / "plain.txt").write_text("one w1\nstill one\n\n \ntwo w2\n")
    plain = read_documents(tmp_path / "plain.txt")
    assert plain.texts == ("one w1\nstill one", "two w2\n")
    assert plain.joined == "one w1\nstill one\n\n \ntwo w2\n"
    (tmp_path / "wiki.txt").write_text(" \n = A = \n \n a \n = = B = = \n b \n = C = \n c \n")
    assert read_documents(tmp_path / "wiki.txt").texts == (
        " = A = \n \n a \n = = B = = \n b \n",
        " = C = \n c \n",
    )
    chat = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"id": 1, "messages": chat}))
    assert read_documents(tmp_path / "chat.jsonl").texts == ("w3\n\nw4",)
    folder = read_documents(tmp_path)
    assert len(folder.files) == 5 and folder.name == tmp_path.name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{oops', "line 2 is not JSON"),
        ("a.jsonl", '{"id": "x"}', "none of text, content"),
        ("a.json", '[{"text": {"x": 1}}]', "none of text"),
        ("a.json", "3", "must be a list"),
        ("a.txt", " \n ", "every document is blank"),
        ("a.bin", "x", "must end in one of .txt"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_parquet(tmp_path, lines):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    texts = list(read_documents(lines).texts)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet").texts) == texts


def test_names_on_the_hub_go_to_datasets(monkeypatch):
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        if name == "absent":
            raise ConnectionError("no such host")
        return [{"text": "w5 w6"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = read_documents("owner/name:config:validation[:10]")
    assert found.texts == ("w5 w6",) and found.files == ()
    read_documents("plain")
    assert asked == [("owner/name", "config", "validation[:10]"), ("plain", None, "train")]
    with pytest.raises(ValueError, match="datasets cannot load it: no such host"):
        read_documents("absent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets"):
        read_documents("owner/name")


def test_crops_are_those_of_quantize(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(words(300, 1))
    expected = flatquant.random_crops(tokenize_file(word_tokenizer(), file), 4, 12, 3)
    assert torch.equal(calibration_tokens(task(file)), expected)


def test_general_takes_documents_that_fill_a_sample(lines):
    whole = [ids_of(text)[:12] for text in read_documents(lines).texts]
    found = [ids.tolist() for ids in calibration_samples(task(lines), "general")]
    assert len(found) == 4 and all(len(ids) == 12 and ids in whole for ids in found)
    assert len({tuple(ids) for ids in found}) == 4
    every = calibration_samples(task(lines, samples=99), "general")
    assert len(every) == sum(length >= 12 for length in LENGTHS)


def test_gptq_crops_documents_that_are_long_enough(lines):
    texts = [ids_of(text) for text in read_documents(lines).texts]
    found = calibration_tokens(task(lines, samples=40), "gptq").tolist()
    assert len(found) == 40
    assert all(any(inside(ids, text) for text in texts if len(text) >= 12) for ids in found)
    joined = [index for text in texts for index in text]
    assert all(inside(ids, joined) for ids in calibration_tokens(task(lines), "omni").tolist())
    found = calibration_tokens(task(lines), "gptq-joined").tolist()
    assert all(inside(ids, joined) for ids in found)


def test_awq_joins_short_documents_and_cuts(lines):
    short = [length for length in LENGTHS if length <= 12]
    found = calibration_tokens(task(lines, samples=99), "awq")
    assert found.shape == (sum(short) // 12, 12)
    texts = [ids_of(text) for text in read_documents(lines).texts]
    stream = found.flatten().tolist()
    assert any(stream[: len(text)] == text for text in texts if len(text) <= 12)


def test_smooth_cuts_and_keeps_short_documents(lines):
    found = calibration_samples(task(lines, samples=99), "smooth")
    assert sorted(len(ids) for ids in found) == sorted(min(n, 12) for n in LENGTHS)
    assert calibration_tokens(task(lines, samples=99), "smooth").shape == (
        sum(min(n, 12) for n in LENGTHS) // 12,
        12,
    )


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_the_seed_decides(lines, name):
    again = [calibration_tokens(task(lines, seed=seed), name) for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1])
    assert again[0].shape != again[2].shape or not torch.equal(again[0], again[2])


def test_what_gives_no_sample_is_refused(lines):
    for name in ("general", "gptq"):
        with pytest.raises(
            ValueError, match=f"no document gives a sample of 99 tokens by '{name}'"
        ):
            calibration_tokens(task(lines, seqlen=99), name)
    with pytest.raises(ValueError, match="one sample needs 999"):
        calibration_tokens(task(lines, seqlen=999))
    with pytest.raises(ValueError, match="do not fill one sample of 999"):
        calibration_tokens(task(lines, seqlen=999), "smooth")
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        calibration_tokens(task(lines), "nonsense")
    with pytest.raises(ValueError, match="samples is 0"):
        task(lines, samples=0)


def test_divergence_is_its_definition():
    p, q = torch.tensor([3.0, 1.0, 0.0, 0.0]).double(), torch.tensor([1.0, 1.0, 2.0, 0.0]).double()
    shares = 0.99 * torch.tensor([0.25, 0.25, 0.5, 0.0]).double() + 0.01 / 4
    expected = 0.75 * math.log(0.75 / shares[0]) + 0.25 * math.log(0.25 / shares[1])
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence(p, p) == pytest.approx(0, abs=0.02)


def _sets(tmp_path: Path) -> dict[str, Path]:
    """An evaluation text, one of its kind, one that holds it, a foreign one, one that loops."""
    texts = {
        "eval": words(4000, 10, 2, 60),
        "alike": words(9000, 11, 2, 60),
        "leak": words(9000, 12, 2, 60) + " " + words(4000, 10, 2, 60),
        "foreign": words(9000, 13, 50, 120),
        "loop": " ".join([words(300, 15, 2, 60)] * 30),
    }
    files = {name: tmp_path / f"{name}.txt" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    return files


def test_ranking_and_warnings(tmp_path):
    files = _sets(tmp_path)
    names = ("foreign", "leak", "loop", "alike")
    ranking = rank_texts(
        [read_documents(files[name]) for name in names],
        read_documents(files["eval"]),
        word_tokenizer(),
        preprocessing="crops",
        samples=140,
        seqlen=64,
    )
    found = {facts.name: facts for facts in ranking.candidates}
    assert ranking.candidates[0].name == "alike" and not found["alike"].warnings
    assert found["alike"].divergence < 2 * found["alike"].floor + 0.05
    assert found["alike"].coverage > 0.99 and found["alike"].overlap == 0
    assert any("of the evaluation text" in w for w in found["leak"].warnings)
    assert any("another kind of text" in w for w in found["foreign"].warnings)
    assert any("evaluation's tokens occur" in w for w in found["foreign"].warnings)
    assert any("repeats itself" in w for w in found["loop"].warnings)
    assert ranking.evaluation_logic is None
    text = as_text(ranking)
    assert "best: alike" in text and "warning: foreign: another kind" in text
    assert as_csv(ranking).splitlines()[1].startswith("1,alike,")
    assert json.loads(as_json(ranking, {"commit": "x"}))["candidates"][0]["name"] == "alike"


def test_few_and_unknown_tokens_are_warned_of(tmp_path):
    files = _sets(tmp_path)
    (tmp_path / "odd.txt").write_text(words(2000, 16, 2, 60) + " nonsense" * 200)
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "w0"})
    ranking = rank_texts(
        [read_documents(tmp_path / "odd.txt")],
        read_documents(files["eval"]),
        tokenizer,
        preprocessing="crops",
        samples=50,
        seqlen=64,
    )
    assert any("leave ranges to chance" in w for w in ranking.candidates[0].warnings)
    assert any("unknown tokens" in w for w in ranking.candidates[0].warnings)
    assert "best: none without a warning" in as_text(ranking)


def test_shuffling_costs_a_model_that_knows_the_order(tmp_path):
    """A model that predicts the next word of a cycle, and text in and out of that order."""
    model = build_tiny_model(num_hidden_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.zero_()
        table = torch.nn.functional.normalize(torch.randn(128, 64), dim=-1)
        model.get_input_embeddings().weight.copy_(table)
        model.lm_head.weight.copy_(2 * table.roll(1, 0))
    ordered = [f"w{2 + i % 120}" for i in range(3000)]
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(5)).tolist()
    for name, text in (
        ("eval", ordered),
        ("good", ordered[7:]),
        ("bad", [ordered[i] for i in order]),
    ):
        (tmp_path / f"{name}.txt").write_text(" ".join(text))
    ranking = rank_texts(
        [read_documents(tmp_path / f"{name}.txt") for name in ("bad", "good")],
        read_documents(tmp_path / "eval.txt"),
        word_tokenizer(),
        preprocessing="crops",
        samples=8,
        seqlen=64,
        model=model,
        limits=Limits(overlap=2, tokens=1, repeated=2),
        progress=False,
    )
    assert [facts.name for facts in ranking.candidates] == ["good", "bad"]
    good, bad = ranking.candidates
    assert not good.warnings and good.logic == pytest.approx(ranking.evaluation_logic, rel=0.2)
    assert abs(bad.logic) < 0.3 * good.logic
    assert any("do not hang together" in warning for warning in bad.warnings)


def test_command(tmp_path, capsys):
    files = _sets(tmp_path)
    build_tiny_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["analyze-calib", str(files["alike"]), str(files["foreign"])]
    arguments += ["--eval", str(files["eval"]), "--model", str(tmp_path / "model")]
    arguments += ["--preprocessing", "crops", "--samples", "140", "--seqlen", "64"]
    arguments += ["--windows", "2", "--json", str(tmp_path / "out.json")]
    assert main([*arguments, "--csv", str(tmp_path / "out.csv")]) == 0
    assert "best: alike" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["candidates"][0]["logic"] is not None
    assert len(content["provenance"]["data"]) == 3
    assert (tmp_path / "out.csv").read_text().count("\n") == 3
    assert main([*arguments, "--preprocessing", "nonsense"]) == 2
    assert "'nonsense' is unknown" in capsys.readouterr().err


def test_suites_are_those_of_the_papers():
    names = {name: [task.title for task in suite.tasks] for name, suite in SUITES.items()}
    assert names["flatquant-qa"] == [
        "ARC-Challenge", "ARC-Easy", "HellaSwag", "LAMBADA", "PIQA", "WinoGrande",
    ]  # fmt: skip
    assert {"MMLU", "BoolQ", "GPQA", "HumanEval", "MBPP", "LongBench"} <= set(names["llmc"])


def test_what_cannot_run_offline_is_listed(tmp_path, monkeypatch):
    suite = SUITES["llmc"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name in ("cais--mmlu", "openai--openai_humaneval"):
        (tmp_path / f"datasets--{name}").mkdir()
    missing = unavailable(suite, cache=tmp_path)
    assert "mmlu" not in missing and len(missing) == len(suite.tasks) - 1
    assert missing["humaneval"].startswith("it runs code that the model has written")
    assert "humaneval" not in unavailable(suite, allow_code=True, cache=tmp_path)
    assert "Idavidrein/gpqa is not cached; it needs a hub account" in missing["gpqa_main_zeroshot"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert all("lm-eval is not installed" in why for why in unavailable(suite).values())


def test_command_says_what_cannot_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval-tasks", str(tmp_path), "--suite", "flatquant-qa"]) == 1
    assert capsys.readouterr().out.count("not run: lm-eval is not installed") == 6
    assert main(["eval-tasks", str(tmp_path), "--suite", "mt-bench"]) == 2
    assert "'mt-bench' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", [None, "W8A8KV8"])
def test_a_suite_runs_through_lm_eval(tmp_path, scheme):
    """A multiple-choice task on a local file; a model that answers with its favourite word."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    model = build_tiny_model()
    questions = [
        {"question": words(5, seed), "choices": [f"w{7 + seed}", f"w{90 - seed}"], "answer": 0}
        for seed in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in questions))
    (tmp_path / "task.yaml").write_text(
        f"""task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "data.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
    )
    if scheme is not None:
        model = flatquant.replace_linear(model, scheme, transform="identity")
    expected = []
    for line in questions:
        prompt = torch.tensor([ids_of(line["question"])])
        with torch.no_grad():
            last = model(prompt).logits[0, -1]
        first, second = (last[int(choice[1:])] for choice in line["choices"])
        expected.append(bool(first > second))
    suite = Suite(
        paper="none",
        tasks=(
            EvalTask(title="Choice", name="local_choice", metric="acc"),
            EvalTask(title="Absent", name="absent", metric="acc", data="nobody/nothing"),
        ),
    )
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "</s>"})
    scores = run_suite(model, tokenizer, suite, include=tmp_path)
    assert scores[0].value == pytest.approx(sum(expected) / len(expected))
    assert scores[1].obstacle == "its data set nobody/nothing is not cached"
    assert "Choice  acc" in scores_as_text(scores)
