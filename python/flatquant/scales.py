"""Per-channel scales as values: the formulas that start c, and the grids it is searched on.

c multiplies a channel of an input and divides the weights that read it. Papers write s = 1/c for
the same number. A factor common to all channels changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-5
"""Below this, extrema and scales count as this much (SmoothQuant's code)."""


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """What is known of the channels of an input, float32 [channels] each.

    Attributes:
        x_max: largest |x|.
        x_mean: mean |x|.
        x_square: mean x².
        w_max: largest |w| over the rows of all weights that read the input.
        w_square: Σ w² over the same rows.
    """

    x_max: Tensor
    x_mean: Tensor
    x_square: Tensor
    w_max: Tensor
    w_square: Tensor


@dataclass(frozen=True, kw_only=True)
class ScaleSearch(ABC):
    """A list of scales to try; the one with the least output error is kept.

    The error is that of the module in which the linears' outputs meet (attention for q, k and v,
    the MLP for gate and up, else the linear itself), with the weights and inputs of these linears
    quantized and everything else as it was.

    Attributes:
        tokens: how many calibration tokens the error is taken over, at least one sample.
    """

    tokens: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and value <= 0:
                raise ValueError(f"{type(self).__name__}: {name}={value} must be positive")

    @abstractmethod
    def candidates(self, seen: ChannelStatistics) -> Iterator[tuple[str, Tensor]]:
        """What to try: a few words that name it, and c [channels]. The first is c = 1."""


@dataclass(frozen=True, kw_only=True)
class PowerSearch(ScaleSearch):
    """s = mean|x|^α for α = 0, 1/steps, ..., 1 − 1/steps (AWQ, arXiv 2306.00978, equation 5).

    Attributes:
        steps: number of exponents; 20 is the paper's.
        by_weights: divide s by max|w|^(1−α) too, as the first version of AWQ's code did.
    """

    steps: int = 20
    by_weights: bool = False

    def candidates(self, seen: ChannelStatistics) -> Iterator[tuple[str, Tensor]]:
        """The powers, normalised as in AWQ's code: by the root of the largest times the least."""
        yield "no scale", torch.ones_like(seen.x_mean)
        for step in range(0 if self.by_weights else 1, self.steps):
            alpha = step / self.steps
            s = seen.x_mean.clamp_min(SMALLEST) ** alpha
            if self.by_weights:
                s = s / seen.w_max.clamp_min(SMALLEST) ** (1 - alpha)
            s = s.clamp_min(1e-4)
            yield f"alpha {alpha:g}", (s.max() * s.min()).sqrt() / s


@dataclass(frozen=True, kw_only=True)
class ThresholdSearch(ScaleSearch):
    """s = max(1, max|x|/t): channels are shrunk to a threshold t (OS+, arXiv 2304.09145, eq. 6).

    t falls from the largest |x| of all channels to `least`, in equal steps: `steps` of them, or
    as many as keep a step from being larger than `stride`.

    Attributes:
        least: the smallest threshold (1 in the authors' code).
        steps: at least so many steps (100 in the authors' code).
        stride: no step is larger, in units of the input (0.5 in the authors' code).
    """

    least: float = 1.0
    steps: int = 100
    stride: float = 0.5

    def candidates(self, seen: ChannelStatistics) -> Iterator[tuple[str, Tensor]]:
        """The thresholds, falling; where no input exceeds `least` there is nothing to try."""
        top = float(seen.x_max.max())
        yield "no scale", torch.ones_like(seen.x_max)
        if top <= self.least:
            return
        count = max(self.steps, int(top / self.stride))
        for step in range(1, count + 1):
            threshold = top + (self.least - top) * step / count
            yield f"threshold {threshold:.4g}", 1 / (seen.x_max / threshold).clamp_min(1.0)


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Per-channel scale c before the transform, merged into what produces the input.

    Attributes:
        start: "alignment": c = (Σ_j w_ji² / E[x_i²])^(1/4), which minimises Σc²E[x²]·Σw²/c²
            (the diagonal case of CAT, arXiv 2603.04359); "smooth": c = w^(1−α)/x^α from the
            extrema of weights and inputs (SmoothQuant, arXiv 2211.10438, equation 4);
            "one": 1.
        alpha: the exponent of "smooth"; FlatQuant's authors use 0.3, SmoothQuant's 0.5.
        search: a grid to find the start on, instead of the formula.
        learned: whether the fit goes on from the start, or leaves it.
        positive: learn log c, so that c never changes sign.
        shift: subtract the middle of each channel's range first (OS+, equation 3). The layer
            that produces the input must have a bias that takes it up.

    Raises:
        ValueError: an unknown start, or an exponent outside [0, 1].
    """

    start: str = "alignment"
    alpha: float = 0.3
    search: ScaleSearch | None = None
    learned: bool = True
    positive: bool = True
    shift: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("smooth", "alignment", "one"):
            raise ValueError(f"ScaleConfig: start={self.start!r} must be smooth, alignment or one")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"ScaleConfig: alpha={self.alpha} must lie in [0, 1]")

    @property
    def needs_data(self) -> bool:
        """Whether the start depends on inputs."""
        return self.search is not None or self.start != "one"
