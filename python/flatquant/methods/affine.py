"""Methods that learn changes of basis: FlatQuant."""

from __future__ import annotations

from dataclasses import replace

from flatquant.clips import LEARNED_CLIPS
from flatquant.methods.sites import SCALED_SITES, everywhere
from flatquant.recipe import FitConfig, Recipe, ScaleConfig
from flatquant.scheme import Scheme


def flatquant(scheme: Scheme) -> Recipe:
    """FlatQuant (arXiv 2410.09426) with the changes listed in docs/methods.md."""
    scales = dict.fromkeys(SCALED_SITES, ScaleConfig()) if scheme.quantizes_linears else {}
    return Recipe(
        method="flatquant",
        scheme=scheme,
        transforms=everywhere(scheme, "kronecker-svd"),
        scales=scales,
        clips=LEARNED_CLIPS,
        fit=FitConfig(),
    )


def flatquant_paper(scheme: Scheme) -> Recipe:
    """The authors' settings: Cayley start, c free in sign, AdamW's default weight decay."""
    paper = ScaleConfig(start="smooth", positive=False)
    recipe = flatquant(scheme)
    return replace(
        recipe,
        method="flatquant-paper",
        transforms=everywhere(scheme, "kronecker-svd-cayley"),
        scales=dict.fromkeys(recipe.scales, paper),
        fit=FitConfig(weight_decay=0.01),
    )
