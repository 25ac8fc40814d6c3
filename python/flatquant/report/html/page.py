"""The page: sections of figures, the data they come from, and the template that holds them."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from flatquant.report.html import alone, errors, fitting, flatness, maps, summary
from flatquant.report.html.data import Analysis
from flatquant.report.html.figure import Figure
from flatquant.report.html.scale import size

LIMIT = 5_000_000
"""Bytes that a page may have; data is embedded only as far as it fits."""
_EMBEDDED = 2_500_000
_PLAIN = 40_000  # tables up to here are embedded as they are, longer ones compressed

Draw = Callable[[Analysis], Figure | None]


@dataclass(frozen=True)
class Section:
    """A heading of the page and the figures under it; one without figures is left out."""

    key: str
    heading: str
    intro: str
    figures: tuple[Draw, ...]


SECTIONS: tuple[Section, ...] = (
    Section(
        "cost",
        "What it costs",
        "The quantized model beside the same model in floating point, and beside plain rounding "
        "of the same weights to the same widths.",
        (summary.perplexity, summary.speed),
    ),
    Section(
        "flatness",
        "Flatness",
        "Four bits are sixteen steps for a whole row of numbers. One outlier stretches the steps "
        "for all the others; a transform spreads it over many channels. Here q, k, v and o are the "
        "linears of attention; gate, up and down are those of the MLP.",
        (flatness.channels, maps.activations, flatness.peaks, flatness.kurtosis),
    ),
    Section(
        "errors",
        "Where the error is",
        "How far the quantized model's numbers are from the floating-point model's.",
        (errors.by_layer, maps.surface, maps.noise, errors.by_column, maps.sensitivity),
    ),
    Section(
        "fit",
        "What calibration found",
        "Transforms, clips and grids that the method chose.",
        (fitting.losses, fitting.clips, fitting.conditions, fitting.ranges),
    ),
)


@dataclass(frozen=True)
class Source:
    """A file of the analysis that can be saved from the page."""

    name: str
    about: str
    file: str
    address: str
    note: str


def sources(analysis: Analysis) -> dict[str, Source]:
    """Every file as a data: URL, or as a link to what lies beside the page if it is too large."""
    about = "Everything that is not a table: headline, sizes, speed, settings."
    files = {"analysis": (analysis.folder / "analysis.json", about, "")}
    for name, table in analysis.tables.items():
        files[name] = table.path, table.about, f"{len(table):,} rows, "
    found = {}
    room = _EMBEDDED
    for name, (path, about, rows) in sorted(files.items(), key=lambda f: f[1][0].stat().st_size):
        content = path.read_bytes()
        file, kind = path.name, "application/json" if path.suffix == ".json" else "text/csv"
        if len(content) > _PLAIN:
            content = gzip.compress(content, 9, mtime=0)
            file, kind = f"{file}.gz", "application/gzip"
        address = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
        note = f"{rows}{size(len(content))}, in this page"
        if len(address) > room:
            file, address, note = path.name, path.name, f"{rows}beside this page"
        else:
            room -= len(address)
        found[name] = Source(name, about, file, address, note)
    return {name: found[name] for name in files}


def render(analysis: Analysis) -> str:
    """The page as HTML.

    Raises:
        ImportError: jinja2 is not installed.
        ValueError: the page would be larger than `LIMIT`.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("flatquant report needs jinja2: pip install jinja2") from error
    environment = Environment(
        loader=FileSystemLoader(alone.TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [(section, _drawn(section.figures, analysis)) for section in SECTIONS]
    header = analysis.header
    name = str(header["model"].get("name", "model"))
    text = environment.get_template("report.html").render(
        name=name,
        scheme=str(header["plan"]["scheme"]),
        lede=summary.lede(analysis),
        tiles=summary.tiles(analysis),
        method=summary.method(analysis),
        sections=[(section, figures) for section, figures in shown if figures],
        sources=sources(analysis),
        provenance=_provenance(header["provenance"]),
        colours=Markup(alone.colours()),
        style=Markup(alone.read("style.css") + alone.read("drawing.css")),
        script=Markup(alone.read("script.js")),
    )
    if len(text.encode()) > LIMIT:
        raise ValueError(f"the page has {size(len(text.encode()))}: the limit is {size(LIMIT)}")
    return text


def figures_of(analysis: Analysis) -> list[Figure]:
    """Every figure that the analysis has the numbers for, in the order of the page."""
    return [figure for section in SECTIONS for figure in _drawn(section.figures, analysis)]


def _drawn(figures: Sequence[Draw], analysis: Analysis) -> list[Figure]:
    made = (draw(analysis) for draw in figures)
    return [figure for figure in made if figure is not None]


def _provenance(values: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of settings: those that hold others by their names, the rest together."""
    groups = {
        name: summary.settings(value)
        for name, value in values.items()
        if isinstance(value, Mapping)
    }
    rest = summary.settings({k: v for k, v in values.items() if not isinstance(v, Mapping)})
    return [(name, pairs) for name, pairs in [("source", rest), *groups.items()] if pairs]
