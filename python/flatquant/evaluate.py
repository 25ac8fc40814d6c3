"""Perplexity, text generation and generation speed of any causal language model.

Nothing here knows about quantization: the same functions measure the floating point model and the
quantized one, so that two numbers in one table always mean the same thing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from flatquant.text import tokenize

#: Logits widened to float32 at a time; bounds the extra memory at 64 MiB whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 24


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
    observe: Callable[[int, Tensor], None] | None = None,
) -> float:
    """Perplexity over non-overlapping windows: exp of the mean negative log-likelihood.

    Every window is scored by itself without a cache (``use_cache=False``); its first token is
    context only, so a window of w tokens predicts w - 1. A last, shorter window is dropped, and
    all windows weigh the same. This is the protocol of GPTQ and its followers (WikiText-2 with
    window 2048).

    Args:
        model: a causal language model of transformers.
        token_ids: [n] or [1, n], int64 or int32: the whole text, tokenised in one piece.
        window: tokens in a window, at least 2.
        max_windows: score only the first so many windows; None scores them all.
        batch_size: windows in one forward pass.
        progress: show a progress bar with the time left and the running perplexity.
        observe: called with the number of every window and its logits [window, vocabulary].

    Returns:
        The perplexity; ``inf`` where it exceeds the range of a double.

    Raises:
        ValueError: an argument is out of its range, the text has fewer tokens than one window, an
            id lies outside the model's vocabulary, or the model answers NaN or Inf (the message
            names the window).
    """
    windows = _split_windows(model, token_ids, window, max_windows, batch_size)
    device = next(model.parameters()).device
    total = 0.0
    with (
        _evaluating(model),
        tqdm(
            total=len(windows), desc="perplexity", unit="window", disable=not progress, leave=False
        ) as bar,
    ):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for offset in range(len(batch)):
                nll = _mean_nll(logits[offset, :-1], batch[offset, 1:])
                if not math.isfinite(nll):
                    raise ValueError(
                        f"perplexity: window {start + offset} of {len(windows)} has negative "
                        f"log-likelihood {nll}: the model's logits must be finite"
                    )
                total += nll
                if observe is not None:
                    observe(start + offset, logits[offset])
            bar.update(len(batch))
            bar.set_postfix(ppl=f"{_exp(total / (start + len(batch))):.3f}", refresh=False)
    return _exp(total / len(windows))


def generate_text(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 48, chat: bool = False
) -> str:
    """Continue a prompt greedily through ``model.generate``.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: the text to continue, at least one token.
        max_new_tokens: at most so many tokens are generated.
        chat: put the prompt into the tokenizer's chat template as the user's message.

    Returns:
        The generated text without the prompt and without special tokens.

    Raises:
        ValueError: the prompt is empty, ``max_new_tokens`` is not positive, or ``chat`` is asked of
            a tokenizer that has no chat template.
    """
    if max_new_tokens < 1:
        raise ValueError(
            f"generate_text: max_new_tokens is {max_new_tokens}: it must be at least 1"
        )
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("generate_text: chat is True: the tokenizer must have a chat template")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenize(tokenizer, prompt, source="prompt")[None].to(next(model.parameters()).device)
    with _evaluating(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@dataclass(frozen=True, kw_only=True)
class GenerationSpeed:
    """Tokens a second at batch 1, as ``measure_speed`` takes them."""

    prefill: float
    decode: float


def measure_speed(
    model: Any, prompt_len: int = 512, new_tokens: int = 32, *, repeats: int = 3
) -> GenerationSpeed:
    """Time ``model.generate`` with its own cache on one prompt of fixed token ids.

    Prefill counts from the call until the first new token, decode is the median of the gaps between
    the following ones; of the repeats the best counts, since other work on the machine only ever
    slows a run down.

    Args:
        model: a causal language model of transformers.
        prompt_len: tokens in the prompt.
        new_tokens: tokens to generate, at least 2.
        repeats: how many times to run; a short warm-up run comes on top.

    Returns:
        Tokens a second for prefill and for decode.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value, least in (
        ("prompt_len", prompt_len, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise ValueError(f"measure_speed: {name} is {value}: it must be at least {least}")
    vocabulary = _vocabulary(model)
    # Any ids do, the time does not depend on them; low ones are often special tokens.
    ids = (torch.arange(prompt_len) * 7919 + 1000) % vocabulary
    ids = ids[None].to(next(model.parameters()).device)

    def run(length: int, tokens: int) -> tuple[float, float]:
        clock = _TokenClock()
        model.generate(
            input_ids=ids[:, :length],
            attention_mask=torch.ones_like(ids[:, :length]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        gaps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
        return gaps[0], statistics.median(gaps[1:])

    with _evaluating(model):
        run(min(prompt_len, 8), 2)
        times = [run(prompt_len, new_tokens) for _ in range(repeats)]
    return GenerationSpeed(
        prefill=prompt_len / min(prefill for prefill, _ in times),
        decode=1.0 / min(decode for _, decode in times),
    )


class _TokenClock:
    """A streamer of ``generate`` that notes when the prompt and every token pass."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time; ``value`` is already on the host, so the device has finished."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def _split_windows(
    model: nn.Module, token_ids: Tensor, window: int, max_windows: int | None, batch_size: int
) -> Tensor:
    """Check the arguments of ``perplexity`` and cut the text: int64 [windows, window]."""
    if window < 2:
        raise ValueError(f"perplexity: window is {window}: it must be at least 2")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"perplexity: max_windows is {max_windows}: it must be at least 1 or None")
    if batch_size < 1:
        raise ValueError(f"perplexity: batch_size is {batch_size}: it must be at least 1")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"perplexity: token_ids has dtype {token_ids.dtype}: it must be int64 or int32"
        )
    if token_ids.dim() == 2 and token_ids.shape[0] == 1:
        token_ids = token_ids[0]
    if token_ids.dim() != 1:
        raise ValueError(
            f"perplexity: token_ids has shape {list(token_ids.shape)}: it must be [n] or [1, n]"
        )
    count = token_ids.numel() // window
    if count == 0:
        raise ValueError(
            f"perplexity: the text has {token_ids.numel()} tokens: "
            f"it must have at least one window of {window}"
        )
    count = count if max_windows is None else min(count, max_windows)
    windows = token_ids[: count * window].to(torch.int64).reshape(count, window)
    vocabulary = _vocabulary(model)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"perplexity: token_ids spans {low}..{high}: ids must lie in 0..{vocabulary - 1}, "
            "the model's vocabulary (was the text tokenised for another model?)"
        )
    return windows


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _mean_nll(logits: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood of targets [t] under logits [t, vocabulary].

    Taken in float32, summed in double.
    """
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    total = 0.0
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        losses = F.cross_entropy(part.float(), target, reduction="none")
        total += float(losses.double().sum())
    return total / len(targets)


def _exp(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode the model was in comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
