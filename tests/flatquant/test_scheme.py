"""Schemes: parsing, printing, rules."""

from __future__ import annotations

import pytest

from flatquant import Scheme


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("W4A4KV4", (4, 4, 4, 4, True, None)),
        ("W4A8KV4", (4, 8, 4, 4, True, None)),
        ("W4A16", (4, 16, 16, 16, True, None)),
        ("W3A16-g128", (3, 16, 16, 16, True, 128)),
        ("KV4", (16, 16, 4, 4, True, None)),
        ("K4V2", (16, 16, 4, 2, True, None)),
        ("W4A4KV4-asym", (4, 4, 4, 4, False, None)),
        ("W8A8", (8, 8, 16, 16, True, None)),
    ],
)
def test_parse(text: str, fields: tuple[object, ...]) -> None:
    scheme = Scheme.parse(text)
    found = (
        scheme.w_bits,
        scheme.a_bits,
        scheme.k_bits,
        scheme.v_bits,
        scheme.a_symmetric,
        scheme.w_group,
    )
    assert found == fields
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W9A4", "w_bits=9 must be 2..8, or 16"),
        ("W4A1", "a_bits=1 must be"),
        ("W4A4-g128", "one weight scale per output channel"),
        ("W4A4-sym", "unknown option 'sym'"),
        ("", "expected a form like"),
        ("4bit", "expected a form like"),
        ("KV4-g128", "needs w_bits below 16"),
    ],
)
def test_bad_schemes_name_value_and_rule(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


def test_no_quantization_prints_and_parses() -> None:
    assert Scheme.parse(str(Scheme())) == Scheme()
