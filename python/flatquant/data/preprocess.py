"""From documents to calibration samples: the named ways that papers do it.

The choice changes results (LLMC, arXiv 2405.06001, section 3.1), so it has a name. The procedures
are those of LLMC's code under the same names; random numbers are PyTorch's, so the same seed does
not draw the same documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from flatquant.data.documents import Documents
from flatquant.text import tokenize


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to make samples of.

    Attributes:
        documents: the texts.
        tokenizer: of transformers; documents on their own get its special tokens (such as BOS).
        samples: how many samples.
        seqlen: tokens in a sample.
        seed: of shuffling and cropping.
    """

    documents: Documents
    tokenizer: Any
    samples: int
    seqlen: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("samples", self.samples, 1), ("seqlen", self.seqlen, 2)):
            if value < least:
                raise ValueError(f"calibration data: {name} is {value}: it must be >= {least}")

    def generator(self) -> Generator:
        """A fresh source of random numbers."""
        return Generator().manual_seed(self.seed)

    def shuffled(self) -> list[str]:
        """The documents in random order."""
        texts = self.documents.texts
        order = torch.randperm(len(texts), generator=self.generator()).tolist()
        return [texts[index] for index in order]

    def ids(self, text: str) -> list[int]:
        """Token ids of one document, with the tokenizer's own special tokens."""
        found: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return found


def _crops(stream: Sequence[int], task: Task, generator: Generator, count: int) -> list[list[int]]:
    """Random crops of one stream of tokens; exactly the whole of it where it is just as long."""
    room = len(stream) - task.seqlen
    if room < 0:
        raise ValueError(
            f"{task.documents.name} has {len(stream)} tokens, one sample needs {task.seqlen}"
        )
    starts = torch.randint(0, max(room, 1), (count,), generator=generator).tolist()
    return [list(stream[start : start + task.seqlen]) for start in starts]


def crops(task: Task) -> list[list[int]]:
    """Random crops of the whole text, tokenised in one piece without special tokens."""
    stream = tokenize(task.tokenizer, task.documents.joined, task.documents.name).tolist()
    return _crops(stream, task, task.generator(), task.samples)


def general(task: Task) -> list[list[int]]:
    """LLMC's default: shuffled documents that fill a sample, cut at its length."""
    found = []
    for text in task.shuffled():
        ids = task.ids(text)
        if len(ids) >= task.seqlen:
            found.append(ids[: task.seqlen])
        if len(found) == task.samples:
            break
    return found


def gptq(task: Task) -> list[list[int]]:
    """GPTQ's way with C4: a random document that is long enough, a random crop of it."""
    generator, left = task.generator(), list(task.documents.texts)
    found: list[list[int]] = []
    while left and len(found) < task.samples:
        index = int(torch.randint(0, len(left), (1,), generator=generator))
        ids = task.ids(left[index])
        if len(ids) >= task.seqlen:
            found += _crops(ids, task, generator, 1)
        else:
            left[index] = left[-1]
            left.pop()
    return found


def joined_gptq(task: Task) -> list[list[int]]:
    """GPTQ's way with WikiText-2 and PTB: documents joined by blank lines, random crops."""
    stream = task.ids("\n\n".join(task.documents.texts))
    return _crops(stream, task, task.generator(), task.samples)


def awq(task: Task) -> list[list[int]]:
    """AWQ's way with the Pile: shuffled documents that fit a sample, joined, cut in equal parts.

    `samples` counts the documents, so fewer samples come out.
    """
    stream: list[int] = []
    count = 0
    for text in task.shuffled():
        ids = task.ids(text.strip())
        if 0 < len(ids) <= task.seqlen:
            stream += ids
            count += 1
        if count == task.samples:
            break
    whole = len(stream) // task.seqlen
    return [stream[i * task.seqlen : (i + 1) * task.seqlen] for i in range(whole)]


def smooth(task: Task) -> list[list[int]]:
    """SmoothQuant's way: shuffled documents, cut at the sample's length; some stay shorter."""
    found = (task.ids(text)[: task.seqlen] for text in task.shuffled()[: task.samples])
    return [ids for ids in found if ids]


def omni(task: Task) -> list[list[int]]:
    """OmniQuant's way with the Pile: random crops of the first 1000 documents, joined."""
    stream = task.ids("\n\n".join(task.documents.texts[:1000]))
    return _crops(stream, task, task.generator(), task.samples)


PREPROCESSINGS: dict[str, Callable[[Task], list[list[int]]]] = {
    "crops": crops,
    "general": general,
    "gptq": gptq,
    "gptq-joined": joined_gptq,
    "awq": awq,
    "smooth": smooth,
    "omni": omni,
}
"""Name -> lists of token ids. "crops" is the default of `flatquant quantize`."""


def calibration_samples(task: Task, preprocessing: str = "crops") -> list[Tensor]:
    """Samples [tokens] int64, as the preprocessing makes them.

    Raises:
        ValueError: unknown name, or the documents give no sample.
    """
    if preprocessing not in PREPROCESSINGS:
        raise ValueError(
            f"preprocessing {preprocessing!r} is unknown; known: {', '.join(PREPROCESSINGS)}"
        )
    found = PREPROCESSINGS[preprocessing](task)
    if not found:
        raise ValueError(
            f"{task.documents.name}: no document gives a sample of {task.seqlen} tokens by "
            f"{preprocessing!r}; use shorter samples or another preprocessing"
        )
    return [torch.tensor(ids, dtype=torch.int64) for ids in found]


def calibration_tokens(task: Task, preprocessing: str = "crops") -> Tensor:
    """Samples in the shape that `calibrate` takes, int64 [samples, seqlen].

    Samples that are shorter ("smooth") are joined and cut again, because a batch has no padding.

    Raises:
        ValueError: see `calibration_samples`, or the short samples do not fill one.
    """
    samples = calibration_samples(task, preprocessing)
    if all(len(ids) == task.seqlen for ids in samples):
        return torch.stack(samples)
    stream = torch.cat(samples)
    whole = len(stream) // task.seqlen
    if whole == 0:
        raise ValueError(
            f"{task.documents.name}: {len(stream)} tokens by {preprocessing!r} do not fill one "
            f"sample of {task.seqlen}"
        )
    return stream[: whole * task.seqlen].reshape(whole, task.seqlen)
