"""The page of `flatquant report`: what it says, what it needs, what it refuses."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from flatquant.cli import main
from flatquant.report.html import LIMIT, write_page, write_pictures
from flatquant.report.html import page as page_module
from flatquant.report.html.data import Analysis
from flatquant.report.html.scale import number
from flatquant.report.html.summary import scheme_in_words
from flatquant.scheme import Scheme

from .made_analysis import TABLES, write_analysis

FIGURES = (
    *("perplexity", "speed", "channels", "activations", "peaks", "kurtosis", "layers", "surface"),
    *("noise", "columns", "sensitivity", "losses", "clips", "conditions", "ranges"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_analysis(tmp_path_factory.mktemp("analysis"))


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_page(folder).read_text(encoding="utf-8")


def test_every_figure_is_there(page):
    assert tuple(re.findall(r'<figure id="(\w+)"', page)) == FIGURES
    assert page.count('<svg class="chart wide"') == page.count('<svg class="chart narrow"') > 30


def test_drawings_are_sound(page):
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter("rect"):
            assert 0 <= float(element.attrib.get("x", 0)) <= width
            assert float(element.attrib["width"]) <= width
        for element in root.iter("text"):
            assert 0 <= float(element.attrib["y"]) <= height
        said = [value for e in root.iter() for key, value in e.attrib.items() if key != "href"] + [
            element.text or "" for element in root.iter("text")
        ]
        assert [value for value in said if re.search(r"\bnan\b", value.lower())] == []


def test_headline_is_what_was_measured(page):
    assert "perplexity 42.2 against 29.2 in floating point, and 11,544 with plain rounding" in page
    # 1 - ln(42.17 / 29.19) / ln(11544 / 29.19)
    assert "It avoids 93.8 % of what plain rounding adds to the loss" in page
    assert "2.2× smaller" in page and "Weights, activations and the KV cache in 4 bits" in page


def test_titles_say_what_the_tables_say(folder, page):
    table = Analysis.load(folder).tables["similarity"]
    least = int(np.argmin(table["sqnr_db"]))
    linear = table["linear"][least].rpartition(".")[2].removesuffix("_proj")
    said = f"the {linear} projection in layer {table['layer'][least]}: "
    assert said + number(float(table["sqnr_db"][least])) in page
    fit_table = Analysis.load(folder).tables["fit"]
    share = 1 - float(np.median(fit_table["end"] / fit_table["start"]))
    assert f"lowers the loss of the typical block by {number(100 * share)} %" in page


def test_a_method_that_flattens_nothing_is_not_praised(tmp_path):
    write_analysis(tmp_path)
    for name in ("magnitudes", "heatmap", "kurtosis"):
        path = tmp_path / f"{name}.csv"
        head, *lines = path.read_text().splitlines()
        before = [line for line in lines if ",before," in line]
        same = [line.replace(",before,", ",after,") for line in before]
        path.write_text("\n".join([head, *before, *same]) + "\n")
    text = write_page(tmp_path).read_text(encoding="utf-8")
    titles = re.findall(r"<h3.*?</h3>", text)
    assert len([title for title in titles if "stays at" in title]) == 4
    assert [title for title in titles if "falls from" in title] == []


def test_same_folder_same_bytes_without_network(folder, page, tmp_path):
    assert write_page(folder, tmp_path / "again.html").read_text(encoding="utf-8") == page
    outside = re.findall(r'(?:href|src)="(?!#|data:)[^"]*"|url\(|@import|https?:', page)
    assert outside == []


def test_files_can_be_saved_from_the_page(folder, page):
    for name in ("analysis", *TABLES):
        link = rf'id="data-{name}" href="data:([^;]*);base64,([^"]*)" download="([^"]*)"'
        found = re.search(link, page)
        assert found, name
        content = base64.b64decode(found[2])
        if found[1] == "application/gzip":
            assert found[3] == f"{name}.csv.gz"
            content = gzip.decompress(content)
        assert content == next(folder.glob(f"{name}.*")).read_bytes()
    assert set(re.findall(r'data-save="data-(\w+)"', page)) == {"analysis", *TABLES}


class _Outline(HTMLParser):
    """Headings, labels and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.ids: list[str] = []
        self.wanted: set[str] = set()
        self.unlabelled: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if (values.get("href") or "").startswith("#"):
            self.wanted.add(str(values["href"])[1:])
        self.wanted |= set((values.get("aria-labelledby") or "").split())
        if values.get("role") in ("img", "region") and not values.get("aria-label"):
            self.unlabelled.append(str(attrs))


def test_outline_for_screen_readers(page):
    outline = _Outline()
    outline.feed(page)
    assert outline.levels[0] == 1 and outline.levels.count(1) == 1
    steps = [b - a for a, b in zip(outline.levels, outline.levels[1:], strict=False)]
    assert max(steps) == 1
    assert len(set(outline.ids)) == len(outline.ids)
    assert outline.wanted <= set(outline.ids)
    assert outline.unlabelled == []
    assert page.count("<table>") == page.count("<figure")


