"""Methods that set weights to 0; any scheme may round the others."""

from __future__ import annotations

from flatquant.recipe import Recipe
from flatquant.scheme import Scheme
from flatquant.weights import Magnitude, Wanda


def magnitude(scheme: Scheme) -> Recipe:
    """The smallest half of each matrix; no data."""
    return Recipe(method="magnitude", scheme=scheme, weights=Magnitude())


def magnitude_2to4(scheme: Scheme) -> Recipe:
    """The smallest two of every four neighbouring inputs; no data."""
    return Recipe(method="magnitude-2to4", scheme=scheme, weights=Magnitude(pattern=(2, 4)))


def wanda(scheme: Scheme) -> Recipe:
    """Wanda (arXiv 2306.11695): half of every output's weights, by |w|·‖x‖₂."""
    return Recipe(method="wanda", scheme=scheme, weights=Wanda())


def wanda_2to4(scheme: Scheme) -> Recipe:
    """Wanda with two of every four neighbouring inputs kept."""
    return Recipe(method="wanda-2to4", scheme=scheme, weights=Wanda(pattern=(2, 4)))
