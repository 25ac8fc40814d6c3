"""The report's page in a headless Chromium: wide and narrow, light and dark, by keyboard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flatquant.report.html import palette, write_page, write_pictures
from flatquant.report.html.svg import png

from . import chromium
from .made_analysis import write_analysis
from .test_report_html import FIGURES


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(write_analysis(tmp_path_factory.mktemp("analysis")))


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    if chromium.find() is None:
        pytest.skip("no Chromium on PATH (on Debian: apt install chromium)")
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


_DRAWN = """
[...document.querySelectorAll('figure')].map(figure => {
  const charts = [...figure.querySelectorAll('svg.chart')].filter(c => c.getClientRects().length);
  const whole = charts.every(c => {
    const box = c.getBoundingClientRect();
    const marks = c.querySelectorAll('path.curve, rect.bar, image, circle.dot');
    return box.width > 200 && box.height > 40 && marks.length > 0
      && [...c.querySelectorAll('text')].every(t => {
        const b = t.getBoundingClientRect();
        return b.width > 0 && b.left >= -1 && b.right <= innerWidth + 1;
      });
  });
  return [figure.id, charts.length, whole];
})
"""
_SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('svg.chart text')].filter(t => t.getClientRects().length)
  .map(t => 11 * t.getScreenCTM().a))
"""


@pytest.mark.parametrize("width", [390, 820, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(window, file, width, dark):
    window.open(file, width, dark=dark)
    assert window.complaints() == []
    assert window.run("document.documentElement.scrollWidth") <= width
    figures = window.run(_DRAWN)
    assert [name for name, _, _ in figures] == list(FIGURES)
    assert [entry for entry in figures if entry[1] == 0 or not entry[2]] == []
    assert window.run(_SMALLEST_TEXT) >= 9
    shown = "dark" if dark else "light"
    pictures = "[...document.querySelectorAll('image')].filter(i => i.getClientRects().length)"
    assert window.run(f"new Set({pictures}.map(i => i.classList[1])).size") == 1
    assert window.run(f"{pictures}[0].classList[1]") == shown
    loaded = "i => new Promise(done => { const p = new Image(); p.onload = () => done(p.width > 1);"
    loaded += " p.onerror = () => done(false); p.src = i.href.baseVal; })"
    assert window.run(f"Promise.all({pictures}.map({loaded})).then(r => r.every(x => x))")
    background = window.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(17, 19, 23)" if dark else "rgb(251, 250, 247)")


def test_by_keyboard(window, file):
    window.open(file, 1280)
    window.press("Tab")
    assert window.run("document.activeElement.className") == "skip"
    window.run("document.querySelector('#losses svg.wide').focus({preventScroll: true})")
    window.run("document.activeElement.scrollIntoView({behavior: 'instant', block: 'center'})")
    window.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    read = "document.getElementById('tip').innerText.split('\\n')"
    window.press("ArrowRight")
    first = window.run(read)
    window.press("ArrowRight")
    second = window.run(read)
    assert first[0] == "block 0" and second[0] == "block 1"
    assert first[1].startswith("before fitting ") and first[2].startswith("after fitting ")
    window.press("Escape")
    assert window.run("document.getElementById('tip').hidden")
    assert window.complaints() == []


def test_tables_and_settings_open_without_overflow(window, file):
    window.open(file, 390)
    window.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert window.run("document.documentElement.scrollWidth") <= 390
    rows = window.run(
        "[...document.querySelectorAll('figure')].map(f => f.querySelectorAll('tbody tr').length)"
    )
    assert min(rows) >= 2


def test_data_links_save_the_table(window, file, tmp_path):
    window.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    window.open(file, 1280)
    window.run("document.querySelector('#losses a.data').click()")
    saved = tmp_path / "fit.csv"
    end = time.monotonic() + 30
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert saved.read_bytes() == (file.parent / "fit.csv").read_bytes()


def test_cells_have_the_colours_of_their_codes(window, file):
    codes = np.array([[0, 1, 2], [100, 254, 255]], dtype=np.uint8)
    window.open(file, 1280)
    pixels = window.run(
        "new Promise(done => { const p = new Image(); p.onload = () => {"
        " const c = new OffscreenCanvas(3, 2).getContext('2d'); c.drawImage(p, 0, 0);"
        " done([...c.getImageData(0, 0, 3, 2).data]); };"
        f" p.src = '{png(codes, palette.ramp('light'))}'; }})"
    )
    seen = np.array(pixels).reshape(2, 3, 4)
    assert seen[..., 3].tolist() == [[0, 255, 255], [255, 255, 255]]
    assert (seen[codes > 0][:, :3] == palette.ramp("light")[codes[codes > 0]]).all()


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_follow_the_theme_and_stay_in_their_frame(window, file, dark):
    for path in write_pictures(file.parent, file.parent / "svg"):
        window.open(path, 1280, dark=dark)
        assert window.complaints() == []
        paper = window.run("getComputedStyle(document.querySelector('.paper')).fill")
        assert paper == ("rgb(24, 27, 32)" if dark else "rgb(255, 255, 255)")
        outside = window.run(
            "[...document.querySelectorAll('text')].filter(t => { const b = t.getBBox();"
            " const m = t.getCTM(), w = document.documentElement.viewBox.baseVal;"
            " return b.x + m.e < 0 || b.x + b.width + m.e > w.width || b.y + m.f < 0"
            " || b.y + b.height + m.f > w.height; }).map(t => t.textContent)"
        )
        assert outside == [], path.name


def test_complaints_are_heard(window, tmp_path):
    loud = tmp_path / "loud.html"
    loud.write_text(
        "<script>console.error('one'); setTimeout(() => { throw Error('two') });</script>"
        "<img src='http://localhost:1/three.png'><img src='missing-four.png'>"
    )
    window.open(loud, 390)
    window.run("new Promise(done => setTimeout(done, 200))")
    heard = " ".join(window.complaints())
    assert all(word in heard for word in ("one", "two", "three.png", "ERR_FILE_NOT_FOUND"))
