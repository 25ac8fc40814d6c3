"""A quantization method as a value: scheme, transforms at sites, clips, fit, weight rounding."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field

from flatquant.clips import UNCLIPPED, Clips
from flatquant.models.spec import LINEAR_SITES, Site
from flatquant.outliers import Outliers
from flatquant.scales import ScaleConfig
from flatquant.scheme import Scheme
from flatquant.weights import WeightQuantizer, weight_quantizer
from flatquant.weights.progressive import Progressive

_CHOICES = {
    "schedule": ("cosine", "constant"),
    "inputs": ("float", "quantized"),
    "loss": ("mse", "moments"),
    "amp": ("auto", "on", "off"),
}


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How free numbers are found, one decoder block at a time (FlatQuant, section 3.2).

    Attributes:
        epochs: passes over the calibration samples; 0 keeps every start value.
        batch_size: samples per forward pass.
        accumulate: forward passes per optimiser step.
        lr: learning rate of transforms, norms and roundings.
        scale_lr: learning rate of per-channel scales.
        clip_lr: learning rate of clip logits.
        lr_growth: every rate is 1 + lr_growth·depth times itself in a block, with the depth
            from 0 in the first block to almost 1 in the last one (Norm Tweaking).
        schedule: "cosine" to `min_lr`, or "constant".
        min_lr: rate at the end of the cosine schedule.
        warmup_steps: linear warm-up from a hundredth of the rate.
        weight_decay: AdamW's decay, on every group; 0 because it would pull scales and clips
            towards 0 without any gradient.
        inputs: what a block is fitted on: "float", what the original blocks before it give, or
            "quantized", what those give that are quantized already.
        augmented: with quantized inputs, aim half way between the original's output on its own
            inputs and on the quantized ones, which is the minimum of both errors' sum
            (OmniQuant's code).
        loss: "mse" of the block's output, or "moments": distance of the channels' means and
            variances (Norm Tweaking, arXiv 2309.02784, equation 2).
        amp: matrix products in bfloat16 with float32 results: "auto" where the processor has
            instructions for it, "on" or "off".
    """

    epochs: int = 15
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 5e-3
    scale_lr: float = 5e-3
    clip_lr: float = 5e-2
    lr_growth: float = 0.0
    schedule: str = "cosine"
    min_lr: float = 5e-6
    warmup_steps: int = 0
    weight_decay: float = 0.0
    inputs: str = "float"
    augmented: bool = False
    loss: str = "mse"
    amp: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("accumulate", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"FitConfig: {name}={getattr(self, name)} must be >= {low}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"FitConfig: {name}={getattr(self, name)!r} must be one of {known}"
                )
        if self.augmented and self.inputs != "quantized":
            raise ValueError(f"FitConfig: augmented needs inputs='quantized', not {self.inputs!r}")


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """How rotations are learned through the whole model (SpinQuant, arXiv 2405.16406, section 4).

    Attributes:
        steps: of Cayley SGD.
        batch_size: samples per step.
        lr: rate of the first step, from which it falls linearly to 0.
        round_weights: whether weights are rounded to nearest meanwhile. Off where another
            quantizer than that will round them and activations are quantized: the rotation is
            then learned for the activations.
    """

    steps: int = 100
    batch_size: int = 8
    lr: float = 1.5
    round_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"EndToEnd: {name}={getattr(self, name)} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method. Frozen, comparable, printable: `METHODS` is a table of these.

    Attributes:
        method: the name it is known by.
        scheme: bit widths and grids.
        transforms: site -> name in `flatquant.transforms.TRANSFORMS`; at Site.RESIDUAL, in
            `flatquant.transforms.rotation.ROTATIONS`.
        scales: sites whose input gets a per-channel scale, with its settings.
        clips: clip ratios of weights, activations, keys and values, fixed or learned.
        end_to_end: how the rotations at RESIDUAL and V_HEAD are learned, before all else; None
            leaves them at their start.
        fit: how free numbers of a block are found.
        weights: how weights are rounded: a value such as `Gptq(clip=MseClip())`, or a name in
            `flatquant.weights.WEIGHT_QUANTIZERS`.
        tweak_norms: learn the weights of the norms after all weights are rounded, with nothing
            to make up for it (Norm Tweaking).
        progressive: learn which way each weight is rounded, instead of `weights` (TesseraQ).
        outliers: input channels that stay in floating point; None are none.

    Raises:
        ValueError: an unknown name of a weight quantizer, or a searched scale beside a transform.
    """

    method: str
    scheme: Scheme
    transforms: Mapping[Site, str] = field(default_factory=dict)
    scales: Mapping[Site, ScaleConfig] = field(default_factory=dict)
    clips: Clips = UNCLIPPED
    end_to_end: EndToEnd | None = None
    fit: FitConfig = FitConfig(epochs=0)
    weights: str | WeightQuantizer = "rtn"
    tweak_norms: bool = False
    progressive: Progressive | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", types.MappingProxyType(dict(self.transforms)))
        object.__setattr__(self, "scales", types.MappingProxyType(dict(self.scales)))
        weight_quantizer(self.weights)  # an unknown name is refused here
        if self.outliers is not None and (self.transforms.keys() - {Site.QK_HEAD} or self.scales):
            raise ValueError(
                f"Recipe {self.method!r}: outlier columns are those of the model's own basis; they "
                "go with no transform but that of keys, and with no scales"
            )
        moving = self.clips.any_learned or any(c.learned for c in self.scales.values())
        moving = moving or any(not _is_fixed(kind) for kind in self.transforms.values())
        if self.progressive is not None and (moving or self.outliers or self.rounding.prunes):
            raise ValueError(
                f"Recipe {self.method!r}: which way a weight is rounded can be learned where the "
                "weight itself stands still: no learned transform, scale or clip, no outlier "
                "columns and no pruning beside it"
            )
        mixed = [site for site in (*LINEAR_SITES, Site.V_HEAD) if site in self.transforms]
        if mixed and any(scale.search is not None for scale in self.scales.values()):
            raise ValueError(
                f"Recipe {self.method!r}: a scale is searched for linears as they are, but "
                f"{mixed[0].value} has a transform; use a start instead of a search"
            )

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to fit."""
        learned = any(not _is_fixed(kind) for kind in self.transforms.values())
        scaled = any(scale.learned for scale in self.scales.values())
        return learned or scaled or self.clips.any_learned or self.tweak_norms or self.rounds

    @property
    def rounds(self) -> bool:
        """Whether rounding is learned."""
        return self.progressive is not None and self.scheme.quantizes_weights

    @property
    def rounding(self) -> WeightQuantizer:
        """The weight quantizer that `weights` stands for."""
        return weight_quantizer(self.weights)

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read at all."""
        statistics = any(scale.needs_data for scale in self.scales.values())
        searches = (self.clips.weight_search, self.progressive and self.progressive.clip)
        statistics = statistics or any(search and search.needs_hessian for search in searches)
        weights = self.scheme.quantizes_weights or self.rounding.prunes
        rounding = weights and self.rounding.needs_hessian
        fitted = self.has_parameters and self.fit.epochs > 0
        unknown = self.scheme.a_static or self.outliers is not None
        return fitted or statistics or rounding or unknown or self.end_to_end is not None


def _is_fixed(kind: str) -> bool:
    return kind in ("hadamard", "randomised-hadamard", "whole-hadamard", "random")