@pytest.mark.parametrize("name", TABLES)
def test_missing_table_leaves_its_figures_out(name, tmp_path):
    write_analysis(tmp_path, layers=2, drop=[name])
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert f"data-{name}" not in text
    assert 12 < text.count("<figure") < len(FIGURES)


def test_nothing_but_the_header(tmp_path):
    write_analysis(tmp_path, layers=1, drop=TABLES)
    path = tmp_path / "analysis.json"
    header = json.loads(path.read_text())
    header.update(headline={"fp": {}, "quantized": {}, "rtn": None}, size=None, speed=None)
    header["plan"].update(scheme="KV4", sites=[], method="rtn")
    path.write_text(json.dumps(header))
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert "<figure" not in text and "The KV cache in 4 bits." in text


def test_odd_values(tmp_path):
    """Infinite, missing and zero values leave gaps, and names of a model are only text."""
    write_analysis(tmp_path, layers=2)
    for name in ("similarity", "conditions", "clips"):
        path = tmp_path / f"{name}.csv"
        lines = path.read_text().splitlines()
        odd = zip(lines[1:4], ("inf", "", "0"), strict=True)
        lines[1:4] = [re.sub(r"[\d.]+$", value, line) for line, value in odd]
        path.write_text("\n".join(lines) + "\n")
    header = json.loads((tmp_path / "analysis.json").read_text())
    header["model"]["name"] = "<script>alert(1)</script>"
    (tmp_path / "analysis.json").write_text(json.dumps(header))
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and "&lt;script&gt;alert(1)" in text
    assert ">nan" not in text and '"nan' not in text


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("W4A8KV4", "weights and the KV cache in 4 bits and activations in 8 bits"),
        ("W3A16-g128", "weights in 3 bits"),
        ("K4V2", "keys in 4 bits and values in 2 bits"),
        ("W4A4-head8", "weights and activations in 4 bits and the output head in 8 bits"),
        ("WMXFP4A8", "weights in MXFP4 and activations in 8 bits"),
        ("W4A16-down_proj:8", "weights in 4 bits, with exceptions"),
        ("W16A16", "nothing quantized"),
    ],
)
def test_schemes_in_words(scheme, words):
    assert scheme_in_words(Scheme.parse(scheme)).lower() == words.lower()


def _spoil(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("analysis.json", '"format": 1', '"format": 2', "format=2 is newer than 1"),
        ("analysis.json", '"plan"', '"plans"', "lacks 'plan'"),
        ("analysis.json", "{", "", "is not JSON"),
        ("analysis.json", '"fit.csv"', '"../fit.csv"', "must be a file beside it"),
        ("analysis.json", '"fit.csv"', '"none.csv"', "none.csv"),
        ("fit.csv", "seconds", "minutes", "has no column 'seconds'"),
        ("fit.csv", "model.layers.0,", "model.layers.0,x", "column 'start'"),
        ("fit.csv", "model.layers.0,", "model.layers.0,1,", "fit.csv:2 has 6 cells, expected 5"),
    ],
)
def test_bad_folders_are_refused(file, old, new, message, tmp_path):
    write_analysis(tmp_path, layers=1)
    _spoil(tmp_path, file, old, new)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        write_page(tmp_path)


def test_command(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path / "a" / "page.html")]) == 0
    assert "page.html: " in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 2
    assert "has no analysis.json" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    assert "must be a file" in capsys.readouterr().err


def test_pictures(folder, tmp_path, capsys):
    made = ["--output", str(tmp_path / "page.html"), "--pictures", str(tmp_path / "svg")]
    assert main(["report", str(folder), *made]) == 0
    assert f"{len(FIGURES)} SVG files" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "svg").iterdir()} == set(FIGURES)
    again = write_pictures(folder, tmp_path / "again")
    for path in again:
        root = ElementTree.parse(path).getroot()
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        text = path.read_text(encoding="utf-8")
        assert "prefers-color-scheme:dark" in text and 'class="hit"' not in text
        assert 200 < width < 1100 and 100 < height < 2000
        assert text == (tmp_path / "svg" / path.name).read_text(encoding="utf-8")


def test_without_jinja2_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="pip install jinja2"):
        write_page(folder)


def test_many_layers_fit_in_time_and_bytes(tmp_path):
    write_analysis(tmp_path, layers=80)
    began = time.process_time()
    path = write_page(tmp_path)
    assert time.process_time() - began < 60
    assert path.stat().st_size < LIMIT


def test_large_tables_stay_beside_the_page(tmp_path, monkeypatch):
    write_analysis(tmp_path, layers=2)
    monkeypatch.setattr(page_module, "_EMBEDDED", 60_000)
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert '<a id="data-magnitudes" href="magnitudes.csv" download="magnitudes.csv">' in text
    assert 'id="data-fit" href="data:text/csv;base64,' in text
    monkeypatch.setattr(page_module, "LIMIT", 1000)
    with pytest.raises(ValueError, match="the limit is 1 kB"):
        write_page(tmp_path)
