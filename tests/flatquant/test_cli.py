"""The command line: what it does to a tiny model, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flatquant.cli import COMMANDS, main
from flatquant.evaluate import perplexity

from .conftest import build_tiny_model
from .word_tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    build_tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(2, 128, (200,), generator=torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("cli") / "text.txt"
    file.write_text(" ".join(f"w{index}" for index in ids.tolist()))
    return file


def test_quantize_then_eval_then_generate(model_dir, text, tmp_path, capsys):
    output = tmp_path / "quantized"
    small = ["--samples", "2", "--seqlen", "16", "--epochs", "1"]
    arguments = ["quantize", str(model_dir), "--output", str(output), "--calibration", str(text)]
    assert main([*arguments, *small]) == 0
    printed = capsys.readouterr().out
    assert "W4A4KV4" in printed and f"saved to {output}" in printed

    assert main(["eval", str(output), str(text), "--window", "32"]) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])
    expected = perplexity(model, ids, 32, progress=False)
    assert f"perplexity {expected:.4f}" in capsys.readouterr().out

    assert main(["generate", str(output), "--prompt", "w5 w6", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 3


def test_rtn_needs_no_text(model_dir, tmp_path, capsys):
    output = tmp_path / "rtn"
    arguments = ["quantize", str(model_dir), "--output", str(output), "--method", "rtn"]
    assert main([*arguments, "--scheme", "W4A16", "--ignore", "lm_head"]) == 0
    assert (output / "config.json").exists()
    assert "lm_head" in capsys.readouterr().out


def test_kernels(capsys):
    assert main(["kernels", "--json"]) == 0
    assert "ops" in json.loads(capsys.readouterr().out)
    assert main(["kernels"]) == 0
    assert "gemm_w4a4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval {missing} {text}", "it must be a folder with a config.json"),
        ("eval {model} {missing}", "missing"),
        ("eval {model} {text} --window 1000", "at least one window of 1000"),
        ("eval {model} {text} --dtype float64", "dtype is 'float64'"),
        ("generate {model} --prompt {empty}", "prompt has 0 tokens"),
        ("quantize {model} --output {model} --method rtn", "must not be the model's own folder"),
        ("quantize {model} --output {text} --method rtn", "it must be a folder, not a file"),
        ("quantize {model} --output {missing}", "--calibration must name a text file"),
        ("quantize {model} --output {missing} --method magic", "'magic'"),
        ("quantize {model} --output {missing} --scheme W9A4 --method rtn", "w_bits=9"),
        ("quantize {model} --output {missing} --calibration {text}", "200 tokens"),
        ("quantize {model} --output {missing} --method rtn --resume", "work_dir"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    model_dir, text, tmp_path, capsys, arguments, message
):
    places = {
        "{model}": model_dir,
        "{text}": text,
        "{missing}": tmp_path / "missing",
        "{empty}": "",
    }
    words = [str(places.get(word, word)) for word in arguments.split()]
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"flatquant {words[0]}: ") and message in lines[-1]
    assert not (tmp_path / "missing").exists()


def test_unknown_words_are_refused(capsys):
    for words in ([], ["paint"], ["eval"], ["quantize", "x", "--seed", "one", "--output", "y"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    assert "invalid int value: 'one'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.count("--") > 1


def test_traceback_on_demand(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        main(["--traceback", "eval", str(tmp_path), "text"])
