"""Methods that learn changes of basis: FlatQuant, and its parts one by one."""

from __future__ import annotations

from dataclasses import replace

from flatquant.clips import LEARNED_CLIPS, UNCLIPPED, Clips
from flatquant.methods.sites import SCALED_SITES, everywhere
from flatquant.recipe import FitConfig, Recipe, ScaleConfig
from flatquant.scheme import Scheme
from flatquant.weights import Gptq

_ALIGNED = ScaleConfig()


def flatquant(
    scheme: Scheme,
    *,
    transform: str | None = "kronecker-svd",
    scale: ScaleConfig | None = _ALIGNED,
    clips: Clips = LEARNED_CLIPS,
) -> Recipe:
    """FlatQuant (arXiv 2410.09426) with the changes listed in docs/methods.md.

    Args:
        scheme: what to quantize.
        transform: learned transforms (LT), by their name in `TRANSFORMS`; None is without.
        scale: per-channel scaling (PS) in front of them; None is without.
        clips: learnable clipping thresholds (LCT), fixed ones, or none.
    """
    scales = {} if scale is None else dict.fromkeys(SCALED_SITES, scale)
    return Recipe(
        method="flatquant",
        scheme=scheme,
        transforms=everywhere(scheme, transform) if transform else {},
        scales=scales if scheme.quantizes_linears else {},
        clips=clips,
        fit=FitConfig(),
    )


def flatquant_paper(scheme: Scheme) -> Recipe:
    """The authors' settings: Cayley start, c free in sign, AdamW's default weight decay."""
    paper = ScaleConfig(start="smooth", positive=False)
    recipe = flatquant(scheme, transform="kronecker-svd-cayley", scale=paper)
    return replace(recipe, method="flatquant-paper", fit=FitConfig(weight_decay=0.01))


def flatquant_gptq(scheme: Scheme) -> Recipe:
    """Weights by GPTQ in the columns' own order, as in the authors' code."""
    recipe = flatquant(scheme)
    return replace(recipe, method="flatquant-gptq", weights=Gptq(act_order=False))


def flatquant_direct(scheme: Scheme) -> Recipe:
    """Free matrices and their numerical inverses (the authors' `direct_inv`)."""
    recipe = flatquant(scheme, transform="kronecker-direct")
    return replace(recipe, method="flatquant-direct")


def flatquant_lt(scheme: Scheme) -> Recipe:
    """Ablation (table 4 of the paper): transforms alone."""
    recipe = flatquant(scheme, scale=None, clips=UNCLIPPED)
    return replace(recipe, method="flatquant-lt")


def flatquant_lt_ps(scheme: Scheme) -> Recipe:
    """Ablation: transforms and scales."""
    return replace(flatquant(scheme, clips=UNCLIPPED), method="flatquant-lt-ps")


def flatquant_lt_lct(scheme: Scheme) -> Recipe:
    """Ablation: transforms and clips."""
    return replace(flatquant(scheme, scale=None), method="flatquant-lt-lct")


def flatquant_fixed_clips(scheme: Scheme) -> Recipe:
    """Ablation: QuaRot's ratios, 0.9 of activations and 0.95 of keys and values, not learned."""
    fixed = Clips(activations=0.9, keys=0.95, values=0.95)
    return replace(flatquant(scheme, clips=fixed), method="flatquant-fixed-clips")


def flatquant_early_clips(scheme: Scheme) -> Recipe:
    """Ablation: weights are clipped before the transform, when they still have their outliers."""
    early = replace(LEARNED_CLIPS, early_weights=True)
    return replace(flatquant(scheme, clips=early), method="flatquant-early-clips")
