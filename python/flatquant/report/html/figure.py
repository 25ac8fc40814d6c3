"""A figure of the page: what it found, its drawings, its legend, and a table that says the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from flatquant.report.html.svg import Drawing

#: Panels beside one another -> width of a drawing where there is room for them.
_WIDTHS = {1: 820, 2: 460, 3: 300, 4: 230}
_NARROW = 340
_SINGLE = 380

_INPUTS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
_SITES = {
    "attn_in": "q, k, v",
    "attn_out": "o",
    "mlp_in": "gate, up",
    "mlp_out": "down",
    "qk_head": "queries and keys",
    "v_head": "values",
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend: a line, dashed or not, or a block."""

    name: str
    colour: str
    dashed: bool = False
    block: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A drawing with a heading.

    Attributes:
        title: what distinguishes it from its neighbours; "" if it stands alone.
        drawings: one, or a wide and a narrow one of the same, of which the page shows what fits.
    """

    title: str
    drawings: tuple[Drawing, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What the page shows under one heading.

    Attributes:
        key: its anchor.
        title: the finding, as a sentence.
        caption: what is drawn, and how to read it.
        panels: the drawings.
        keys: legend of lines and bars.
        scale: legend of colours in a heat-map.
        head, rows: a table with the same content, for reading instead of looking.
        source: the table of the analysis that it is made from.
        across: panels beside one another where there is room.
    """

    key: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    source: str
    keys: tuple[Key, ...] = ()
    scale: Drawing | None = None
    across: int = 1


BEFORE = Key(name="before", colour="before", dashed=True)
AFTER = Key(name="after", colour="after")


def blocks(keys: Iterable[Key]) -> tuple[Key, ...]:
    """The legend of bars in the colours of a legend of lines."""
    return tuple(replace(key, block=True) for key in keys)


def panel(title: str, draw: Callable[..., Drawing], across: int = 1) -> Panel:
    """A panel of a figure of `across`: `draw(width=...)` for desktops and again for phones."""
    return Panel(title=title, drawings=(draw(width=_WIDTHS[across]), draw(width=_NARROW)))


def single(title: str, draw: Callable[..., Drawing]) -> Panel:
    """One of two panels beside one another, drawn once: a picture too heavy to be there twice."""
    return Panel(title=title, drawings=(draw(width=_SINGLE),))


def short_name(name: str) -> str:
    """The linears that a site feeds, or a linear without what all names share."""
    return _SITES.get(name, name.rpartition(".")[2].removesuffix("_proj"))


def linear_name(name: str) -> str:
    """A linear in a sentence."""
    return f"the {short_name(name)} projection"


def place_name(name: str) -> str:
    """A site or a cache as a heading."""
    label = short_name(name)
    return label.capitalize() if name not in _INPUTS else f"Input of {label}"


def thin(rows: Sequence[tuple[str, ...]], most: int = 40) -> tuple[tuple[str, ...], ...]:
    """At most `most` rows, evenly chosen, the last one among them."""
    step = -(-len(rows) // most)
    return tuple(rows[::-1][::step][::-1]) if rows else ()
