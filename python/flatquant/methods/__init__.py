"""Methods side by side: name -> recipe for a scheme. A new one is a function and a line here.

Files hold what belongs together: `rounding` changes nothing but how numbers are rounded,
`rotations` mixes channels by fixed matrices, `affine` learns changes of basis (FlatQuant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flatquant.methods.affine import flatquant, flatquant_paper
from flatquant.methods.rotations import hadamard, random
from flatquant.methods.rounding import rtn
from flatquant.recipe import Recipe
from flatquant.scheme import Scheme

METHODS: dict[str, Callable[[Scheme], Recipe]] = {
    "rtn": rtn,
    "hadamard": hadamard,
    "random": random,
    "flatquant": flatquant,
    "flatquant-paper": flatquant_paper,
}
"""Name -> recipe for a scheme, with the settings of the method's paper."""


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
