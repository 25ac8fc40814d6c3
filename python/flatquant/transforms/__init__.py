"""Changes of basis. A new one is a class and a line in `TRANSFORMS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Generator

from flatquant.models.spec import Geometry, Site
from flatquant.transforms.base import FrozenTransform, Transform, kronecker_product
from flatquant.transforms.hadamard import hadamard_split
from flatquant.transforms.kronecker import Kronecker
from flatquant.transforms.matrices import MATRICES, Fixed
from flatquant.transforms.rotation import rotation, rotation_sizes
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


_WHOLE = "whole-hadamard"
_WIDTHS = (Site.ATTN_IN, Site.MLP_IN, Site.MLP_OUT)


def _whole_hadamard(site: Site, geometry: Geometry, generator: Generator) -> Transform:
    """The Hadamard matrix of the width; as factors of `kronecker_split` if they have their own."""
    width = geometry.width(site)
    if site not in _WIDTHS or _factors_have_matrices(width):
        return _kronecker("hadamard")(site, geometry, generator)
    factors = rotation(width, generator).frozen()
    assert factors.left is not None and factors.right is not None
    return Kronecker(Fixed(factors.left), Fixed(factors.right))


def _factors_have_matrices(width: int) -> bool:
    splits = (hadamard_split(n) for n in kronecker_split(width))
    return all(split is not None for split in splits)


def online_splits(
    transforms: Mapping[Site, str], geometry: Geometry
) -> dict[Site, tuple[int, int]]:
    """Sizes of online factors that are not those of `kronecker_split`, by site."""
    whole = {
        site: geometry.width(site)
        for site, kind in transforms.items()
        if kind == _WHOLE and site in _WIDTHS
    }
    return {
        site: rotation_sizes(width)
        for site, width in whole.items()
        if not _factors_have_matrices(width)
    }


TRANSFORMS: dict[str, Callable[[Site, Geometry, Generator], Transform]] = {
    "kronecker-svd": _kronecker("svd"),
    "kronecker-svd-cayley": _kronecker("svd-cayley"),
    "kronecker-direct": _kronecker("direct"),
    "kronecker-gradual": _kronecker("gradual"),
    "hadamard": _kronecker("hadamard"),
    "randomised-hadamard": _kronecker("randomised-hadamard"),
    _WHOLE: _whole_hadamard,
    "random": _kronecker("random"),
}
"""Transforms by name: (site, geometry, generator) -> module. V_HEAD and ATTN_OUT are the two
factors of one Kronecker product over heads x head_dim; only the left one runs online.
"hadamard" has a Hadamard matrix for each factor, or a random one and a warning; "whole-hadamard"
prefers a Hadamard matrix of the whole width, split elsewhere, to that."""

__all__ = [
    "TRANSFORMS",
    "FrozenTransform",
    "Kronecker",
    "Transform",
    "kronecker_product",
    "kronecker_split",
    "online_splits",
]
