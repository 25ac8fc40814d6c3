"""What the numbers of a tensor are rounded to, and which of them share a scale."""

from __future__ import annotations

from dataclasses import dataclass

from flatquant.formats.numbers import NUMBERS, FloatNumber

OFF = 16
"""Bit width that means "not quantized"."""

INTEGER = "int"
"""Name of the integer formats; their width and grid are said separately."""

FLOAT32, E8M0, E4M3 = "float32", "e8m0", "e4m3"
"""How scales are stored: as they are; as a power of two; as E4M3 times one float32 a row."""


@dataclass(frozen=True)
class Named:
    """A format that a scheme names.

    Attributes:
        number: name in `NUMBERS`.
        block: channels that share a scale; None is the whole row.
        scale: how the scales are stored.
    """

    number: str
    block: int | None = None
    scale: str = FLOAT32


FORMATS: dict[str, Named] = {
    **{name: Named(name) for name in NUMBERS},
    "MXFP4": Named("E2M1", 32, E8M0),
    "MXFP6": Named("E3M2", 32, E8M0),
    "MXFP8": Named("E4M3", 32, E8M0),
    "NVFP4": Named("E2M1", 16, E4M3),
}
"""Names of a scheme -> floating-point formats. MX: OCP Microscaling v1.0; NVFP4: NVIDIA's."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """Numbers, and what shares a scale.

    Attributes:
        kind: "int", or a name in `FORMATS`.
        bits: width of a number; 16 is off.
        symmetric: whether the integers' zero point is 0; floats have none.
        group: channels that share a scale, None for the whole row.
        per_tensor: all rows share one scale.
        static: the range is fixed before it is used (`per_tensor` too).

    Raises:
        ValueError: an unknown kind.
    """

    kind: str = INTEGER
    bits: int = OFF
    symmetric: bool = True
    group: int | None = None
    per_tensor: bool = False
    static: bool = False

    def __post_init__(self) -> None:
        if self.kind != INTEGER and self.kind not in FORMATS:
            raise ValueError(f"format {self.kind!r} is unknown; known: int, {', '.join(FORMATS)}")

    @property
    def off(self) -> bool:
        """Whether nothing is rounded."""
        return self.bits == OFF

    @property
    def number(self) -> FloatNumber | None:
        """The floating-point number, None for integers."""
        return None if self.kind == INTEGER else NUMBERS[FORMATS[self.kind].number]

    @property
    def scale(self) -> str:
        """How scales are stored."""
        return FLOAT32 if self.kind == INTEGER else FORMATS[self.kind].scale

    @property
    def block(self) -> int | None:
        """Channels that share a scale: the format's own number of them, or `group`."""
        own = None if self.kind == INTEGER else FORMATS[self.kind].block
        return self.group if own is None else own

    @property
    def by_row(self) -> bool:
        """Whether these are integers with one scale a row, found at run time."""
        whole = self.block is None and not self.per_tensor and not self.static
        return self.kind == INTEGER and whole

    def check_width(self, channels: int, what: str) -> None:
        """Refuse rows that the blocks do not divide.

        Raises:
            ValueError: naming both numbers.
        """
        if self.block is not None and channels % self.block:
            raise ValueError(f"{what}={self.block} does not divide the layer's {channels} channels")
