"""One contestant of bench_models.py, in a process of its own: takes orders, answers with times.

    python bench/contestant.py KIND FOLDER

Orders are JSON lines on standard input, and so are the answers on standard output; what libraries
print goes to standard error. Between orders the process only waits, so that contestants can take
turns on one machine.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

#: The prompt of the measurement "load to first token".
PROMPT = 32
#: Tokens of a compiled model's cache beyond the context: it is allocated in advance.
ROOM = 64


class Contestant(Protocol):
    """What can be asked of a contestant. All times are in seconds."""

    def load(self) -> None:
        """Load the model."""

    def prefill(self, tokens: int, batch: int) -> float:
        """Time of a prompt of so many tokens, up to the logits of the last one."""

    def step(self, context: int, batch: int, seconds: float) -> list[float]:
        """Times of decoding steps after a context, for about so long: forward and greedy choice."""

    def generate(self, context: int, batch: int, seconds: float) -> list[float]:
        """The same inside what users call to generate."""


def token_ids(count: int) -> list[int]:
    """A prompt; the times do not depend on it. Low ids are often special tokens."""
    return [(index * 7919 + 1000) % 49000 for index in range(count)]


def repeat(step: Callable[[], object], seconds: float, *, least: int = 4) -> list[float]:
    """Times of `step` for about so long; two calls go before."""
    for _ in range(2):
        step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < ROOM - 4):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


class TransformersContestant:
    """A model of transformers: float32, bfloat16, compiled bfloat16, or ours ("flatquant").

    Args:
        kind: "float32", "bfloat16", "compiled" or "flatquant".
        folder: of the checkpoint.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.model: Any = None
        self.prefilled: dict[tuple[int, int], Any] = {}

    def load(self) -> None:
        """As in `Contestant`."""
        import torch

        dtype = torch.float32 if self.kind == "float32" else torch.bfloat16
        if self.kind == "flatquant":
            import flatquant

            self.model = flatquant.load(self.folder, dtype=dtype)
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
        self.model.eval()
        torch.set_grad_enabled(False)
        self.forward = torch.compile(self.model) if self.kind == "compiled" else self.model

    def prefill(self, tokens: int, batch: int) -> float:
        """As in `Contestant`."""
        ids, cache = self._ids(tokens, batch), self._cache(0, batch)
        start = time.perf_counter()
        self.forward(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - start

    def step(self, context: int, batch: int, seconds: float) -> list[float]:
        """As in `Contestant`."""
        import torch

        cache = self._filled(context, batch)
        token, place = self._ids(1, batch), context
        static = self.kind == "compiled"

        def once() -> None:
            nonlocal token, place
            where = {"position_ids": torch.full((1, 1), place)} if static else {}
            output = self.forward(input_ids=token, past_key_values=cache, **where)
            # by numpy, as for llama.cpp: torch takes fifty times as long over one row
            choice = output.logits[:, -1].float().numpy().argmax(-1, keepdims=True)
            token, place = torch.from_numpy(choice), place + 1

        return repeat(once, seconds)

    def generate(self, context: int, batch: int, seconds: float) -> list[float]:
        """As in `Contestant`."""
        import torch
        from transformers import LogitsProcessor, LogitsProcessorList

        times: list[float] = []

        class Clock(LogitsProcessor):
            def __call__(self, ids: Any, scores: Any) -> Any:
                times.append(time.perf_counter())
                return scores

        def run(tokens: int) -> list[float]:
            times.clear()
            # all but the last token of the prompt are in the cache already
            cache, ids = self._filled(context - 1, batch), self._ids(context, batch)
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=tokens,
                # one that no token is: to forbid the real one costs 0.3 ms a token
                eos_token_id=self.model.config.vocab_size,
                do_sample=False,
                logits_processor=LogitsProcessorList([Clock()]),
            )
            return [after - before for before, after in itertools.pairwise(times)][2:]

        once = statistics.median(run(6))
        return run(max(4, min(ROOM, int(seconds / once))) + 3)

    def _ids(self, tokens: int, batch: int) -> Any:
        import torch

        return torch.tensor([token_ids(tokens)]).repeat(batch, 1)

    def _cache(self, context: int, batch: int) -> Any:
        """An empty cache."""
        if self.kind == "flatquant":
            from flatquant.runtime.cache import Int4Cache

            return Int4Cache(self.model)
        from transformers import DynamicCache, StaticCache

        if self.kind == "compiled" and context:
            return StaticCache(config=self.model.config, max_cache_len=context + ROOM)
        return DynamicCache(config=self.model.config)

    def _filled(self, context: int, batch: int) -> Any:
        """A cache of its own that holds `context` tokens."""
        key = (context, 1 if self.kind != "compiled" else batch)
        if key not in self.prefilled:
            self.prefilled.clear()
            cache = self._cache(context, key[1])
            self.model(
                input_ids=self._ids(context, key[1]), past_key_values=cache, logits_to_keep=1
            )
            self.prefilled[key] = cache
        cache = copy.deepcopy(self.prefilled[key])
        if batch > key[1]:
            cache.batch_repeat_interleave(batch)
        return cache


def footprint(make: Callable[[], Contestant]) -> dict[str, float]:
    """Memory and time from nothing to the first token; imports are done already.

    Returns:
        "seconds", and "bytes": the most resident memory above what the imports took.
    """
    contestant = make()
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    start = time.perf_counter()
    contestant.load()
    contestant.prefill(PROMPT, 1)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": _resident("VmHWM") - before}


def _resident(field: str) -> int:
    """Bytes of resident memory, now ("VmRSS") or at most ("VmHWM")."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    match = re.search(rf"{field}:\s*(\d+) kB", status.read_text())
    return int(match[1]) * 1024 if match else 0


def _maker(kind: str, folder: Path) -> Callable[[], Contestant]:
    """Import what the contestant needs; returns what makes it."""
    if kind.startswith("llama.cpp"):
        from llama_contestant import LlamaContestant

        return lambda: LlamaContestant(folder, flash=kind.endswith("flash"))
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if kind == "flatquant":
        import flatquant  # noqa: F401
    return lambda: TransformersContestant(kind, folder)


def main() -> None:
    """Answer orders until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    make = _maker(sys.argv[1], Path(sys.argv[2]))
    contestant: Contestant | None = None
    answers.write('"ready"\n')
    for line in sys.stdin:
        order = json.loads(line)
        name = order.pop("do")
        answer: Any
        if name == "footprint":
            answer = footprint(make)
        else:
            if contestant is None:
                contestant = make()
                contestant.load()
            answer = getattr(contestant, name)(**order)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
