"""Methods that change nothing but how numbers are rounded."""

from __future__ import annotations

from flatquant.recipe import Recipe
from flatquant.scheme import Scheme


def rtn(scheme: Scheme) -> Recipe:
    """Round to nearest: no transform, no clip, no data."""
    return Recipe(method="rtn", scheme=scheme)
