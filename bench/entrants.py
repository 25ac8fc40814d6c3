"""Who takes part in bench_models.py, and in what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Who takes part: how it is shown, what contestant.py is given, what it is left out of."""

    name: str
    kind: str
    folder: str
    skips: tuple[str, ...] = ()
    quick: bool = True


_SLOW = ("prefill 2048", "batch 4", "batch 16", "batch 2,", "batch 8", "batch 32", "batch 64")
SCHEMES = ("W4A8KV4", "W4A8KV4-head8", "W4A4KV4", "W4A4KV4-head8")
ENTRIES = (
    *(
        Entry(name=scheme, kind="flatquant", folder=scheme, quick=scheme.startswith("W4A8"))
        for scheme in SCHEMES
    ),
    Entry(name="transformers float32", kind="float32", folder="fp32", quick=False,
          skips=("batch 64", "batch 32", "batch 8", "batch 2,")),
    Entry(name="transformers bfloat16", kind="bfloat16", folder="bf16"),
    Entry(name="transformers bfloat16 compiled", kind="compiled", folder="bf16", quick=False,
          skips=("generate", "load", *_SLOW)),
    *(
        Entry(name=f"llama.cpp {quant}{way}", kind=f"llama.cpp{way}", folder=f"{quant}.gguf",
              quick=quant == "Q4_0")
        for quant in ("Q4_0", "Q8_0") for way in ("", " flash")
    ),
)  # fmt: skip
#: Who ratios are taken to: the peers that a user of a small machine has.
PEERS = ("transformers bfloat16", "llama.cpp Q4_0")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to measure.

    Attributes:
        name: what the figure is called.
        order: what contestant.py is told; `seconds` are added where it takes them.
        tokens: that a sample stands for: a figure is tokens a second.
        rounds: how often everybody has a turn, after one that does not count.
        quick: whether --quick measures it.
    """

    name: str
    order: dict[str, Any]
    tokens: int
    rounds: int = 5
    quick: bool = False


def tasks() -> Iterator[Task]:
    """Everything that is measured, but load and memory."""
    for tokens, batch in ((512, 1), (2048, 1), (512, 4)):
        yield Task(
            name=f"prefill {tokens}/batch {batch}",
            order={"do": "prefill", "tokens": tokens, "batch": batch},
            tokens=tokens * batch,
            rounds=5 if tokens * batch == 512 else 3,
            quick=tokens * batch == 512,
        )
    for context, batches in ((32, (1, 2, 4, 8, 16, 32, 64)), (1024, (1, 4, 16))):
        for batch in batches:
            for way in ("step", "generate"):
                if way == "step" or batch in (1, 4, 16):
                    yield Task(
                        name=f"decode at {context}/batch {batch}/{way}",
                        order={"do": way, "context": context, "batch": batch, "seconds": 0.3},
                        tokens=batch,
                        quick=batch == 1,
                    )
