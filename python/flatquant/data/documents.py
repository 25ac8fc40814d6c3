"""Texts to calibrate on or to measure with: local files, folders, or data sets of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("text", "content", "sentence", "page", "question", "prompt")
"""Names under which a record's text is looked for where none is given."""

#: A heading of WikiText's first level, " = Title = ": an article begins there.
_ARTICLE = re.compile(r"(?m)^(?= ?= [^=\n]+ = ?$)")
_BLANK = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A named list of texts.

    Attributes:
        name: what tables call it.
        texts: the documents, none of them blank.
        joined: the whole text in one piece, as perplexity protocols tokenise it.
        files: the files that were read; empty for a data set of the hub.
    """

    name: str
    texts: tuple[str, ...]
    joined: str
    files: tuple[Path, ...] = ()


def read_documents(source: str | Path, field: str | None = None) -> Documents:
    """Read a source of texts.

    Args:
        source: a file (.txt, .jsonl, .json, .parquet), a folder of such files, or
            "name[:config[:split]]" of the hub, which needs the package `datasets` (its own cache
            and its offline mode apply). A .txt file's documents are its WikiText articles if it has
            headings of the first level, else what blank lines separate.
        field: the records' field that holds the text; None takes the first of `FIELDS` there is.
            A field "messages" (a list of {"role", "content"}) is joined by blank lines.

    Raises:
        ValueError: no such file, nothing to read in it, no such field, or the package that reads it
            is not installed.
    """
    path = Path(source)
    if path.is_dir():
        files = tuple(sorted(file for file in path.iterdir() if file.suffix in READERS))
        if not files:
            raise ValueError(f"{path} has no file that ends in {', '.join(READERS)}")
    elif path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path} must end in one of {', '.join(READERS)}")
        files = (path,)
    else:
        return _documents(path.name, list(_from_hub(str(source), field)), "\n\n", ())
    texts = [text for file in files for text in READERS[file.suffix](file, field)]
    if len(files) == 1 and path.suffix == ".txt":
        return _documents(path.stem, texts, None, files, _decoded(path))
    return _documents(path.stem, texts, "\n\n", files)


def _documents(
    name: str, texts: list[str], joint: str | None, files: tuple[Path, ...], whole: str = ""
) -> Documents:
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{name}: every document is blank")
    joined = whole if joint is None else joint.join(texts)
    return Documents(name=name, texts=tuple(texts), joined=joined, files=files)


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error


def _from_text(path: Path, field: str | None) -> Iterator[str]:
    text = _decoded(path)
    articles = _ARTICLE.split(text)
    yield from articles if len(articles) > 1 else _BLANK.split(text)


def _from_json_lines(path: Path, field: str | None) -> Iterator[str]:
    for number, line in enumerate(_decoded(path).splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            yield _text_of(record, field, f"{path}, line {number}")


def _from_json(path: Path, field: str | None) -> Iterator[str]:
    try:
        records = json.loads(_decoded(path))
    except json.JSONDecodeError:
        yield from _from_json_lines(path, field)  # many ".json" files hold one record a line
        return
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a {type(records).__name__}: it must be a list of records")
    for number, record in enumerate(records):
        yield _text_of(record, field, f"{path}, record {number}")


def _from_parquet(path: Path, field: str | None) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from error
    file = parquet.ParquetFile(path)
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            yield _text_of(record, field, str(path))


def _from_hub(source: str, field: str | None) -> Iterator[str]:
    name, config, split = ([*source.split(":", 2), "", ""])[:3]
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source!r} is no file or folder; as a name on the hub it needs the package datasets "
            "(pip install datasets)"
        ) from error
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{source!r} is no file or folder, and datasets cannot load it: {reason}"
        ) from error
    for number, record in enumerate(records):
        yield _text_of(record, field, f"{source}, record {number}")


def _text_of(record: Any, field: str | None, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}: it must be text or a record")
    names = FIELDS if field is None else (field,)
    for name in (*names, "messages") if field is None else names:
        value = record.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return "\n\n".join(str(turn.get("content", "")) for turn in value)
    raise ValueError(f"{where} has fields {sorted(record)}: none of {', '.join(names)} holds text")


READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".json": _from_json,
    ".parquet": _from_parquet,
}
"""File name's end -> the documents in such a file."""
