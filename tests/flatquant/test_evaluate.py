"""Perplexity by its definition, generation, and what happens to bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from flatquant.evaluate import generate_text, measure_speed, perplexity
from flatquant.text import tokenize, tokenize_file

from .conftest import build_tiny_model
from .word_tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_tiny_model()


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(2, 128, (100,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_definition(model: PreTrainedModel, ids: torch.Tensor, window: int, count: int) -> float:
    total = 0.0
    for index in range(count):
        part = ids[index * window : (index + 1) * window]
        probabilities = log_softmax(model(part[None], use_cache=False).logits[0].double(), -1)
        total += sum(-probabilities[t, part[t + 1]].item() for t in range(window - 1))
    return math.exp(total / (count * (window - 1)))


@pytest.mark.parametrize(("window", "most", "batch"), [(16, None, 1), (16, 3, 2), (33, None, 4)])
def test_perplexity_is_its_definition(model, text, window, most, batch):
    count = min(len(text) // window, most or len(text))
    expected = by_definition(model, text, window, count)
    got = perplexity(model, text, window, most, batch, progress=False)
    assert got == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, text[None], window, most, 1, progress=False) == pytest.approx(got)


def test_perplexity_drops_the_tail(model, text):
    whole = perplexity(model, text[:64], 32, progress=False)
    assert perplexity(model, text[:95], 32, progress=False) == whole


def test_perplexity_in_chunks_is_the_same(model, text, monkeypatch):
    whole = perplexity(model, text, 50, progress=False)
    monkeypatch.setattr("flatquant.evaluate._CHUNK_ELEMENTS", 3 * 128)
    assert perplexity(model, text, 50, progress=False) == pytest.approx(whole, rel=1e-6)


def test_perplexity_leaves_the_mode_and_the_gradients_alone(text):
    model = build_tiny_model().train()
    perplexity(model, text, 16, progress=False)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, "window is 1: it must be at least 2"),
        ({"max_windows": 0}, "max_windows is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"window": 101}, "the text has 100 tokens: it must have at least one window of 101"),
        ({"token_ids": torch.zeros(2, 50, dtype=torch.int64)}, r"shape \[2, 50\]"),
        ({"token_ids": torch.zeros(50)}, "dtype torch.float32: it must be int64"),
        ({"token_ids": torch.full((50,), 128)}, "ids must lie in 0..127"),
        ({"token_ids": torch.full((50,), -1)}, "spans -1..-1"),
    ],
)
def test_perplexity_refuses(model, text, change, message):
    arguments = {"token_ids": text, "window": 16, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        perplexity(model, **arguments)


def test_perplexity_names_the_window_that_is_not_a_number(text):
    model = build_tiny_model()
    text = text.clamp(max=126)
    text[40] = 127  # in the third window of 16
    with torch.no_grad():
        model.model.embed_tokens.weight[127] = float("nan")
    with pytest.raises(ValueError, match="window 2 of 6 has negative log-likelihood nan"):
        perplexity(model, text, 16, progress=False)


def test_a_hopeless_model_has_infinite_perplexity(text):
    model = build_tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert perplexity(model, text, 16, progress=False) == math.inf


def test_generate_text_is_the_greedy_continuation(model):
    tokenizer = word_tokenizer()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for _ in range(4):
            nearest = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, nearest], dim=-1)
    expected = " ".join(f"w{index}" for index in ids[0, 3:].tolist())
    assert generate_text(model, tokenizer, "w5 w6 w7", max_new_tokens=4) == expected


def test_generate_text_refuses(model):
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="prompt has 0 tokens"):
        generate_text(model, tokenizer, "")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate_text(model, tokenizer, "w5", max_new_tokens=0)
    with pytest.raises(ValueError, match="chat template"):
        generate_text(model, tokenizer, "w5", chat=True)


def test_measure_speed(model):
    speed = measure_speed(model, prompt_len=8, new_tokens=3, repeats=1)
    assert speed.prefill > 0 and speed.decode > 0
    for name, value in (("prompt_len", 0), ("new_tokens", 1), ("repeats", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            measure_speed(model, **{"prompt_len": 8, "new_tokens": 3, "repeats": 1, name: value})


def test_tokenize(tmp_path):
    tokenizer = word_tokenizer()
    assert tokenize(tokenizer, "w3 w4").tolist() == [3, 4]
    file = tmp_path / "text.txt"
    file.write_text("w3 w4\nw5")
    assert tokenize_file(tokenizer, file).tolist() == [3, 4, 5]
    file.write_text("")
    with pytest.raises(ValueError, match=r"text\.txt has 0 tokens"):
        tokenize_file(tokenizer, file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8"):
        tokenize_file(tokenizer, file)
    with pytest.raises(FileNotFoundError):
        tokenize_file(tokenizer, tmp_path / "missing.txt")
