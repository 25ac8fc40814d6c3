"""Text files into token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tokenize(tokenizer: Any, text: str, source: str = "text") -> Tensor:
    """Tokenise a text in one piece, without special tokens.

    Args:
        tokenizer: a tokenizer of transformers.
        text: the text.
        source: what the text is called in the error message.

    Returns:
        int64 [n].

    Raises:
        ValueError: the text holds no token.
    """
    # verbose=False: the text is meant to be longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"tokenize: {source} has 0 tokens: it must have at least one")
    return torch.tensor(ids, dtype=torch.int64)


def tokenize_file(tokenizer: Any, path: str | Path) -> Tensor:
    """Tokenise a whole UTF-8 text file in one piece, without special tokens.

    Args:
        tokenizer: a tokenizer of transformers.
        path: the text file.

    Returns:
        int64 [n].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 text or holds no token.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenize_file: {path} must be UTF-8 text: {error}") from error
    return tokenize(tokenizer, text, source=str(path))
