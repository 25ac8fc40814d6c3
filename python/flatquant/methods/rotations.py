"""Methods that mix channels by fixed orthogonal matrices."""

from __future__ import annotations

from flatquant.methods.sites import everywhere
from flatquant.recipe import Recipe
from flatquant.scheme import Scheme


def hadamard(scheme: Scheme) -> Recipe:
    """Fixed Kronecker products of Hadamard matrices at FlatQuant's sites; no data."""
    return Recipe(method="hadamard", scheme=scheme, transforms=everywhere(scheme, "hadamard"))


def random(scheme: Scheme) -> Recipe:
    """Fixed Kronecker products of random orthogonal matrices; no data."""
    return Recipe(method="random", scheme=scheme, transforms=everywhere(scheme, "random"))
