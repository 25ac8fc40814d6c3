"""Is a text good to calibrate on? Candidates against the text that the model will be measured on.

LLMC (arXiv 2405.06001, section 3.1) found that what matters is a token distribution like that of
the target, and sentences that hang together; here both are measured before hours are spent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatquant.data import Documents, Task, calibration_samples
from flatquant.evaluate import perplexity

UNSEEN = 0.01
"""Share of a calibration distribution that is spread over the vocabulary: no token has share 0."""
_GRAM = 16  # tokens: text that repeats so many is not alike by chance
_DOCUMENTS = 2000  # looked at for lengths and repetition


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a set is warned of.

    Attributes:
        overlap: share of the evaluation text's stretches of 16 tokens that the set contains: it
            was seen, so a measurement on it flatters.
        coverage: share of the evaluation text's tokens that occur in the set at all.
        divergence: nats above what a sample of that size from the evaluation text itself has.
        logic: loss that shuffling the tokens costs, over that of the evaluation text.
        order: nats that shuffling must cost in the evaluation text for `logic` to be judged: a
            model that sees no order there cannot tell.
        tokens: fewer leave ranges and Hessians to chance.
        unknown: share of unknown tokens.
        repeated: share of stretches of 16 tokens that occurred before in the documents.
    """

    overlap: float = 0.01
    coverage: float = 0.75
    divergence: float = 1.0
    logic: float = 0.5
    order: float = 0.5
    tokens: int = 8192
    unknown: float = 0.01
    repeated: float = 0.2


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """What was found of one candidate.

    Attributes:
        name: of the set.
        documents: how many there are; lengths and repetition are those of 2000 of them.
        median_length: of the documents, in tokens.
        short: share of documents that do not fill a sample.
        samples: how many samples the preprocessing made.
        tokens: in the samples.
        distinct: different tokens in the samples.
        divergence: KL(evaluation ‖ samples) of the token distributions, in nats.
        reverse: KL(samples ‖ evaluation).
        floor: `divergence` of as many tokens drawn from the evaluation text's own distribution.
        coverage: share of the evaluation text's tokens that occur in the samples.
        overlap: share of the evaluation text's stretches of 16 tokens that the samples contain.
        repeated: share of the documents' stretches of 16 tokens that occurred before.
        unknown: share of unknown tokens.
        starts: share of samples that start with the tokenizer's BOS token; None without one.
        special: special tokens in a thousand, BOS at the start not counted.
        loss: nats a token of the floating-point model on the samples; None without a model.
        logic: nats a token that shuffling the tokens inside every sample adds to it.
        warnings: why it may be a bad idea.
    """

    name: str
    documents: int
    median_length: float
    short: float
    samples: int
    tokens: int
    distinct: int
    divergence: float
    reverse: float
    floor: float
    coverage: float
    overlap: float
    repeated: float
    unknown: float
    starts: float | None
    special: float
    loss: float | None = None
    logic: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Candidates, the best first, and the evaluation text by the same measures of its own."""

    candidates: tuple[TextFacts, ...]
    evaluation: str
    evaluation_loss: float | None
    evaluation_logic: float | None


class Evaluation:
    """The text that the model will be measured on.

    Args:
        documents: the text.
        tokenizer: of the model.
    """

    def __init__(self, documents: Documents, tokenizer: Any) -> None:
        self.name = documents.name
        ids = tokenizer(documents.joined, add_special_tokens=False, verbose=False)["input_ids"]
        self.ids = torch.tensor(ids, dtype=torch.int64)
        if len(self.ids) < _GRAM:
            raise ValueError(f"{documents.name} has {len(self.ids)} tokens: at least {_GRAM}")
        self.size = max(len(tokenizer), int(self.ids.max()) + 1)
        self.counts = torch.bincount(self.ids, minlength=self.size).double()
        self.grams = _grams([self.ids])


def rank_texts(
    candidates: Sequence[Documents],
    evaluation: Documents,
    tokenizer: Any,
    *,
    preprocessing: str = "general",
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    model: Any = None,
    windows: int = 8,
    limits: Limits | None = None,
    progress: bool = True,
) -> Ranking:
    """Measure candidates and order them: without warnings first, then by divergence.

    Args:
        candidates: the sets.
        evaluation: what the model will be measured on.
        tokenizer: of the model.
        preprocessing: how samples are made, a name in `flatquant.data.PREPROCESSINGS`.
        samples: how many.
        seqlen: tokens in a sample.
        seed: of the preprocessing, the shuffling and the drawn floor.
        model: the floating-point model, for the shuffled control; None leaves that out.
        windows: samples that the model reads.
        limits: when to warn.
        progress: show bars.

    Raises:
        ValueError: see `calibration_samples`.
    """
    limits = limits or Limits()
    target = Evaluation(evaluation, tokenizer)
    stretch = target.ids[: windows * seqlen]
    loss, logic = _logic(model, list(stretch.split(seqlen)), seqlen, windows, seed, progress)
    found = []
    for documents in candidates:
        task = Task(
            documents=documents, tokenizer=tokenizer, samples=samples, seqlen=seqlen, seed=seed
        )
        made = calibration_samples(task, preprocessing)
        facts = _measure(documents, made, target, task)
        own = _logic(model, made, seqlen, windows, seed, progress)
        found.append((facts, own))
    rated = [_rated(facts, own, logic, limits) for facts, own in found]
    rated.sort(key=lambda facts: (len(facts.warnings) > 0, facts.divergence))
    return Ranking(
        candidates=tuple(rated),
        evaluation=target.name,
        evaluation_loss=loss,
        evaluation_logic=logic,
    )


def _measure(documents: Documents, made: list[Tensor], target: Evaluation, task: Task) -> TextFacts:
    tokenizer = task.tokenizer
    stream = torch.cat(made)
    counts = torch.bincount(stream, minlength=target.size).double()
    whole = [torch.tensor(task.ids(text)) for text in task.shuffled()[:_DOCUMENTS]]
    lengths, own = [len(ids) for ids in whole], _grams(whole)
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    starts = None if bos is None else sum(int(ids[0]) == bos for ids in made) / len(made)
    special = sum(float(counts[i]) for i in set(tokenizer.all_special_ids) if i < len(counts))
    special -= 0 if starts is None else starts * len(made)
    special -= 0 if unknown is None else float(counts[unknown])
    grams = _grams(made)
    drawn = torch.multinomial(
        target.counts, len(stream), replacement=True, generator=task.generator()
    )
    return TextFacts(
        name=documents.name,
        documents=len(documents.texts),
        median_length=float(statistics.median(lengths)),
        short=sum(length < task.seqlen for length in lengths) / len(lengths),
        samples=len(made),
        tokens=len(stream),
        distinct=int((counts > 0).sum()),
        divergence=divergence(target.counts, counts),
        reverse=divergence(counts, target.counts),
        floor=divergence(target.counts, torch.bincount(drawn, minlength=target.size).double()),
        coverage=float(target.counts[counts > 0].sum() / target.counts.sum()),
        overlap=float(torch.isin(target.grams, grams).double().mean()),
        repeated=1 - len(own.unique()) / len(own) if len(own) else 0.0,
        unknown=0.0 if unknown is None else float(counts[unknown]) / len(stream),
        starts=starts,
        special=1000 * special / len(stream),
    )


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """KL(ours ‖ theirs) in nats of two vectors of counts; `UNSEEN` of theirs is spread evenly."""
    p = ours / ours.sum()
    q = (1 - UNSEEN) * theirs / theirs.sum() + UNSEEN / len(theirs)
    return float(torch.xlogy(p, p / q).sum())


def _grams(parts: Sequence[Tensor]) -> Tensor:
    """Hashes of all stretches of 16 tokens, int64."""
    weights = torch.tensor([pow(1_000_003, k, 1 << 61) for k in range(_GRAM)], dtype=torch.int64)
    long_enough = [part for part in parts if len(part) >= _GRAM]
    if not long_enough:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([(part.unfold(0, _GRAM, 1) * weights).sum(-1) for part in long_enough])


def _logic(
    model: Any, parts: list[Tensor], seqlen: int, windows: int, seed: int, progress: bool
) -> tuple[float | None, float | None]:
    """Loss, and what shuffling inside the windows adds to it."""
    full = [part for part in parts if len(part) == seqlen][:windows]
    if model is None or not full:
        return None, None
    generator = torch.Generator().manual_seed(seed)
    mixed = [part[torch.randperm(seqlen, generator=generator)] for part in full]
    loss, shuffled = (
        math.log(perplexity(model, torch.cat(rows), seqlen, progress=progress))
        for rows in (full, mixed)
    )
    return loss, shuffled - loss


def _rated(
    facts: TextFacts,
    own: tuple[float | None, float | None],
    expected: float | None,
    limits: Limits,
) -> TextFacts:
    """With loss, logic and warnings."""
    values = {**vars(facts), "loss": own[0], "logic": own[1]}
    warnings = []
    if facts.overlap > limits.overlap:
        warnings.append(
            f"holds {facts.overlap:.0%} of the evaluation text: results on it will flatter"
        )
    if facts.coverage < limits.coverage:
        warnings.append(f"only {facts.coverage:.0%} of the evaluation's tokens occur in it")
    if facts.divergence - facts.floor > limits.divergence:
        warnings.append(
            f"another kind of text: KL {facts.divergence:.2f}, a sample of the evaluation's own "
            f"kind has {facts.floor:.2f}"
        )
    wanted = expected or 0.0
    if own[1] is not None and wanted >= limits.order and own[1] < limits.logic * wanted:
        warnings.append(
            f"its sentences do not hang together: shuffling tokens costs {own[1]:.2f} nats, in the "
            f"evaluation text {wanted:.2f}"
        )
    if facts.tokens < limits.tokens:
        warnings.append(f"{facts.tokens} tokens leave ranges to chance: {limits.tokens} or more")
    if facts.unknown > limits.unknown:
        warnings.append(f"{facts.unknown:.1%} unknown tokens: made for another tokenizer?")
    if facts.repeated > limits.repeated:
        warnings.append(f"{facts.repeated:.0%} of it repeats itself")
    if facts.starts is not None and 0 < facts.starts < 1:
        warnings.append(f"{facts.starts:.0%} of the samples start with BOS, the others do not")
    return TextFacts(**{**values, "warnings": tuple(warnings)})
