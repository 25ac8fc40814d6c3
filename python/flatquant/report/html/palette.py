"""Colours of the page in light and dark: names that the style sheet and the drawings share.

Text has a contrast of 4.5 and more to every surface it stands on, marks have 3 and more (WCAG 2.2
AA); the data colours stay apart for protanopes, deuteranopes and tritanopes. Ramps of heat-maps
grow steadily in lightness, so they also read in grey. tests/flatquant/test_report_look.py
measures all of that.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

#: Colours of the data, in the order in which a figure uses them.
SERIES = ("after", "before", "third", "fourth")

LIGHT: Mapping[str, str] = {
    "page": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1b1e23",
    "muted": "#5a616b",
    "rule": "#e3e1da",
    "link": "#17508f",
    "after": "#1c5d9f",
    "before": "#c75d12",
    "third": "#189b90",
    "fourth": "#7d1f4b",
    "reference": "#737983",
}
DARK: Mapping[str, str] = {
    "page": "#111317",
    "card": "#181b20",
    "ink": "#eae8e3",
    "muted": "#a4aab3",
    "rule": "#2d3138",
    "link": "#8fc1f5",
    "after": "#69aef0",
    "before": "#f29a52",
    "third": "#9fe8d0",
    "fourth": "#c25a80",
    "reference": "#8b929c",
}
THEMES: Mapping[str, Mapping[str, str]] = {"light": LIGHT, "dark": DARK}

#: Anchors of the heat-maps' ramps, from little to much.
_RAMPS: Mapping[str, tuple[str, ...]] = {
    "light": ("#f4f1ea", "#c5dbe6", "#7fb0d3", "#3a78b5", "#1f4a86", "#0f1f45"),
    "dark": ("#1c2027", "#1f3c61", "#2a669f", "#559bd4", "#a5cdee", "#fbf6e6"),
}
_STEPS = 256

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear_light(colour: str) -> NDArray[np.float64]:
    """Red, green and blue of "#rrggbb" as light, each 0..1 (sRGB's curve undone)."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lightness, green-red and blue-yellow of light [..., 3] (Ottosson's Oklab)."""
    return np.cbrt(light @ _TO_LMS.T) @ _TO_LAB.T


def ramp(theme: str) -> NDArray[np.uint8]:
    """uint8 [256, 3] colours of a heat-map, from little to much, evenly spaced to the eye."""
    anchors = np.array([oklab(linear_light(colour)) for colour in _RAMPS[theme]])
    # equal steps in lightness, whatever the distance of the anchors
    place = np.abs(anchors[:, 0] - anchors[0, 0]) / abs(anchors[-1, 0] - anchors[0, 0])
    steps = np.linspace(0, 1, _STEPS)
    lab = np.stack([np.interp(steps, place, anchors[:, i]) for i in range(3)], axis=1)
    light = ((lab @ np.linalg.inv(_TO_LAB).T) ** 3) @ np.linalg.inv(_TO_LMS).T
    light = np.clip(light, 0, 1)
    value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(value * 255).astype(np.uint8)


def variables(theme: str) -> str:
    """The colours of a theme as CSS custom properties."""
    return "".join(f"--{name}:{colour};" for name, colour in THEMES[theme].items())
