"""What the page says first: the headline in a sentence, numbers in large type, and their bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flatquant.formats import INTEGER, OFF
from flatquant.report.html import scale as scales
from flatquant.report.html.charts import Bar, bars
from flatquant.report.html.data import Analysis
from flatquant.report.html.figure import Figure, panel
from flatquant.report.html.scale import number, percent
from flatquant.scheme import Scheme

_MODELS = {
    "fp": ("floating point", "reference"),
    "quantized": ("quantized", "after"),
    "rtn": ("round to nearest", "before"),
}
_SITES = {
    "residual": "the residual stream",
    "attn_in": "the input of q, k and v",
    "attn_out": "the heads' output",
    "mlp_in": "the input of gate and up",
    "mlp_out": "the input of down",
    "qk_head": "queries and keys",
    "v_head": "values",
}


@dataclass(frozen=True)
class Tile:
    """A number in large type, what it is, and what to compare it with."""

    value: str
    name: str
    note: str = ""


def _value(analysis: Analysis, model: str, key: str) -> float:
    value = (analysis.header["headline"].get(model) or {}).get(key)
    return math.nan if value is None else float(value)


def scheme_in_words(scheme: Scheme) -> str:
    """What is quantized to what."""
    parts = [("weights", scheme.weights), ("activations", scheme.activations)]
    if scheme.keys == scheme.values:
        parts.append(("the KV cache", scheme.keys))
    else:
        parts += [("keys", scheme.keys), ("values", scheme.values)]
    named: dict[str, list[str]] = {}
    for name, form in parts:
        if not form.off:
            label = f"{form.bits} bits" if form.kind == INTEGER else form.kind
            named.setdefault(label, []).append(name)
    if scheme.head_bits != OFF:
        named.setdefault(f"{scheme.head_bits} bits", []).append("the output head")
    text = _listed([f"{_listed(names)} in {label}" for label, names in named.items()])
    return (text or "nothing quantized") + (", with exceptions" if scheme.overrides else "")


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def lede(analysis: Analysis) -> str:
    """The result in two or three sentences."""
    text = scheme_in_words(Scheme.parse(analysis.header["plan"]["scheme"]))
    text = text[0].upper() + text[1:]
    fp, ours, plain = (
        _value(analysis, model, "perplexity") for model in ("fp", "quantized", "rtn")
    )
    if math.isfinite(ours):
        text += f": perplexity {number(ours)}"
        text += f" against {number(fp)} in floating point" if math.isfinite(fp) else ""
        text += f", and {number(plain)} with plain rounding" if math.isfinite(plain) else ""
    text += "."
    agreement = _value(analysis, "quantized", "top1")
    if math.isfinite(agreement):
        text += f" Its first choice of the next token is the same {percent(agreement)} of the time."
    if all(map(math.isfinite, (fp, ours, plain))) and fp < ours < plain:
        saved = 1 - math.log(ours / fp) / math.log(plain / fp)
        text += f" It avoids {percent(saved)} of what plain rounding adds to the loss."
    return text


def tiles(analysis: Analysis) -> list[Tile]:
    """The headline numbers that the analysis has."""
    fp, ours, plain = (
        _value(analysis, model, "perplexity") for model in ("fp", "quantized", "rtn")
    )
    found = []
    if math.isfinite(ours):
        versus = [f"{number(fp)} floating point"] if math.isfinite(fp) else []
        versus += [f"{number(plain)} plain rounding"] if math.isfinite(plain) else []
        found.append(Tile(number(ours), "perplexity", " · ".join(versus)))
    agreement, kl, tail = (_value(analysis, "quantized", k) for k in ("top1", "kl_mean", "kl_p99"))
    if math.isfinite(agreement):
        found.append(Tile(percent(agreement), "same first choice", "as in floating point"))
    if math.isfinite(kl):
        note = f"nats · 1 % of tokens above {number(tail)}" if math.isfinite(tail) else "nats"
        found.append(Tile(number(kl), "KL divergence", note))
    size = analysis.header.get("size") or {}
    if size.get("fp_bytes") and size.get("quantized_bytes"):
        before, after = size["fp_bytes"], size["quantized_bytes"]
        note = f"{scales.size(before)} before · {scales.times(before / after)} smaller"
        found.append(Tile(scales.size(after), "stored", note))
    if size.get("bits_per_weight"):
        note = "codes, scales and transforms"
        found.append(Tile(number(size["bits_per_weight"]), "bits per weight", note))
    return found


def perplexity(analysis: Analysis) -> Figure | None:
    """Perplexity of the model in floating point, quantized, and rounded plainly."""
    values = {
        name: (_value(analysis, model, "perplexity"), colour)
        for model, (name, colour) in _MODELS.items()
    }
    values = {name: value for name, value in values.items() if math.isfinite(value[0])}
    if len(values) < 2:
        return None
    known = [value for value, _ in values.values()]
    log = max(known) > 8 * min(known)
    rows = {
        name: [Bar(name="perplexity", colour=colour, value=value)]
        for name, (value, colour) in values.items()
    }
    unit = "perplexity on a logarithmic axis" if log else "perplexity"
    draw = partial(
        bars, rows, x_label=f"{unit} (less is better)", log=log, base=1.0 if log else None
    )
    text = analysis.header["headline"].get("text")
    ours = _value(analysis, "quantized", "perplexity") / _value(analysis, "fp", "perplexity")
    return Figure(
        key="perplexity",
        title=f"Quantization multiplies perplexity by {number(ours)}"
        if math.isfinite(ours)
        else "Perplexity",
        caption="Perplexity on the same text"
        + (f", {text}" if isinstance(text, str) else "")
        + ". A model that always knew the next token would have 1.",
        panels=(panel("", draw),),
        head=("model", "perplexity"),
        rows=tuple((name, number(value, 5)) for name, (value, _) in values.items()),
        source="analysis",
    )


def speed(analysis: Analysis) -> Figure | None:
    """Tokens a second, quantized and not: {model: {task: tokens a second}}."""
    found = analysis.header.get("speed") or {}
    tasks: dict[str, list[Bar]] = {}
    for model, (name, colour) in _MODELS.items():
        entry = found.get(model)
        for task, value in (entry if isinstance(entry, Mapping) else {}).items():
            if isinstance(value, int | float):
                bar = Bar(name=name, colour=colour, value=float(value))
                tasks.setdefault(str(task), []).append(bar)
    if not tasks:
        return None
    panels = []
    for task, group in tasks.items():
        draw = partial(bars, {bar.name: [bar] for bar in group}, x_label="tokens a second")
        panels.append(panel(task.capitalize(), draw, 2))
    ratios = [group[1].value / group[0].value for group in tasks.values() if len(group) > 1]
    title = "Tokens a second"
    if ratios:
        title = f"Quantized, it runs {number(max(ratios), 2)}× as fast at best"
    rows = [(task, bar.name, number(bar.value)) for task, group in tasks.items() for bar in group]
    return Figure(
        key="speed",
        title=title,
        caption="Tokens a second on this machine, on integer kernels. More is better.",
        panels=tuple(panels),
        head=("task", "model", "tokens a second"),
        rows=tuple(rows),
        source="analysis",
        across=2,
    )


def method(analysis: Analysis) -> list[tuple[str, str]]:
    """What was done, as pairs of a word and its explanation."""
    plan = analysis.header["plan"]
    sites = [_SITES.get(site, site) for site in plan.get("sites", [])]
    ignored = ", ".join(plan.get("ignore", [])) or "nothing"
    pairs = [
        ("Model", _model(analysis.header["model"])),
        ("Method", str(plan.get("method", "–"))),
        ("Scheme", f"{plan['scheme']}: {scheme_in_words(Scheme.parse(plan['scheme']))}"),
        ("Transforms", f"on {_listed(sites)}" if sites else "none"),
        ("Left alone", ignored),
    ]
    table = analysis.table("fit")
    if table is not None:
        spent = scales.duration(float(sum(scales.finite(table["seconds"]))))
        pairs.append(("Calibration", f"{len(table)} blocks in {spent}"))
    return pairs


def _model(facts: Mapping[str, Any]) -> str:
    parts = [str(facts.get("name", "a model"))]
    if facts.get("params"):
        parts.append(f"{number(facts['params'] / 1e6)} million parameters")
    parts += [f"{facts['layers']} layers"] if facts.get("layers") else []
    return ", ".join(parts)


def settings(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as a flat list of names and values; None and empty ones are left out."""
    pairs = []
    for name, value in values.items():
        label = f"{before}{name}"
        if isinstance(value, Mapping):
            pairs += settings(value, f"{label} / ")
        elif isinstance(value, list | tuple):
            pairs += [(label, ", ".join(str(item) for item in value))] if value else []
        elif value is not None and value != "":
            pairs.append((label, f"{value:.6g}" if isinstance(value, float) else str(value)))
    return pairs
