"""Methods that learn scales, clips and merged matrices on a block's output: nothing runs online.

Both are for models whose norms have no bias, so their shifts, which need one, are left out.
"""

from __future__ import annotations

from dataclasses import replace

from flatquant.clips import Clips, Learned
from flatquant.methods.scaling import awq
from flatquant.methods.sites import LET_SITES
from flatquant.models.spec import Site
from flatquant.recipe import FitConfig, Recipe, ScaleConfig
from flatquant.scheme import Scheme
from flatquant.weights import AwqClip
from flatquant.weights.progressive import Progressive


def omniquant(scheme: Scheme) -> Recipe:
    """OmniQuant (arXiv 2308.13137): learned weight clips (LWC) and scales (LET).

    Settings of the authors' scripts for LLaMA: scales start from SmoothQuant's at α = 0.5, with
    floating-point inputs there are none; 2-bit weights get twice the epochs and the sum of two
    errors.
    """
    return Recipe(
        method="omniquant",
        scheme=scheme,
        scales=_let(scheme),
        clips=Clips(weights=Learned()),
        fit=FitConfig(
            epochs=40 if scheme.w_bits == 2 else 20,
            batch_size=1,
            scale_lr=5e-3,
            clip_lr=1e-2,
            schedule="constant",
            inputs="quantized",
            augmented=scheme.quantizes_activations or scheme.w_bits == 2,
        ),
    )


def affinequant(scheme: Scheme) -> Recipe:
    """AffineQuant (arXiv 2403.12544): OmniQuant with a matrix where it can be merged.

    That is on the values, in W_v and W_o. The other inputs have OmniQuant's scales.
    """
    merged = scheme.quantizes_linears or scheme.v_bits < 16
    base = omniquant(scheme)
    return Recipe(
        method="affinequant",
        scheme=scheme,
        transforms={Site.V_HEAD: "kronecker-gradual"} if merged else {},
        scales=base.scales,
        clips=base.clips,
        fit=replace(base.fit, lr=5e-3),
    )


def _let(scheme: Scheme) -> dict[Site, ScaleConfig]:
    scales: dict[Site, ScaleConfig] = {}
    if scheme.quantizes_activations:
        scales |= dict.fromkeys(LET_SITES, ScaleConfig(start="smooth", alpha=0.5))
    if scheme.k_bits < 16:
        scales[Site.QK_HEAD] = ScaleConfig(start="one")
    return scales


def awq_omniquant(scheme: Scheme) -> Recipe:
    """OmniQuant that starts at the scales and clips of AWQ's searches (LLMC, arXiv 2405.06001).

    The scales are learned further where inputs are quantized, as in OmniQuant.
    """
    base, learned = omniquant(scheme), scheme.quantizes_activations
    scales = {s: replace(c, learned=learned) for s, c in awq(scheme).scales.items()}
    return replace(
        base,
        method="awq-omniquant",
        scales={**base.scales, **scales},
        clips=Clips(weights=Learned(search=AwqClip())),
    )


def tesseraq(scheme: Scheme) -> Recipe:
    """TesseraQ (arXiv 2410.19103): AWQ's scales and clips, then rounding learned block by block.

    Its 20 rounds of 250 steps on 128 samples in batches of 4 are 160 epochs.
    """
    return replace(
        awq(scheme),
        method="tesseraq",
        weights="rtn",
        progressive=Progressive(clip=AwqClip()),
        fit=FitConfig(epochs=160, batch_size=4, lr=1e-3, schedule="constant", inputs="quantized"),
    )


def norm_tweaking(scheme: Scheme) -> Recipe:
    """Norm Tweaking (arXiv 2309.02784): GPTQ, then norms that give channels their moments back."""
    return Recipe(
        method="norm_tweaking",
        scheme=scheme,
        weights="gptq",
        tweak_norms=True,
        fit=FitConfig(
            epochs=1,
            batch_size=1,
            lr=1e-5,
            lr_growth=1.0,
            schedule="constant",
            inputs="quantized",
            loss="moments",
        ),
    )
