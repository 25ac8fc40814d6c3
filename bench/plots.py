"""Pictures of figures as SVG, written by `make docs`: the same figures give the same bytes.

Bars compare the contestants of bench_models.py; lines show tokens a second against the batch,
which must never fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from record import Figure

#: Colours that the colour-blind can tell apart (Okabe and Ito), ours first.
_COLOURS = (
    *("#0072b2", "#56b4e9", "#009e73", "#7fcfb4", "#d55e00"),
    *("#e69f00", "#f0e442", "#cc79a7", "#999999", "#000000"),
)
#: The layer of shapes.SMOOTH.
_SMOOTH_SHAPE = "Llama-7B o 4096->4096"
_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}" '
    'font-family="sans-serif" font-size="12">\n<rect width="{0}" height="{1}" fill="white"/>\n'
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Figures of one machine and device: what -> value."""

    name: str
    values: Mapping[str, float]

    def row(self, start: str) -> dict[str, float]:
        """Figures whose name is `start` and one word more: word -> value."""
        return {
            what.removeprefix(start): value
            for what, value in self.values.items()
            if what.startswith(start) and "/" not in what.removeprefix(start)
        }


def draw(topic: str, figures: Sequence[Figure]) -> dict[str, str]:
    """Pictures of a topic: file name -> SVG; there are none of most topics."""
    machine = _latest(figures)
    made: dict[str, str] = {}
    if topic == "model-speed" and machine is not None:
        model = next(iter(machine.values)).partition("/")[0]
        bars = {
            title: {
                name: value
                for name, value in machine.row(f"{model}/{task}/").items()
                if not _derived(name)
            }
            for title, task in (
                ("Prefill, 512 tokens", "prefill 512/batch 1"),
                ("Decode at 32 tokens", "decode at 32/batch 1/step"),
                ("Decode at 1024 tokens", "decode at 1024/batch 1/step"),
            )
        }
        title = f"{model}, tokens a second. {machine.name}"
        made["model-speed.svg"] = bar_groups(bars, title)
        curves = _curves(machine, f"{model}/decode at 32/batch ", "/step/", lambda _, value: value)
        made["model-batches.svg"] = lines(curves, f"Decode at 32 tokens. {title}", "batch")
    if topic == "op-speed" and machine is not None:
        shape = f"{_SMOOTH_SHAPE}/"
        curves = _curves(machine, shape, " tokens/", lambda count, us: 1e6 * count / us)
        title = f"{_SMOOTH_SHAPE}, tokens a second. {machine.name}"
        made["gemm-batches.svg"] = lines(curves, title, "tokens in a call")
    return {name: text for name, text in made.items() if text}


def _latest(figures: Sequence[Figure]) -> Machine | None:
    """The figures of the machine that was measured last."""
    if not figures:
        return None
    last = figures[-1]
    values = {
        figure.what: figure.value
        for figure in figures
        if (figure.machine, figure.device) == (last.machine, last.device)
    }
    return Machine(name=last.machine, values=values)


def _curves(
    machine: Machine, start: str, middle: str, rate: Callable[[int, float], float]
) -> dict[str, dict[int, float]]:
    """Contestant -> count -> tokens a second, of figures named <start><count><middle><name>.

    `rate` makes tokens a second of a count and a figure.
    """
    curves: dict[str, dict[int, float]] = {}
    for what, value in machine.values.items():
        count, found, name = what.removeprefix(start).partition(middle)
        if what.startswith(start) and found and count.isdigit() and not _derived(name):
            curves.setdefault(name, {})[int(count)] = rate(int(count), value)
    return curves


def _derived(name: str) -> bool:
    """Whether a figure is not a contestant's own speed."""
    return " over " in name or " of " in name or name in ("spread", "kronecker_quantize")


def bar_groups(groups: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Groups of horizontal bars, each group with a scale of its own; "" if all are empty."""
    groups = {name: bars for name, bars in groups.items() if bars}
    if not groups:
        return ""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width, label, bar, gap = 720, 230, 18, 34
    height = 44 + sum(gap + bar * len(bars) for bars in groups.values())
    parts = [_HEAD.format(width, height), _text(10, 20, title, size=11)]
    y = 40
    for group, bars in groups.items():
        parts.append(_text(10, y + 8, group, bold=True))
        y += 16
        most = max(bars.values())
        for name, value in bars.items():
            length = (width - label - 80) * value / most
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            parts.append(_text(label - 6, y + 13, name, anchor="end"))
            parts.append(
                f'<rect x="{label}" y="{y + 2}" width="{length:.1f}" height="{bar - 4}" '
                f'fill="{colour}"/>\n'
            )
            parts.append(_text(label + length + 5, y + 13, f"{value:,.4g}"))
            y += bar
        y += gap - 16
    return "".join([*parts, "</svg>\n"])


def lines(curves: Mapping[str, Mapping[int, float]], title: str, across: str) -> str:
    """Curves over counts, both axes logarithmic; "" if there is no curve of two points."""
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not curves:
        return ""
    counts = sorted({count for curve in curves.values() for count in curve})
    values = [value for curve in curves.values() for value in curve.values()]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    width, height, left, top, right, bottom = 720, 400, 60, 34, 190, 44

    def x_of(count: int) -> float:
        share = math.log(count / counts[0]) / math.log(counts[-1] / counts[0])
        return left + share * (width - left - right)

    def y_of(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return height - bottom - share * (height - top - bottom)

    parts = [_HEAD.format(width, height), _text(10, 20, title, size=11)]
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        parts.append(_line(left, y, width - right, y))
        parts.append(_text(left - 6, y + 4, f"{10.0**power:,.10g}", anchor="end"))
    for count in counts:
        parts.append(_line(x_of(count), top, x_of(count), height - bottom))
        parts.append(_text(x_of(count), height - bottom + 16, str(count), anchor="middle"))
    middle = (left + width - right) / 2
    parts.append(_text(middle, height - 10, across, anchor="middle"))
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [(x_of(count), y_of(curve[count])) for count in sorted(curve)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>\n'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>\n' for x, y in points]
        y = top + 14 + 18 * index
        parts.append(f'<rect x="{width - right + 12}" y="{y - 9}" width="10" height="10" ')
        parts.append(f'fill="{colour}"/>\n')
        parts.append(_text(width - right + 27, y, name))
    return "".join([*parts, "</svg>\n"])


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{weight}>'
        f"{escape(text)}</text>\n"
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>\n'
