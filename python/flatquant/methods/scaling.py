"""Methods that move ranges between inputs and weights, channel by channel."""

from __future__ import annotations

from dataclasses import replace

from flatquant.methods.sites import NORM_SITES, SCALED_SITES
from flatquant.models.spec import Site
from flatquant.recipe import Recipe
from flatquant.scales import PowerSearch, ScaleConfig, ThresholdSearch
from flatquant.scheme import Scheme
from flatquant.weights import AwqClip, Gptq, Rtn


def _scaled(name: str, scheme: Scheme, sites: tuple[Site, ...], scale: ScaleConfig) -> Recipe:
    scales = dict.fromkeys(sites, scale) if scheme.quantizes_linears else {}
    return Recipe(method=name, scheme=scheme, scales=scales)


def smoothquant(scheme: Scheme) -> Recipe:
    """SmoothQuant (arXiv 2211.10438): s = max|x|^½ / max|w|^½ behind the norms."""
    scale = ScaleConfig(start="smooth", alpha=0.5, learned=False)
    return _scaled("smoothquant", scheme, NORM_SITES, scale)


def os_plus(scheme: Scheme) -> Recipe:
    """Outlier Suppression+ (arXiv 2304.09145): channels shrunk to a searched threshold.

    Its shift needs norms with a bias; RMSNorm has none, so it is off, as in LLMC.
    """
    scale = ScaleConfig(search=ThresholdSearch(), learned=False)
    return _scaled("os_plus", scheme, NORM_SITES, scale)


def awq(scheme: Scheme) -> Recipe:
    """AWQ (arXiv 2306.00978): s = mean|x|^α with a searched α, then a clip search."""
    scale = ScaleConfig(search=PowerSearch(), learned=False)
    recipe = _scaled("awq", scheme, (*SCALED_SITES, Site.ATTN_OUT), scale)
    return replace(recipe, weights=Rtn(clip=AwqClip()))


def awq_asym(scheme: Scheme) -> Recipe:
    """AWQ whose clip search gives both ends of an asymmetric weight grid their own ratio.

    The asymmetric clipping of LLMC (arXiv 2405.06001); AWQ's own clips both ends alike.
    """
    return replace(awq(scheme), method="awq-asym", weights=Rtn(clip=AwqClip(sides="each")))


def awq_gptq(scheme: Scheme) -> Recipe:
    """AWQ's scales and clips, then GPTQ's rounding (LLMC, arXiv 2405.06001)."""
    return replace(awq(scheme), method="awq-gptq", weights=Gptq(clip=AwqClip()))
