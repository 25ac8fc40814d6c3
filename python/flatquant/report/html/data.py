"""The folder that `flatquant analyze` writes: analysis.json and its tables, read and checked."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
"""Version of analysis.json; a newer one is refused."""

_REQUIRED = ("format", "provenance", "model", "plan", "headline", "tables")

#: Columns that each table must have, and what stands in them.
_COLUMNS: Mapping[str, Mapping[str, type]] = {
    "kurtosis": {"layer": int, "linear": str, "of": str, "when": str, "kurtosis": float},
    "similarity": {"layer": int, "linear": str, "cosine": float, "sqnr_db": float},
    "surface": {
        **{"layer": int, "token": int, "mse": float, "mse_alone": float},
        "power": float,
    },
    "magnitudes": {
        **{"layer": int, "site": str, "of": str, "when": str},
        **{"quantile": float, "magnitude": float},
    },
    "heatmap": {
        **{"layer": int, "site": str, "when": str, "token_bin": int, "channel_bin": int},
        "magnitude": float,
    },
    "columns": {"layer": int, "linear": str, "column_bin": int, "relative_error": float},
    "clips": {"layer": int, "where": str, "side": str, "ratio": float},
    "ranges": {
        **{"layer": int, "linear": str, "grid": str, "low": float, "high": float},
        "relative_error": float,
    },
    "conditions": {"layer": int, "site": str, "factor": str, "condition": float},
    "sensitivity": {"layer": int, "group": str, "bits": int, "kl": float},
    "fit": {"block": str, "start": float, "end": float, "seconds": float},
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A CSV file by columns: int64, float64 (NaN where a cell is empty) or str arrays.

    Attributes:
        name: what analysis.json calls it.
        path: the file.
        about: one sentence on what it holds.
        columns: name -> values, all of one length.
    """

    name: str
    path: Path
    about: str
    columns: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.columns[column]

    def where(self, **wanted: str | int) -> Table:
        """The rows whose columns have these values."""
        keep = np.ones(len(self), bool)
        for column, value in wanted.items():
            keep &= self.columns[column] == value
        return self._rows(keep)

    def _rows(self, chosen: NDArray[Any]) -> Table:
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return Table(name=self.name, path=self.path, about=self.about, columns=columns)

    def unique(self, column: str) -> list[Any]:
        """The values of a column, once each, in the order they come."""
        return list(dict.fromkeys(self.columns[column].tolist()))

    def groups(self, *names: str) -> dict[tuple[Any, ...], Table]:
        """The rows by the values of these columns, in the order they come."""
        places: dict[tuple[Any, ...], list[int]] = {}
        for index, key in enumerate(zip(*(self[name].tolist() for name in names), strict=True)):
            places.setdefault(key, []).append(index)
        return {key: self._rows(np.array(rows)) for key, rows in places.items()}

    def pivot(
        self, down: str, across: str, values: str
    ) -> tuple[list[Any], list[Any], NDArray[np.float64]]:
        """Labels down, labels across (both sorted if numbers) and [down, across]; NaN: no row."""
        rows, columns = (self._labels(name) for name in (down, across))
        at = {label: index for index, label in enumerate(rows)}
        to = {label: index for index, label in enumerate(columns)}
        grid = np.full((len(rows), len(columns)), np.nan)
        for i, j, value in zip(
            self[down].tolist(), self[across].tolist(), self[values].tolist(), strict=True
        ):
            grid[at[i], to[j]] = value
        return rows, columns, grid

    def _labels(self, column: str) -> list[Any]:
        labels = self.unique(column)
        return labels if self[column].dtype.kind == "U" else sorted(labels)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was measured of one quantized model.

    Attributes:
        folder: where it lies.
        header: analysis.json.
        tables: name -> table; those the run did not make are not there.
    """

    folder: Path
    header: Mapping[str, Any]
    tables: Mapping[str, Table]

    def table(self, name: str) -> Table | None:
        """The table of this name, if it has rows."""
        found = self.tables.get(name)
        return found if found is not None and len(found) else None

    @classmethod
    def load(cls, folder: str | Path) -> Analysis:
        """Read a folder.

        Raises:
            FileNotFoundError: there is no analysis.json, or a table that it names is missing.
            ValueError: a newer format, a missing key or column, or a cell that is no number.
        """
        folder = Path(folder)
        path = folder / "analysis.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{str(folder)!r} has no analysis.json: it must be a folder that "
                "`flatquant analyze` wrote"
            )
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        missing = [key for key in _REQUIRED if key not in header]
        if missing:
            raise ValueError(f"{path} lacks {missing[0]!r}: not an analysis")
        if header["format"] > FORMAT_VERSION:
            raise ValueError(
                f"{path}: format={header['format']} is newer than {FORMAT_VERSION}, the newest "
                "this version reads"
            )
        tables = {name: _read(name, folder, entry) for name, entry in header["tables"].items()}
        return cls(folder=folder, header=header, tables=tables)


def _read(name: str, folder: Path, entry: Mapping[str, Any]) -> Table:
    path = folder / entry["file"]
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"table {name!r} is in {entry['file']!r}: it must be a file beside it")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        heads = next(rows, [])
        wanted = _COLUMNS.get(name, {})
        missing = [column for column in wanted if column not in heads]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: it has {heads}")
        cells: list[list[str]] = [[] for _ in heads]
        for number, row in enumerate(rows, 2):
            if len(row) != len(heads):
                raise ValueError(f"{path}:{number} has {len(row)} cells, expected {len(heads)}")
            for column, cell in zip(cells, row, strict=True):
                column.append(cell)
    columns = {
        head: _convert(path, head, column, wanted.get(head, str))
        for head, column in zip(heads, cells, strict=True)
    }
    return Table(name=name, path=path, about=entry.get("about", ""), columns=columns)


def _convert(path: Path, head: str, cells: list[str], kind: type) -> NDArray[Any]:
    if kind is str:
        return np.array(cells, dtype=np.str_)
    try:
        if kind is int:
            return np.array([int(cell) for cell in cells], dtype=np.int64)
        return np.array([float(cell) if cell else math.nan for cell in cells], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}, column {head!r}: {error}") from None
