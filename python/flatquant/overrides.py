"""Exceptions to a scheme: other numbers for some linears or attention modules."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from flatquant.formats import FORMATS, INTEGER, OFF

if TYPE_CHECKING:
    from flatquant.scheme import Scheme

_NUMBER = rf"\d+|{'|'.join(sorted(FORMATS, key=len, reverse=True))}"
_NUMBERS = re.compile(
    rf"(?:W(?P<w>{_NUMBER}))?(?:A(?P<a>{_NUMBER}))?"
    rf"(?:KV(?P<kv>{_NUMBER})|K(?P<k>{_NUMBER})V(?P<v>{_NUMBER}))?"
)
_OVERRIDE = re.compile(r"(?P<pattern>[\w.*?]+)(?:@(?P<blocks>[\d,.]+))?:(?P<numbers>\w+)")
_RANGE = re.compile(r"(\d+)(?:\.\.(\d+))?")


def read_numbers(text: str) -> dict[str, str] | None:
    """ "W4A4KV4" -> {"w": "4", "a": "4", "k": "4", "v": "4"}; None if it is not of that form."""
    match = _NUMBERS.fullmatch(text)
    if match is None or not text:
        return None
    parts = {part: number for part, number in match.groupdict().items() if number}
    both = parts.pop("kv", None)
    return parts if both is None else {**parts, "k": both, "v": both}


def fields_of(part: str, number: str) -> dict[str, object]:
    """Fields of a scheme for one part ("w", "a", "k" or "v") and "4" or "E4M3"."""
    if number in FORMATS:
        return {f"{part}_bits": OFF, f"{part}_format": number}
    return {f"{part}_bits": int(number), f"{part}_format": INTEGER}


@dataclass(frozen=True, kw_only=True)
class Override:
    """Other numbers for the modules of some names.

    Attributes:
        pattern: the last parts of a module's name ("down_proj", "mlp.*"), with * and ?. Keys and
            values belong to the attention module ("self_attn").
        blocks: indices of decoder blocks; None is all.
        numbers: "W8A8", "KV8", ...; or one number, for weights and inputs where they are
            quantized ("8"; "16" leaves them alone).

    Raises:
        ValueError: numbers of another form.
    """

    pattern: str
    numbers: str
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        one = self.numbers.isdigit() or self.numbers in FORMATS
        if not one and read_numbers(self.numbers) is None:
            raise ValueError(
                f"override {self}: {self.numbers!r} must be a number or a form like W8A8 or KV8"
            )

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read "down_proj:8", "o_proj@0,3,27..29:W8A16" or "self_attn@0:KV8".

        Raises:
            ValueError: the text is not of that form.
        """
        match = _OVERRIDE.fullmatch(text)
        found = match and [_RANGE.fullmatch(p) for p in (match["blocks"] or "0").split(",")]
        if match is None or not found or None in found:
            raise ValueError(
                f"override {text!r}: expected PATTERN:NUMBERS or PATTERN@BLOCKS:NUMBERS, such as "
                "down_proj:8 or o_proj@0,27..29:W8A16"
            )
        blocks: set[int] = set()
        for part in found:
            assert part is not None
            blocks.update(range(int(part[1]), int(part[2] or part[1]) + 1))
        return cls(
            pattern=match["pattern"],
            numbers=match["numbers"],
            blocks=tuple(sorted(blocks)) if match["blocks"] else None,
        )

    def matches(self, name: str) -> bool:
        """Whether a module of this full name is meant."""
        if not fnmatchcase(f".{name}", f"*.{self.pattern}"):
            return False
        index = re.search(r"\.(\d+)(?:\.|$)", name)
        return self.blocks is None or (index is not None and int(index[1]) in self.blocks)

    def applied(self, scheme: Scheme) -> Scheme:
        """The scheme with these numbers.

        Raises:
            ValueError: the result breaks a rule of schemes.
        """
        parts = read_numbers(self.numbers)
        if parts is None:
            quantized = {"w": scheme.quantizes_weights, "a": scheme.quantizes_activations}
            parts = {part: self.numbers for part, on in quantized.items() if on}
        changes: dict[str, object] = {}
        for part, number in parts.items():
            changes.update(fields_of(part, number))
            own_blocks = number in FORMATS and FORMATS[number].block is not None
            if part in "wa" and (own_blocks or number == str(OFF)):
                changes[f"{part}_group"] = None
            if number == str(OFF) and part == "a":
                changes["a_static"] = False
        return replace(scheme, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.blocks is None:
            return f"{self.pattern}:{self.numbers}"
        return f"{self.pattern}@{_ranges(self.blocks)}:{self.numbers}"


def _ranges(blocks: tuple[int, ...]) -> str:
    """0, 1, 2, 5 -> "0..2,5"."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][1] + 1 == block:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
