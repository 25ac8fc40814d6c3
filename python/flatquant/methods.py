"""The methods side by side: name -> recipe for a scheme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flatquant.models.spec import Site
from flatquant.recipe import FitConfig, Recipe, ScaleConfig
from flatquant.scheme import Scheme

_KRONECKER_SITES = (Site.ATTN_IN, Site.ATTN_OUT, Site.MLP_IN, Site.MLP_OUT, Site.V_HEAD)
_SCALED_SITES = (Site.ATTN_IN, Site.MLP_IN, Site.MLP_OUT)


def _everywhere(scheme: Scheme, kind: str) -> dict[Site, str]:
    """The same kind of transform at every site that the scheme gives a reason for."""
    sites: tuple[Site, ...] = ()
    if scheme.quantizes_linears:
        sites += _KRONECKER_SITES
    elif scheme.v_bits < 16:
        sites += (Site.V_HEAD,)
    if scheme.k_bits < 16:
        sites += (Site.QK_HEAD,)
    return {site: kind for site in sites}


def _rtn(scheme: Scheme) -> Recipe:
    """Round to nearest: no transform, no clip, no data."""
    return Recipe(method="rtn", scheme=scheme)


def _hadamard(scheme: Scheme) -> Recipe:
    """Fixed Kronecker products of Hadamard matrices at FlatQuant's sites; no data."""
    return Recipe(method="hadamard", scheme=scheme, transforms=_everywhere(scheme, "hadamard"))


def _random(scheme: Scheme) -> Recipe:
    """Fixed Kronecker products of random orthogonal matrices; no data."""
    return Recipe(method="random", scheme=scheme, transforms=_everywhere(scheme, "random"))


def _flatquant(scheme: Scheme) -> Recipe:
    """FlatQuant (arXiv 2410.09426) with the changes listed in docs/methods.md."""
    scales = dict.fromkeys(_SCALED_SITES, ScaleConfig()) if scheme.quantizes_linears else {}
    return Recipe(
        method="flatquant",
        scheme=scheme,
        transforms=_everywhere(scheme, "kronecker-svd"),
        scales=scales,
        learned_clips=True,
        fit=FitConfig(),
    )


def _flatquant_paper(scheme: Scheme) -> Recipe:
    """The authors' settings: Cayley start, c free in sign, AdamW's default weight decay."""
    paper = ScaleConfig(start="smooth", positive=False)
    recipe = _flatquant(scheme)
    return replace(
        recipe,
        method="flatquant-paper",
        transforms=_everywhere(scheme, "kronecker-svd-cayley"),
        scales=dict.fromkeys(recipe.scales, paper),
        fit=FitConfig(weight_decay=0.01),
    )


METHODS: dict[str, Callable[[Scheme], Recipe]] = {
    "rtn": _rtn,
    "hadamard": _hadamard,
    "random": _random,
    "flatquant": _flatquant,
    "flatquant-paper": _flatquant_paper,
}


def resolve(method: str | Recipe, scheme: str | Scheme) -> Recipe:
    """The recipe of a name, or the recipe itself with its scheme replaced.

    Raises:
        ValueError: unknown name or bad scheme.
    """
    parsed = Scheme.parse(scheme)
    if isinstance(method, Recipe):
        return replace(method, scheme=parsed)
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; known: {list(METHODS)}")
    return METHODS[method](parsed)
