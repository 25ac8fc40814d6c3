"""Settings of rounding that is learned with the block (the learning itself is in fit/rounding)."""

from __future__ import annotations

from dataclasses import dataclass

from flatquant.weights.search import ClipSearch

_EARLY = (0.8, 0.65, 0.5, 0.43, 0.38, 0.34, 0.3, 0.27, 0.24, 0.21)
_LATE = (0.18, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005)


@dataclass(frozen=True, kw_only=True)
class Progressive:
    """Every weight goes up or down, as the block's output wants it (TesseraQ, arXiv 2410.19103).

    Attributes:
        clip: search for the ends of the grid; None: the extremes.
        shares: of the weights that are still undecided after each hardening; these are spread
            evenly over the epochs (the handcrafted ones of the authors' code in LLMC).

    Raises:
        ValueError: no shares, or shares that do not fall within (0, 1).
    """

    clip: ClipSearch | None = None
    shares: tuple[float, ...] = _EARLY + _LATE

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip((1.0, *self.shares), (*self.shares, 0.0), strict=True))
        if not self.shares or not falling:
            raise ValueError(f"Progressive: shares={self.shares} must fall from below 1 to above 0")
