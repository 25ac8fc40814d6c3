"""Time whole models of Llama's sizes, and one layer of them, on the current GPU.

    python bench/gpu_models.py [PART ...] [--model 7B 8B] [--scheme W4A8KV4] [--seconds-left S]

decode: a step of 1 to 64 sequences, embedding to the choice of a token, in a CUDA graph.
memory: the most that a prompt of 4096 tokens and the steps after it take.
prefill: prompts of 2048 tokens, 1 to 64 at a time.
text: 256 tokens after a prompt, as a user gets them: ours through its own graphs, with Python
    between the steps; the other as one graph that feeds itself.
layer: prompts and steps of a single layer.

The speed of a model depends on no value in it, so the weights are random numbers, ours made in
their packed form. The other is the same model in bfloat16 by transformers, its steps in a CUDA
graph too; with --compiled, which takes minutes, also after torch.compile. Ratios are the time, or
memory, of the best other over ours. Parts stop when the time is up; what does not fit into the
memory is left out, and said. --dry-run: tiny models on the CPU. Figures go to
$OUT/gpu-model.jsonl, or docs/results without $OUT. Needs a transformers whose static cache counts
on the device (5.23 does).
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from gpu_contestants import MODELS, Contestant, Ours, Plain, config_of, nbytes, tokens
from harness import Timing, timing
from record import append, device_name
from torch import Tensor

from flatquant_cuda import decoder

PARTS = ("decode", "memory", "prefill", "text", "layer")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, where, and until when.

    Attributes:
        device: where; a CPU only in a dry run.
        end: time.monotonic() when to stop.
        batches: sequences of a step, the most telling first.
        prompts: prompts at a time, likewise.
        prompt: tokens of a prompt.
        contexts: tokens before a step.
        memory_at: tokens of the prompt that memory is measured with.
        new: tokens of a text.
        samples: of every step.
    """

    device: torch.device
    end: float
    batches: tuple[int, ...] = (1, 16, 64, 4, 8, 32, 2)
    prompts: tuple[int, ...] = (1, 4, 16, 64, 2, 8, 32)
    prompt: int = 2048
    contexts: tuple[int, ...] = (1024, 4096)
    memory_at: int = 4096
    new: int = 256
    samples: int = 15

    def tokens(self, batch: int, count: int) -> Tensor:
        """A prompt."""
        return tokens(batch, count, self.device)

    def on_time(self, needed: float, what: str) -> bool:
        """Whether there are so many seconds left."""
        if self.end - time.monotonic() >= needed:
            return True
        print(f"no time left for {what}", flush=True)
        return False

    # ---- time and memory -------------------------------------------------------------------------

    def captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """The step as a CUDA graph; on a CPU itself."""
        if self.device.type != "cuda":
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def seconds_of(self, call: Callable[[], Any]) -> float:
        """Of one call, the device's work included."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def measured(self, call: Callable[[], Any], samples: int) -> Timing:
        """After one call that does not count."""
        call()
        return timing(self.seconds_of(call) for _ in range(samples))

    @contextmanager
    def within_memory(self, what: str) -> Iterator[None]:
        """Leave out what does not fit."""
        try:
            yield
        except torch.OutOfMemoryError:
            print(f"{what}: does not fit into the memory", flush=True)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def figure(self, what: str, value: float, unit: str) -> None:
        """Record a figure of this device; a dry run prints it."""
        if self.device.type == "cuda":
            append("gpu-model", what, float(f"{value:.4g}"), unit, device=device_name())
        else:
            print(f"dry run: {what}: {value:.4g} {unit}", flush=True)

    def compare(
        self,
        where: str,
        who: Sequence[Contestant],
        value_of: Callable[[Contestant], float],
        unit: str,
    ) -> None:
        """Figures of everybody, and the ratio of the best other to ours."""
        values: dict[str, float] = {}
        for one in who:
            with self.within_memory(f"{where}/{one.name}"):
                values[one.name] = value_of(one)
                self.figure(f"{where}/{one.name}", values[one.name], unit)
        others = [one.name for one in who if isinstance(one, Plain) and one.name in values]
        if not others:
            return
        best = min(others, key=values.__getitem__)
        for one in who:
            if isinstance(one, Ours) and one.name in values:
                ratio = values[best] / values[one.name]
                self.figure(f"{where}/{one.name} against {best}", ratio, "x")

    # ---- parts -----------------------------------------------------------------------------------

    def decode(self, model: str, who: Sequence[Contestant]) -> None:
        """Steps in a graph: the same position again and again, which takes the same time."""
        for context in self.contexts:
            for batch in self.batches:
                if not self.on_time(10, f"further steps of {model}"):
                    return
                where = f"{model}/decode at {context}/batch {batch}"
                step = functools.partial(self._step_ms, batch=batch, context=context)
                self.compare(where, who, step, "ms")

    def _step_ms(self, one: Contestant, *, batch: int, context: int) -> float:
        ids = self.tokens(batch, 1)
        cache = one.room(batch, context, 8)
        run = self.captured(lambda: one.step(ids, cache))
        samples = self.samples if self.device.type == "cuda" else 2
        return self.measured(run, samples).median * 1e3

    def memory(self, model: str, who: Sequence[Contestant]) -> None:
        """Weights, cache and all that a prompt and some steps need besides."""
        where = f"{model}/peak memory at {self.memory_at}"
        self.compare(where, who, self._peak, "GiB")

    def _peak(self, one: Contestant) -> float:
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if isinstance(one, Plain):  # whose static cache is filled by nobody
            one.prompt(self.tokens(1, self.memory_at))
        cache = one.room(1, self.memory_at, 16)
        for _ in range(4):
            one.step(self.tokens(1, 1), cache)
        grown = torch.cuda.max_memory_allocated() - before if on_gpu else 0
        return (nbytes(one.model) + grown) / 2**30

    def prefill(self, model: str, who: Sequence[Contestant]) -> None:
        """Prompts, launched one kernel after another by everybody."""
        for batch in self.prompts:
            if not self.on_time(15, f"further prompts of {model}"):
                return
            where = f"{model}/prefill {self.prompt}/batch {batch}"
            self.compare(where, who, functools.partial(self._prompt_ms, batch=batch), "ms")

    def _prompt_ms(self, one: Contestant, *, batch: int) -> float:
        ids = self.tokens(batch, self.prompt)
        samples = 3 if ids.numel() > 2**14 else 5
        return self.measured(lambda: one.prompt(ids), samples).median * 1e3

    def text(self, model: str, who: Sequence[Contestant]) -> None:
        """A text of some length; the time of a token."""
        for batch in self.batches:
            if not self.on_time(15, f"further texts of {model}"):
                return
            where = f"{model}/text of {self.new} after {self.contexts[0]}/batch {batch}"
            self.compare(where, who, functools.partial(self._token_ms, batch=batch), "ms")

    def _token_ms(self, one: Contestant, *, batch: int) -> float:
        ids = self.tokens(batch, 1)
        cache = one.room(batch, self.contexts[0], self.new + 8)

        def token() -> None:
            ids.copy_(one.step(ids, cache))

        run = self.captured(token) if one.captures else token
        for _ in range(3):  # ours records its steps in these
            run()
        return self.seconds_of(lambda: [run() for _ in range(self.new)]) / self.new * 1e3

    def run(self, model: str, parts: Sequence[str], schemes: Sequence[str], compiled: bool) -> None:
        """The parts for one model."""

        def contestants(layers: int | None) -> list[Contestant]:
            config = config_of(model, layers=layers)
            who: list[Contestant] = [Ours(config, scheme, self.device) for scheme in schemes]
            ways = (False, True) if compiled else (False,)
            return who + [Plain(config, self.device, compiled=way) for way in ways]

        whole = [part for part in parts if part != "layer"]
        if whole and self.on_time(30, model):
            who = contestants(None)
            for part in whole:
                getattr(self, part)(model, who)
            del who
        gc.collect()
        if "layer" in parts and self.on_time(20, f"a layer of {model}"):
            who = contestants(1)
            self.prefill(f"a layer of {model}", who)
            self.decode(f"a layer of {model}", who)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for; 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none given: all")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["7B", "8B"])
    parser.add_argument("--scheme", nargs="+", default=["W4A8KV4"])
    parser.add_argument("--compiled", action="store_true", help="compile the other, too")
    parser.add_argument("--seconds-left", type=float, default=1e9, help="stop in time")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}: they must be of {', '.join(PARTS)}")
    end = time.monotonic() + options.seconds_left
    bench = Bench(device=torch.device("cuda"), end=end)
    if options.dry_run:
        bench = Bench(
            device=torch.device("cpu"),
            end=end,
            batches=(1, 3),
            prompts=(1, 2),
            prompt=24,
            contexts=(16,),
            memory_at=32,
            new=6,
        )
        options.model = ["tiny"]
    elif not torch.cuda.is_available() or not decoder.available("cuda"):
        print("gpu_models: no GPU, or no CUDA kernel (python -m flatquant_cuda)", file=sys.stderr)
        return 1
    with torch.no_grad():
        for model in options.model:
            bench.run(model, options.parts or PARTS, options.scheme, options.compiled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
