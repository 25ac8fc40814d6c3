"""A figure as an SVG file of its own, for a README: it follows the reader's light or dark theme."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

from markupsafe import Markup

from flatquant.report.html import palette, svg
from flatquant.report.html.figure import Figure, Key

TEMPLATES = Path(__file__).parent.parent / "templates"
"""Style sheets, script and the page around the figures."""

_MARGIN, _GAP = 24, 32
_CHARACTER = 9.6  # mean width of a character of the heading, in a wide font
_LEGEND = 7.4  # of the legend


def read(name: str) -> str:
    """The text of a template."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def colours() -> str:
    """A style sheet that defines the colours of either theme."""
    light, dark = palette.variables("light"), palette.variables("dark")
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def standalone(figure: Figure) -> str:
    """Title, legend and all panels of a figure as one SVG file."""
    sizes = [panel.drawings[0] for panel in figure.panels]
    across = min(figure.across, len(sizes))
    cell = max(drawing.width for drawing in sizes)
    width = 2 * _MARGIN + across * cell + (across - 1) * _GAP
    parts, y = [], _MARGIN + 14.0
    for line in wrap(figure.title, int((width - 2 * _MARGIN) / _CHARACTER)):
        parts.append(svg.text(_MARGIN, y, line, "heading"))
        y += 22
    if figure.scale is not None:
        place = f"translate({_MARGIN - 14} {svg.short(y)})"
        parts.append(svg.tag("g", figure.scale.body, transform=place))
        y += figure.scale.height + 10
    if figure.keys:
        parts.append(_legend(figure.keys, y))
        y += 26
    for start in range(0, len(sizes), across):
        row = list(zip(figure.panels, sizes, strict=True))[start : start + across]
        for column, (panel, drawing) in enumerate(row):
            x = _MARGIN + column * (cell + _GAP)
            parts.append(svg.text(x, y + 8, panel.title, "panel"))
            top = y + (18 if panel.title else 0)
            place = f"translate({x} {svg.short(top)})"
            parts.append(svg.tag("g", drawing.body, transform=place))
        y += max(drawing.height for _, drawing in row) + _GAP + (10 if row[0][0].title else 0)
    height = round(y - _GAP + _MARGIN)
    style = (
        f"{colours()}\n{read('drawing.css')}"
        "svg .heading{font-size:17px;font-weight:640;fill:var(--ink)}"
        "svg .panel{font-size:13px;font-weight:600;fill:var(--ink)}"
        "svg .key{font-size:13px;fill:var(--ink)}.paper{fill:var(--card)}\n"
    )
    paper = svg.tag("rect", width=width, height=height, rx=10, class_="paper")
    drawn = svg.tag(
        "svg",
        svg.tag("title", figure.title),
        svg.tag("style", Markup(style)),
        paper,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        role="img",
    )
    return f"{drawn}\n"


def _legend(keys: tuple[Key, ...], y: float) -> Markup:
    parts, x = [], float(_MARGIN)
    for key in keys:
        if key.block:
            size = {"width": 11, "height": 11}
            parts.append(
                svg.tag("rect", x=x + 6, y=y - 3, rx=1.5, class_=f"bar {key.colour}", **size)
            )
        else:
            style = f"curve {key.colour}{' dashed' if key.dashed else ''}"
            parts.append(svg.line(x, y + 3, x + 24, y + 3, style))
        parts.append(svg.text(x + 32, y + 7, key.name, "key"))
        x += 52 + _LEGEND * len(key.name)
    return svg.join(parts)
