"""A comparison: methods × schemes × seeds on one model, one calibration text, one protocol."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from flatquant.compare.job import FLOATING_POINT, Job
from flatquant.compare.provenance import package_version, provenance
from flatquant.methods import METHODS, resolve
from flatquant.recipe import Recipe

_log = logging.getLogger("flatquant")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare, and how.

    Attributes:
        model: checkpoint folder or .gguf file.
        methods: names of recipes; "method+weights" puts another weight quantizer in.
        schemes: e.g. ("W4A4KV4",).
        seeds: how many, from 0; a method without anything random or calibrated runs once.
        calibration: text file; methods without data need none.
        texts: name -> text file to score.
        samples, seqlen: crops of the calibration text.
        epochs: in place of the recipes'.
        window, max_windows: see `flatquant.perplexity`.
        dtype: see `flatquant.sources.load_model`.
        speed: measure tokens a second too.

    Raises:
        ValueError: no method, scheme or text; an unknown method or scheme; calibration text that
            is among the texts to score.
    """

    model: Path
    methods: tuple[str, ...]
    schemes: tuple[str, ...] = ("W4A4KV4",)
    seeds: int = 1
    calibration: Path | None = None
    texts: dict[str, Path] = field(default_factory=dict)
    samples: int = 128
    seqlen: int = 2048
    epochs: int | None = None
    window: int = 2048
    max_windows: int | None = None
    dtype: str = "auto"
    speed: bool = True

    def __post_init__(self) -> None:
        for name in ("methods", "schemes", "texts"):
            if not getattr(self, name):
                raise ValueError(f"compare: {name} is empty: at least one is needed")
        if self.seeds < 1:
            raise ValueError(f"compare: seeds is {self.seeds}: it must be at least 1")
        if self.calibration is not None:
            digest = sha256(self.calibration)
            for name, path in self.texts.items():
                if sha256(path) == digest:
                    raise ValueError(
                        f"compare: text {name!r} is the calibration text itself ({path}): scores "
                        "on it would mean nothing"
                    )
        for job in self.jobs(Path()):
            needs = job.method != FLOATING_POINT and _recipe(job).needs_data
            if needs and self.calibration is None:
                raise ValueError(f"compare: {job.name} needs calibration text")

    def jobs(self, folder: Path) -> Iterator[Job]:
        """Floating point first, then every method at every scheme with every seed."""
        common: dict[str, Any] = {
            "model": str(self.model),
            "calibration": None if self.calibration is None else str(self.calibration),
            "samples": self.samples,
            "seqlen": self.seqlen,
            "epochs": self.epochs,
            "texts": {name: str(path) for name, path in self.texts.items()},
            "window": self.window,
            "max_windows": self.max_windows,
            "dtype": self.dtype,
            "speed": self.speed,
            "reference": str(folder / FLOATING_POINT / "predictions"),
        }
        yield Job(method=FLOATING_POINT, scheme="", **common)
        for scheme, entry in itertools.product(self.schemes, self.methods):
            method, _, weights = (entry, "", "") if entry in METHODS else entry.partition("+")
            job = Job(method=method, scheme=scheme, weights=weights or None, **common)
            for seed in range(self.seeds if _varies(_recipe(job)) else 1):
                yield replace(job, seed=seed)


def _recipe(job: Job) -> Recipe:
    recipe = resolve(job.method, job.scheme)
    return replace(recipe, weights=job.weights) if job.weights else recipe


def _varies(recipe: Recipe) -> bool:
    """Whether a seed can matter: not for what only rounds, without data."""
    plain = Recipe(
        method=recipe.method, scheme=recipe.scheme, clips=recipe.clips, weights=recipe.weights
    )
    return recipe.needs_data or recipe != plain


@dataclass(frozen=True)
class Row:
    """The outcome of a job: its numbers, or why there are none."""

    job: Job
    values: dict[str, Any]
    error: str | None = None


def compare(
    what: Comparison, work_dir: Path, progress: bool = True
) -> tuple[list[Row], dict[str, Any]]:
    """Run what is missing in `work_dir`, one process a job; rows in order, and provenance.

    A job that fails is a row with its error; the others go on.

    Args:
        what: the comparison.
        work_dir: keeps every finished job and every calibrated block; a second call goes on. Jobs
            with other settings or data than a finished one of the same name are run again.
        progress: show a bar with the time left, above the jobs' own.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    jobs = list(what.jobs(work_dir))
    data = {str(path): sha256(path) for path in _files(what)}
    rows: list[Row] = []
    with tqdm(total=len(jobs), desc="compare", unit="job", disable=not progress) as bar:
        for job in jobs:
            bar.set_postfix_str(job.name)
            rows.append(_outcome(job, work_dir / job.name, data))
            bar.update(1)
            if rows[0].error is not None:
                raise RuntimeError(f"compare: the model itself failed: {rows[0].error}")
    return rows, provenance(asdict(what), data)


def _outcome(job: Job, folder: Path, data: dict[str, str]) -> Row:
    """The finished job in a folder, or a new run of it."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"job": asdict(job), "data": data, "flatquant": package_version("flatquant")}
    settings = json.dumps(identity, indent=1, sort_keys=True)
    stamp, result = folder / "settings.json", folder / "result.json"
    known = stamp.exists() and stamp.read_text(encoding="utf-8") == settings
    if not (known and result.exists()):
        result.unlink(missing_ok=True)
        stamp.write_text(settings, encoding="utf-8")
        (folder / "job.json").write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
        began = time.monotonic()
        code = _launch(folder)
        if code:
            return Row(job, {}, _last_line(folder / "log.txt") or f"exit code {code}")
        _log.info("%s: %.0f s", job.name, time.monotonic() - began)
    return Row(job, json.loads(result.read_text(encoding="utf-8")))


def _launch(folder: Path) -> int:
    """Run the job of a folder in a process of its own; its exit code."""
    command = [sys.executable, "-m", "flatquant.compare.job", str(folder)]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        return subprocess.run(command, stderr=log, stdout=log, check=False).returncode


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _files(what: Comparison) -> list[Path]:
    files = [*what.texts.values()]
    if what.calibration is not None:
        files.append(what.calibration)
    model = what.model
    if model.is_dir():
        return [*files, *sorted(model.glob("*.safetensors")), model / "config.json"]
    return [*files, model]


def sha256(path: Path) -> str:
    """Of a file's bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
