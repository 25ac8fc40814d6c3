"""Changes of basis. A new one is a class and a line in `TRANSFORMS`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Generator

from flatquant.models.spec import Geometry, Site
from flatquant.transforms.base import FrozenTransform, Transform, kronecker_product
from flatquant.transforms.kronecker import Kronecker
from flatquant.transforms.matrices import MATRICES
from flatquant.transforms.split import kronecker_split


def _kronecker(kind: str) -> Callable[[Site, Geometry, Generator], Transform]:
    make = MATRICES[kind]

    def build(site: Site, geometry: Geometry, generator: Generator) -> Transform:
        if site in (Site.QK_HEAD, Site.V_HEAD):
            return Kronecker(None, make(geometry.head_dim, generator))
        if site is Site.ATTN_OUT:
            return Kronecker(make(geometry.heads, generator), None)
        n1, n2 = kronecker_split(geometry.width(site))
        return Kronecker(make(n1, generator), make(n2, generator))

    return build


TRANSFORMS: dict[str, Callable[[Site, Geometry, Generator], Transform]] = {
    "kronecker-svd": _kronecker("svd"),
    "kronecker-svd-cayley": _kronecker("svd-cayley"),
    "kronecker-direct": _kronecker("direct"),
    "hadamard": _kronecker("hadamard"),
    "random": _kronecker("random"),
}
"""Transforms by name: (site, geometry, generator) -> module. V_HEAD and ATTN_OUT are the two
factors of one Kronecker product over heads x head_dim; only the left one runs online."""

__all__ = [
    "TRANSFORMS",
    "FrozenTransform",
    "Kronecker",
    "Transform",
    "kronecker_product",
    "kronecker_split",
]
