"""Colours, numbers, axes and elements of the report's page."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from flatquant.report.html import palette
from flatquant.report.html.scale import Scale, fit, number
from flatquant.report.html.svg import tag


def _contrast(a: str, b: str) -> float:
    weights = np.array([0.2126, 0.7152, 0.0722])
    dark, light = sorted(float(weights @ palette.linear_light(c)) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", palette.THEMES)
def test_contrast(theme):
    colours = palette.THEMES[theme]
    for surface in ("page", "card"):
        for name in ("ink", "muted", "link"):
            assert _contrast(colours[name], colours[surface]) >= 4.5, (name, surface)
        for name in (*palette.SERIES, "reference"):
            assert _contrast(colours[name], colours[surface]) >= 3, (name, surface)
    assert _contrast(colours["page"], colours["ink"]) >= 4.5  # the tip under the pointer


#: Machado, Oliveira and Fernandes 2009, severity 1, on linear light.
_VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


@pytest.mark.parametrize("vision", _VISION)
@pytest.mark.parametrize("theme", palette.THEMES)
def test_colours_stay_apart(theme, vision):
    seen = {
        name: palette.oklab(
            np.clip(_VISION[vision] @ palette.linear_light(palette.THEMES[theme][name]), 0, 1)
        )
        for name in palette.SERIES
    }
    for a, b in combinations(palette.SERIES, 2):
        assert float(np.linalg.norm(seen[a] - seen[b])) >= 0.12, (a, b)


@pytest.mark.parametrize("theme", palette.THEMES)
@pytest.mark.parametrize("vision", _VISION)
def test_ramps_grow_steadily(theme, vision):
    codes = palette.ramp(theme) / 255
    light = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    lightness = palette.oklab(np.clip(light @ _VISION[vision].T, 0, 1))[:, 0]
    steps = np.diff(lightness) * (1 if theme == "dark" else -1)
    assert steps.min() > -0.004 and abs(lightness[-1] - lightness[0]) > 0.55
    blocks = np.diff(lightness[::15])
    assert (blocks > 0).all() or (blocks < 0).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (11544.4, "11,544"), (42.17, "42.2"), (0.0042, "0.0042"), (-3.5, "−3.5")),
        *((1.2e-6, "1.2·10⁻⁶"), (1e9, "10⁹"), (float("nan"), "–"), (float("inf"), "∞"), (3.0, "3")),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[0.001, 2000.0], [5.0, 5.0], [0.93, 0.97], [], [float("nan")], [-4.0, 9.0], [1e-30]]
)
def test_axes_hold_their_values(values, log):
    axis = fit(values, 0.0, 100.0, log=log)
    ticks = axis.ticks(5)
    assert all(axis.low * 0.999 <= t <= axis.high * 1.001 for t in ticks if log or t > 0)
    assert 1 <= len(ticks) <= 7
    for value in values:
        if np.isfinite(value) and (value > 0 or not log):
            assert axis.low <= value <= axis.high and 0 <= axis(value) <= 100


def test_logarithmic_axis_above_zero():
    with pytest.raises(ValueError, match=r"starts at 0.0: it must be above 0"):
        Scale(0.0, 1.0, 0.0, 1.0, log=True)


def test_elements_are_escaped():
    drawn = str(tag("text", 'a<b & "c"', class_='x" onload="y', data_tip=None, x=1.25))
    assert drawn == '<text class="x&#34; onload=&#34;y" x="1.2">a&lt;b &amp; &#34;c&#34;</text>'
