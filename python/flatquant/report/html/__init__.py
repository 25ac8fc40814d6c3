"""One self-contained HTML page about a quantized model, from the folder of an analysis."""

from __future__ import annotations

from pathlib import Path

from flatquant.report.html.alone import standalone
from flatquant.report.html.data import Analysis
from flatquant.report.html.page import LIMIT, figures_of, render


def write_page(folder: str | Path, output: str | Path | None = None) -> Path:
    """Make the page of a folder that `flatquant analyze` wrote.

    The same folder gives the same bytes. The page needs no network and has less than `LIMIT` bytes.

    Args:
        folder: analysis.json and its tables.
        output: file to write; None: report.html in the folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError, ValueError: what `Analysis.load` says of the folder.
        ImportError: jinja2 is not installed.
    """
    path = Path(folder) / "report.html" if output is None else Path(output)
    if path.is_dir():
        raise ValueError(f"output is {str(path)!r}: it must be a file, not a folder")
    text = render(Analysis.load(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_pictures(folder: str | Path, output: str | Path) -> list[Path]:
    """Write every figure of a page as an SVG file, which follows its reader's light or dark theme.

    Args:
        folder: analysis.json and its tables.
        output: folder for the files; a figure's name on the page is its file's.

    Raises:
        FileNotFoundError, ValueError: what `Analysis.load` says of the folder.
    """
    target = Path(output)
    figures = figures_of(Analysis.load(folder))
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / f"{figure.key}.svg" for figure in figures]
    for path, figure in zip(paths, figures, strict=True):
        path.write_text(standalone(figure), encoding="utf-8")
    return paths


__all__ = ["LIMIT", "write_page", "write_pictures"]
