"""One cell of a comparison: a method at a scheme with a seed, calibrated and measured.

Every job runs in a process of its own, so that its peak memory is its own, one that crashes takes
nothing with it, and the order of methods changes no number.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatquant.capture import random_crops
from flatquant.compare.agreement import AgreementMeter, Reference, capture
from flatquant.deploy import replace_linear
from flatquant.evaluate import measure_speed, perplexity
from flatquant.pipeline import calibrate
from flatquant.report import report
from flatquant.report.size import bits_per_weight
from flatquant.sources import load_model
from flatquant.text import tokenize_file

FLOATING_POINT = "fp"
"""The method's name of the model as it is."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does.

    Attributes:
        model: checkpoint folder or .gguf file.
        method: name in `flatquant.METHODS`, or "fp".
        scheme: e.g. "W4A4KV4"; "" for "fp".
        weights: weight quantizer in place of the method's own.
        seed: of calibration crops and transforms.
        calibration: text file.
        samples, seqlen: crops of it.
        epochs: in place of the recipe's.
        texts: name -> text file to score.
        window, max_windows: see `flatquant.perplexity`.
        dtype: see `flatquant.sources.load_model`.
        speed: measure tokens a second too.
        reference: folder with one folder of floating-point predictions a text.
    """

    model: str
    method: str
    scheme: str
    weights: str | None = None
    seed: int = 0
    calibration: str | None = None
    samples: int = 128
    seqlen: int = 2048
    epochs: int | None = None
    texts: dict[str, str]
    window: int = 2048
    max_windows: int | None = None
    dtype: str = "auto"
    speed: bool = True
    reference: str

    @property
    def label(self) -> str:
        """Method and weight quantizer, as they are asked for: "rtn+gptq"."""
        return f"{self.method}+{self.weights}" if self.weights else self.method

    @property
    def name(self) -> str:
        """A folder's name: label, scheme and seed."""
        if self.method == FLOATING_POINT:
            return FLOATING_POINT
        return f"{self.label}-{self.scheme}-seed{self.seed}"


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Calibrate, replace, measure; blocks are kept in `folder`, so a killed job goes on.

    Raises:
        ValueError: bad input; a model that is not finite.
        FitDivergedError: the fit did not end well.
    """
    model, tokenizer = load_model(Path(job.model), job.dtype)
    references = {
        name: Reference.of(Path(job.reference) / name, model)
        for name in job.texts
        if job.method != FLOATING_POINT
    }
    row: dict[str, Any] = {"method": job.method, "scheme": job.scheme, "seed": job.seed}
    if job.weights:
        row["weights"] = job.weights
    if job.method != FLOATING_POINT:
        row |= _quantize(job, model, tokenizer, folder)
    row["texts"] = {}
    for name, path in job.texts.items():
        ids = tokenize_file(tokenizer, path)
        row["texts"][name] = _score(job, model, ids, name, references.get(name))
    if job.speed:
        speed = measure_speed(model, min(512, job.window))
        row |= {"prefill": speed.prefill, "decode": speed.decode}
    row["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def _quantize(job: Job, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    samples = None
    if job.calibration is not None:
        ids = tokenize_file(tokenizer, job.calibration)
        samples = random_crops(ids, job.samples, job.seqlen, job.seed)
    began = time.monotonic()
    result = calibrate(
        model,
        job.method,
        job.scheme,
        samples,
        epochs=job.epochs,
        weights=job.weights,
        seed=job.seed,
        work_dir=folder / "blocks",
        resume=True,
    )
    seconds = time.monotonic() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    replace_linear(model, transform=result)
    what = report(model)
    return {
        "calibration_seconds": seconds,
        "calibration_memory": memory,
        "bits_per_weight": bits_per_weight(model),
        "native": what.native,
        "ops": what.ops,
        "left_alone": what.left_alone,
        "notes": sorted({note for entry in result.log for note in entry.get("notes", ())}),
    }


def _score(
    job: Job, model: Any, ids: Tensor, name: str, reference: Reference | None
) -> dict[str, float]:
    if reference is None:
        folder = Path(job.reference) / name
        return {"perplexity": capture(model, ids, folder, job.window, job.max_windows)}
    meter = AgreementMeter(reference)
    value = perplexity(model, ids, job.window, job.max_windows, observe=meter)
    return {"perplexity": value, **asdict(meter.result())}


def main() -> int:
    """``python -m flatquant.compare.job FOLDER``: read job.json there, write result.json."""
    folder = Path(sys.argv[1])
    job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    torch.manual_seed(job.seed)
    row = run(job, folder)
    partial = folder / "result.partial"
    partial.write_text(json.dumps(row, indent=1), encoding="utf-8")
    partial.replace(folder / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
