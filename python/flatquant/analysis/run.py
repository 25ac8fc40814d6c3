"""The pass: one text through both models, block by block, every table at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flatquant.analysis.bases import linear_bases, residual_rotation
from flatquant.analysis.block import BlockMeter
from flatquant.analysis.headline import against, reference_of, size_of, speed_of
from flatquant.analysis.sensitivity import sensitivities
from flatquant.analysis.stored import describe_block
from flatquant.analysis.stream import Stream
from flatquant.analysis.tables import FORMAT, Rows
from flatquant.capture import check_tokens
from flatquant.compare.provenance import provenance
from flatquant.deploy import replace_linear
from flatquant.models import family_of
from flatquant.models.spec import FamilySpec
from flatquant.offload import float_block, shards_of
from flatquant.plan import QuantizationPlan
from flatquant.surgery import block_names


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an analysis runs.

    Attributes:
        window: tokens in a window.
        windows: how many, from the start of the text.
        batch_size: windows in one forward pass of a block.
        rtn: also score the same scheme rounded to nearest.
        speed: also time both models.
        sensitivity: bit widths to round single groups to; empty: leave that out.
        sensitivity_tokens: how many tokens of the first window that reads.

    Raises:
        ValueError: a number out of its range.
    """

    window: int = 512
    windows: int = 32
    batch_size: int = 4
    rtn: bool = True
    speed: bool = False
    sensitivity: tuple[int, ...] = ()
    sensitivity_tokens: int = 128

    def __post_init__(self) -> None:
        for name, least in (
            ("window", 2), ("windows", 1), ("batch_size", 1), ("sensitivity_tokens", 2)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(
                    f"analyze: {name} is {getattr(self, name)}: it must be at least {least}"
                )
        wrong = [bits for bits in self.sensitivity if not 2 <= bits <= 8]
        if wrong:
            raise ValueError(f"analyze: sensitivity has {wrong[0]} bits: it must be 2..8")


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What `analyze` found: the tables, and everything else as plain JSON."""

    rows: Rows
    facts: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write `analysis.json` and the CSV files; a file of an earlier analysis is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        listed = self.rows.write(folder)
        content = {"format": FORMAT, **self.facts, "tables": listed}
        (folder / "analysis.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def analyze(
    fp: Any,
    quantized: Any,
    ids: Tensor,
    settings: Settings | None = None,
    *,
    data: Mapping[str, str] | None = None,
    log: tuple[Mapping[str, Any], ...] = (),
    progress: bool = True,
) -> Analysis:
    """Compare a quantized model with the floating-point model it was made from.

    Memory beyond the two models: the hidden states of the windows, three times at most, and one
    block's activations. `fp` is used up where `settings.rtn` asks for round-to-nearest: it is
    quantized in place at the end.

    Args:
        fp: the floating-point model; one that `flatquant.offload.open_model` gave is read from
            disk, a block at a time.
        quantized: a quantized model made from it.
        ids: int64 [n], the text, tokenised in one piece; it is only read, nothing is fitted.
        settings: see `Settings`.
        data: path of every file that was read -> sha256, for the record.
        log: of the calibration (`CalibrationResult.log`), for the record.
        progress: show bars with the time left.

    Raises:
        ValueError: the second model is not quantized or was not made from the first, or the text is
            shorter than a window.
    """
    settings = settings or Settings()
    family, plan = _check(fp, quantized)
    if shards_of(fp) is not None and (settings.speed or settings.sensitivity):
        raise ValueError("analyze: speed and sensitivity need the whole model in memory")
    tokens = _windows(ids, settings)
    tokens = check_tokens(tokens, int(fp.get_input_embeddings().num_embeddings), "analyze")
    facts: dict[str, Any] = {
        "provenance": provenance(asdict(settings), dict(data or {})),
        "model": _describe(fp, family),
        "plan": plan.to_dict(),
        "size": size_of(fp, quantized),
        "speed": speed_of(fp, quantized) if settings.speed else None,
    }
    rows = Rows()
    for entry in log:
        rows.add("fit", *_fit_row(entry))
    with torch.no_grad():
        fp_stream, stream = _pass(fp, quantized, family, tokens, settings, rows, progress)
        if settings.sensitivity:
            part = tokens[:1, : settings.sensitivity_tokens]
            for row in sensitivities(
                fp, quantized, family, part, settings.sensitivity, plan, progress
            ):
                rows.add("sensitivity", *row)
        shape = (settings.window, len(tokens))
        with tempfile.TemporaryDirectory(prefix="flatquant-analyze-") as folder:
            with fp_stream.finished() as model:
                reference, fp_line = reference_of(model, tokens.reshape(-1), Path(folder), *shape)
            with stream.finished() as model:
                line = against(reference, model, tokens.reshape(-1), *shape, progress)
            del fp_stream, stream
            baseline = None
            if settings.rtn and plan.method != "rtn":
                replace_linear(fp, plan.scheme, transform="identity", ignore=plan.ignore)
                baseline = against(reference, fp, tokens.reshape(-1), *shape, progress)
    facts["headline"] = {"fp": fp_line, "quantized": line, "rtn": baseline}
    return Analysis(rows=rows, facts=facts)


def _pass(
    fp: Any,
    quantized: Any,
    family: FamilySpec,
    tokens: Tensor,
    settings: Settings,
    rows: Rows,
    progress: bool,
) -> tuple[Stream, Stream]:
    """All blocks; returns the hidden states behind the last one."""
    geometry = family.geometry(fp.config)
    rotation = residual_rotation(fp, quantized)
    fp_stream, stream = (
        Stream(model, family, tokens, settings.batch_size) for model in (fp, quantized)
    )
    heaviest = -1.0
    names = block_names(quantized, family)
    for layer, name in enumerate(
        tqdm(names, desc="analyze", unit="block", disable=not progress, leave=False)
    ):
        fp_block, block = float_block(fp, name, copied=False), quantized.get_submodule(name)
        bases = linear_bases(fp_block, block, family, geometry, rotation)
        describe_block(layer, fp_block, block, family, bases, rows)
        meter = BlockMeter(fp_block, block, family, bases, rotation)
        meter.run(fp_stream, stream, settings.batch_size)
        meter.report(layer, rows)
        if meter.tails > heaviest:
            heaviest = meter.tails
            rows.replace("heatmap", meter.heatmaps(layer))
    return fp_stream, stream


def _check(fp: Any, quantized: Any) -> tuple[FamilySpec, QuantizationPlan]:
    plan: QuantizationPlan | None = getattr(quantized, "flatquant_plan", None)
    if plan is None:
        raise ValueError("analyze: the second model is not quantized: it must have a plan")
    if getattr(fp, "flatquant_plan", None) is not None:
        raise ValueError("analyze: the first model is quantized: it must be the original")
    family = family_of(fp.config)
    counts = [len(family.get_blocks(model)) for model in (fp, quantized)]
    if family_of(quantized.config) != family or counts[0] != counts[1]:
        raise ValueError(
            f"analyze: the models have {counts[0]} and {counts[1]} blocks of {family.name} and "
            f"{family_of(quantized.config).name}: the second must be made from the first"
        )
    return family, plan


def _windows(ids: Tensor, settings: Settings) -> Tensor:
    """int64 [windows, window] from the start of the text."""
    stream = ids.reshape(-1).to(torch.int64)
    count = min(stream.numel() // settings.window, settings.windows)
    if count == 0:
        raise ValueError(
            f"analyze: the text has {stream.numel()} tokens: "
            f"it must have at least one window of {settings.window}"
        )
    return stream[: count * settings.window].reshape(count, settings.window)


def _describe(fp: Any, family: FamilySpec) -> dict[str, Any]:
    geometry = family.geometry(fp.config)
    name = str(getattr(fp.config, "_name_or_path", "") or "")
    return {
        "name": Path(name).name or type(fp).__name__,
        "family": family.name,
        "params": sum(parameter.numel() for parameter in fp.parameters()),
        "layers": len(family.get_blocks(fp)),
        **asdict(geometry),
    }


def _fit_row(entry: Mapping[str, Any]) -> tuple[str | float, ...]:
    values = [entry.get(key) for key in ("start", "end", "seconds")]
    shown = [float(value) if value is not None else "" for value in values]
    return (str(entry.get("block", "")), *shown, "; ".join(entry.get("notes", ())))
