"""A quantization method as a value: scheme, transforms at sites, clips, fit, weight rounding."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field

from flatquant.clips import UNCLIPPED, Clips
from flatquant.models.spec import Site
from flatquant.scheme import Scheme
from flatquant.weights import WeightQuantizer, weight_quantizer


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Per-channel scale c before the transform, merged into what produces the input.

    Attributes:
        start: "alignment": c = (Σ_j w_ji² / E[x_i²])^(1/4), which minimises Σc²E[x²]·Σw²/c²
            (the diagonal case of CAT, arXiv 2603.04359); "smooth": c = w^(1−α)/x^α from the
            extrema of weights and inputs (the authors' choice, α = 0.3); "one": 1.
        alpha: the exponent of "smooth".
        positive: learn log c, so that c never changes sign.
    """

    start: str = "alignment"
    alpha: float = 0.3
    positive: bool = True

    def __post_init__(self) -> None:
        if self.start not in ("smooth", "alignment", "one"):
            raise ValueError(f"ScaleConfig: start={self.start!r} must be smooth, alignment or one")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"ScaleConfig: alpha={self.alpha} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How free numbers are found, one decoder block at a time (FlatQuant, section 3.2).

    Attributes:
        epochs: passes over the calibration samples; 0 keeps every start value.
        batch_size: samples per forward pass.
        accumulate: forward passes per optimiser step.
        lr: learning rate of transforms.
        scale_lr: learning rate of per-channel scales.
        clip_lr: learning rate of clip logits.
        min_lr: rate at the end of the cosine schedule.
        warmup_steps: linear warm-up from a hundredth of the rate.
        weight_decay: AdamW's decay, on every group; 0 because it would pull scales and clips
            towards 0 without any gradient.
        amp: matrix products in bfloat16 with float32 results: "auto" where the processor has
            instructions for it, "on" or "off".
    """

    epochs: int = 15
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 5e-3
    scale_lr: float = 5e-3
    clip_lr: float = 5e-2
    min_lr: float = 5e-6
    warmup_steps: int = 0
    weight_decay: float = 0.0
    amp: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("accumulate", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"FitConfig: {name}={getattr(self, name)} must be >= {low}")
        if self.amp not in ("auto", "on", "off"):
            raise ValueError(f"FitConfig: amp={self.amp!r} must be auto, on or off")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method. Frozen, comparable, printable: `METHODS` is a table of these.

    Attributes:
        method: the name it is known by.
        scheme: bit widths and grids.
        transforms: site -> name in `flatquant.transforms.TRANSFORMS`.
        scales: sites whose input gets a per-channel scale, with its settings.
        clips: clip ratios of weights, activations, keys and values, fixed or learned.
        fit: how free numbers are found.
        weights: how weights are rounded: a value such as `Gptq(clip=MseClip())`, or a name in
            `flatquant.weights.WEIGHT_QUANTIZERS`.

    Raises:
        ValueError: an unknown name of a weight quantizer.
    """

    method: str
    scheme: Scheme
    transforms: Mapping[Site, str] = field(default_factory=dict)
    scales: Mapping[Site, ScaleConfig] = field(default_factory=dict)
    clips: Clips = UNCLIPPED
    fit: FitConfig = FitConfig(epochs=0)
    weights: str | WeightQuantizer = "rtn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", types.MappingProxyType(dict(self.transforms)))
        object.__setattr__(self, "scales", types.MappingProxyType(dict(self.scales)))
        weight_quantizer(self.weights)  # an unknown name is refused here

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to fit."""
        learned = any(not _is_fixed(kind) for kind in self.transforms.values())
        return learned or bool(self.scales) or self.clips.any_learned

    @property
    def rounding(self) -> WeightQuantizer:
        """The weight quantizer that `weights` stands for."""
        return weight_quantizer(self.weights)

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read at all."""
        statistics = any(scale.start != "one" for scale in self.scales.values())
        rounding = self.scheme.quantizes_weights and self.rounding.needs_hessian
        return (self.has_parameters and self.fit.epochs > 0) or statistics or rounding


def _is_fixed(kind: str) -> bool:
    return kind in ("hadamard", "random")
