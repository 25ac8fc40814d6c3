"""Elements of an SVG as safe text: attributes and children are escaped, numbers are short."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

Attribute = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture of fixed proportions; colours and fonts come from the page's style sheet.

    Attributes:
        width, height: in units of one CSS pixel at full size.
        body: the elements inside.
        areas: invisible ones that tell their values; a page puts them on top.
    """

    width: int
    height: int
    body: Markup
    areas: Markup = Markup()  # noqa: RUF009 (immutable text)


def tag(name: str, *children: str | Markup, **attributes: Attribute) -> Markup:
    """One element; `class_` is class, `stroke_width` is stroke-width, None is left out."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            text = short(value) if isinstance(value, float) else str(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    if not children:
        return Markup("".join([*parts, "/>"]))
    inside = "".join(str(escape(child)) for child in children)
    return Markup("".join([*parts, ">", inside, f"</{name}>"]))


def join(parts: Iterable[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


def short(value: float) -> str:
    """A coordinate: one decimal at most."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def text(x: float, y: float, content: str, style: str, anchor: str = "start") -> Markup:
    """A line of text; `style` is a class of the style sheet."""
    place = None if anchor == "start" else anchor
    return tag("text", content, x=float(x), y=float(y), class_=style, text_anchor=place)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=style)


def path(points: Sequence[tuple[float, float]], style: str) -> Markup:
    """A line through points."""
    drawn = "L".join(f"{short(x)},{short(y)}" for x, y in points)
    return tag("path", d=f"M{drawn}", class_=style)


def hit(x: float, y: float, width: float, height: float, tip: str) -> Markup:
    """An invisible area that shows `tip` under the pointer; "|" parts its lines."""
    sizes = {"width": max(float(width), 1.0), "height": max(float(height), 1.0)}
    return tag("rect", class_="hit", x=float(x), y=float(y), **sizes, data_tip=tip)


def png(codes: NDArray[np.uint8], colours: NDArray[np.uint8]) -> str:
    """A palette image as a data: URL.

    Args:
        codes: uint8 [height, width], indices of colours; 0 is transparent.
        colours: uint8 [256, 3].
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width = codes.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), codes], axis=1)  # filter 0 each
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", colours.tobytes())
        + chunk(b"tRNS", b"\0")
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
