"""How far a model's predictions are from those of the floating-point model it was made from.

The floating-point logits of a text are too large to keep (a window of 2048 tokens is 1 GB at a
vocabulary of 128k), and running both models at once needs both in memory. What the head reads is
small, so that is kept, and the head is applied to it again, window by window.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flatquant.capture import watching
from flatquant.evaluate import perplexity

#: Logits compared at a time, in elements; bounds the extra memory.
_CHUNK_ELEMENTS = 1 << 24


class Reference:
    """What a floating-point model predicts on the windows of a text.

    Args:
        folder: where its head inputs lie, one tensor a window, in `head_inputs.safetensors`.
        head: the model's output head (a copy, or the module itself while the model is unchanged).
        softcap: c of logits c·tanh(z/c), None where the model has none (Gemma 2).
    """

    def __init__(self, folder: Path, head: nn.Module, softcap: float | None) -> None:
        self.file = folder / "head_inputs.safetensors"
        self.head = head
        self.softcap = softcap

    @classmethod
    def of(cls, folder: Path, model: Any) -> Reference:
        """The reference that `capture` left in a folder, with the head of the same model."""
        head = copy.deepcopy(model.get_output_embeddings())
        return cls(folder, head, getattr(model.config, "final_logit_softcapping", None))

    @torch.no_grad()
    def logits(self, window: int) -> Tensor:
        """Of one window, [tokens, vocabulary].

        Raises:
            ValueError: the text had fewer windows.
        """
        with safe_open(self.file, "pt") as file:
            if f"{window}" not in file.keys():  # noqa: SIM118 (not a dict)
                raise ValueError(f"{self.file} has no window {window}: made from another text")
            hidden = file.get_tensor(f"{window}")
        weight = next(self.head.parameters())
        logits: Tensor = self.head(hidden.to(weight.device))
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def capture(
    model: Any, token_ids: Tensor, folder: Path, window: int, max_windows: int | None
) -> float:
    """Score a floating-point model and keep what `Reference` needs; returns its perplexity.

    Raises:
        ValueError: bad input (see `perplexity`), or a model whose logits are not its head's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reference = Reference.of(folder, model)
    seen: list[Tensor] = []
    kept: dict[str, Tensor] = {}

    def observe(index: int, logits: Tensor) -> None:
        kept[f"{index}"] = seen.pop()[0].cpu().contiguous()
        if index == 0:
            save_file(kept, reference.file)
            if not torch.allclose(reference.logits(0), logits, rtol=1e-3, atol=1e-3):
                raise ValueError(
                    f"compare: {type(model).__name__} changes its head's output in a way that is "
                    "not known here (only final_logit_softcapping is)"
                )

    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    with watching(model, {name: seen.append}):
        value = perplexity(model, token_ids, window, max_windows, observe=observe)
    partial = reference.file.with_suffix(".partial")
    save_file(kept, partial)
    partial.replace(reference.file)
    return value


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Distance between two models' predictions of the tokens of a text.

    Attributes:
        kl_mean: mean over tokens of KL(floating point ‖ quantized), in nats.
        kl_p99: its 99th percentile.
        top1: share of tokens whose most likely successor is the same.
    """

    kl_mean: float
    kl_p99: float
    top1: float


class AgreementMeter:
    """Collects an `Agreement` over windows; an instance is an `observe` of `perplexity`."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.divergences: list[Tensor] = []
        self.same = 0

    @torch.no_grad()
    def __call__(self, window: int, logits: Tensor) -> None:
        """Compare the predictions inside one window; its last one predicts nothing we know."""
        expected = self.reference.logits(window)[:-1]
        rows = max(1, _CHUNK_ELEMENTS // expected.shape[-1])
        for ours, theirs in zip(logits[:-1].split(rows), expected.split(rows), strict=True):
            q = torch.log_softmax(ours.float(), -1)
            p = torch.log_softmax(theirs.float(), -1)
            self.divergences.append((p.exp() * (p - q)).sum(-1).double().cpu())
            self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    def result(self) -> Agreement:
        """Over everything seen.

        Raises:
            ValueError: nothing was seen.
        """
        if not self.divergences:
            raise ValueError("AgreementMeter: no window was seen")
        all_tokens = torch.cat(self.divergences)
        return Agreement(
            kl_mean=float(all_tokens.mean()),
            kl_p99=float(all_tokens.sort().values[int(0.99 * (len(all_tokens) - 1))]),
            top1=self.same / len(all_tokens),
        )
