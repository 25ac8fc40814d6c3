"""What is measured of activations while they stream by; memory depends on sizes, not on text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_max_pool2d

QUANTILES = 129
"""Points of a curve of sorted channel maxima."""
TOKEN_BINS = 128
"""Positions of an error surface, at most."""
HEATMAP_BINS = (64, 96)
"""Tokens and channels of a heat map, at most."""


class Moments:
    """Kurtosis over everything seen (Pearson's: 3 for a normal distribution)."""

    def __init__(self) -> None:
        self.count = 0
        self._sums = [0.0] * 4

    def __call__(self, x: Tensor) -> None:
        """x: any shape."""
        flat = x.detach().reshape(-1).float()
        square = flat * flat
        parts = (flat.sum(), square.sum(), torch.dot(flat, square), torch.dot(square, square))
        self.count += flat.numel()
        self._sums = [a + float(b) for a, b in zip(self._sums, parts, strict=True)]

    @property
    def kurtosis(self) -> float:
        """E[(x−μ)⁴]/σ⁴; NaN for nothing or for a constant."""
        if self.count == 0:
            return math.nan
        m1, m2, m3, m4 = (s / self.count for s in self._sums)
        variance = m2 - m1 * m1
        if not variance > 0:
            return math.nan
        central = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
        return central / (variance * variance)


class ChannelMaxima:
    """Largest magnitude of every channel."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        """x: [..., channels]."""
        seen = x.detach().reshape(-1, x.shape[-1]).float().abs().amax(0)
        self.largest = seen if self.largest is None else torch.maximum(self.largest, seen)

    def curve(self) -> list[tuple[float, float]]:
        """(quantile, magnitude) at `QUANTILES` points, rising.

        Raises:
            RuntimeError: nothing was seen.
        """
        if self.largest is None:
            raise RuntimeError("ChannelMaxima: nothing was seen")
        at = torch.linspace(0, 1, QUANTILES, device=self.largest.device)
        return list(zip(at.tolist(), torch.quantile(self.largest, at).tolist(), strict=True))


class Closeness:
    """Cosine and signal-to-quantization-noise ratio of two streams of tensors."""

    def __init__(self) -> None:
        self._ours = self._theirs = self._product = self._noise = 0.0

    def __call__(self, ours: Tensor, theirs: Tensor) -> None:
        """ours: any shape, what approximates; theirs: the same shape, what is right."""
        a, b = ours.detach().reshape(-1).float(), theirs.detach().reshape(-1).float()
        noise = a - b
        self._ours += float(torch.dot(a, a))
        self._theirs += float(torch.dot(b, b))
        self._product += float(torch.dot(a, b))
        self._noise += float(torch.dot(noise, noise))

    @property
    def cosine(self) -> float:
        """Between the two, everything seen taken as one vector; NaN where one is 0."""
        length = math.sqrt(self._ours * self._theirs)
        return self._product / length if length > 0 else math.nan

    @property
    def sqnr_db(self) -> float:
        """10·log10(Σ theirs² / Σ (ours − theirs)²); inf where they are equal."""
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._theirs / self._noise) if self._theirs > 0 else -math.inf


class ByPosition:
    """Mean square by position in the window."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._windows = 0

    def __call__(self, x: Tensor) -> None:
        """x: [windows, tokens, channels]."""
        square = x.detach().float().square().mean(-1).double().sum(0)
        self._sum = square if self._sum is None else self._sum + square
        self._windows += x.shape[0]

    def binned(self) -> list[float]:
        """Means over at most `TOKEN_BINS` equal stretches of positions."""
        if self._sum is None:
            raise RuntimeError("ByPosition: nothing was seen")
        mean = self._sum / self._windows
        bins = min(TOKEN_BINS, len(mean))
        values: list[float] = adaptive_avg_pool1d(mean[None], bins)[0].tolist()
        return values


def bin_starts(tokens: int) -> list[int]:
    """First position of each bin of `ByPosition.binned`."""
    bins = min(TOKEN_BINS, tokens)
    return [index * tokens // bins for index in range(bins)]


def heatmap(x: Tensor) -> Tensor:
    """Largest magnitude over bins of tokens and channels; x: [tokens, channels]."""
    size = [min(limit, have) for limit, have in zip(HEATMAP_BINS, x.shape, strict=True)]
    return adaptive_max_pool2d(x.detach().float().abs()[None], size)[0]
