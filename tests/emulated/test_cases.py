"""The op table on the CUDA sources: every row equals the reference, in every order of threads."""

from __future__ import annotations

import pytest

from .emulated import ORDERS, Emulated
from .rows import FURTHER_ROWS, STREAMS, TABLE, Row


@pytest.mark.parametrize("row", TABLE + FURTHER_ROWS + STREAMS, ids=lambda row: row.id)
def test_matches_reference(row: Row, emulated: Emulated) -> None:
    first, *others = row.check(emulated, *ORDERS)
    assert all(other == first for other in others), "the order of the threads changes the answer"
