"""The channel counts of real models, with the plans of an A100, an RTX 3090 and an H100."""

from __future__ import annotations

import pytest

from .emulated import Emulated
from .rows import MODELS, Row


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.id)
def test_matches_reference(row: Row, emulated: Emulated) -> None:
    row.check(emulated)


def test_codes_rarely_differ(emulated: Emulated) -> None:
    """Over all tokens of this file, codes keep the contract's rate."""
    for row in MODELS:
        if row.case.op == "kronecker_quantize" and row.id not in emulated.checked:
            row.check(emulated)
    different, codes = map(sum, zip(*emulated.differences.values(), strict=True))
    print(f"{different} of {codes} codes differ from the reference")
    assert different <= 1e-4 * codes
