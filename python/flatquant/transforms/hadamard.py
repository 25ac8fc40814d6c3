"""Hadamard matrices by construction: H of ±1 with H·Hᵀ = n·I, nothing stored but a few rows.

Doubling (Sylvester), Paley I and II over any finite field of odd order, four circulant blocks, and
Kronecker products of all of these. docs/methods.md lists which one each width of real models gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from flatquant.transforms.circulants import TURYN, WILLIAMSON, turyn, williamson
from flatquant.transforms.finite_field import prime_power
from flatquant.transforms.paley import paley_one, paley_two


@dataclass(frozen=True)
class Construction:
    """How `hadamard_matrix` makes one order: H_2^j ⊗ core.

    Attributes:
        core: what the core is called, e.g. "Paley I over GF(11)"; empty for order 1.
        build: makes the core, int8.
        doublings: j.
    """

    core: str
    build: Callable[[], Tensor]
    doublings: int = 0

    @property
    def name(self) -> str:
        """For reports: "2^4 ⊗ Paley II over GF(17)"."""
        if not self.core:
            return f"Sylvester 2^{self.doublings}"
        return f"2^{self.doublings} ⊗ {self.core}" if self.doublings else self.core

    def matrix(self) -> Tensor:
        """int8 [n, n]."""
        core = self.build()
        return torch.kron(sylvester(2**self.doublings), core) if self.doublings else core


@dataclass(frozen=True, kw_only=True)
class HadamardSplit:
    """n = base·power: the matrix base ⊗ H_power that `flatquant_cuda.ops.hadamard` applies.

    Attributes:
        base: m, the smallest known order with n/m a power of two.
        power: 2^j.
    """

    base: int
    power: int

    @property
    def name(self) -> str:
        """For reports: "Paley II over GF(37) ⊗ 2^6"."""
        exponent = self.power.bit_length() - 1
        if self.base == 1:
            return f"Sylvester 2^{exponent}"
        core = hadamard_name(self.base)
        return f"{core} ⊗ 2^{exponent}" if exponent else f"{core}"

    def base_matrix(self) -> Tensor | None:
        """The op's argument `base`: ±1 [m, m], float64; None for m = 1."""
        return None if self.base == 1 else hadamard_matrix(self.base)


def hadamard_matrix(n: int) -> Tensor | None:
    """An n×n matrix of ±1 with H·Hᵀ = n·I, float64, or None if no construction here gives one.

    Doubling is tried first, so powers of two are the usual Walsh-Hadamard matrix.
    """
    found = _construction(n)
    return None if found is None else found.matrix().to(torch.float64)


def hadamard_name(n: int) -> str | None:
    """How `hadamard_matrix(n)` is constructed, for reports; None where it is not."""
    found = _construction(n)
    return None if found is None else found.name


def hadamard_split(n: int) -> HadamardSplit | None:
    """n as the smallest known order times a power of two, or None if there is no such order.

    The matrix base ⊗ H_power differs from `hadamard_matrix(n)`, which has the power on the left
    and where several constructions exist need not be made from the smallest base.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"hadamard_split: n={n} must be at least 1")
    power = n & -n
    while power and _construction(n // power) is None:
        power //= 2
    return HadamardSplit(base=n // power, power=power) if power else None


def sylvester(power: int) -> Tensor:
    """The Walsh-Hadamard matrix of order 2^j, natural order, int8: entry (−1)^popcount(i & k).

    Raises:
        ValueError: the order is no power of two.
    """
    if power < 1 or power & (power - 1):
        raise ValueError(f"sylvester: order {power} must be a power of two")
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for _ in range(power.bit_length() - 1):
        matrix = torch.kron(two, matrix)
    return matrix


def _paley(n: int, *, primes_only: bool) -> Construction | None:
    """Paley I, or else II."""
    for kind, q, residue, build in (("I", n - 1, 3, paley_one), ("II", n // 2 - 1, 1, paley_two)):
        field = prime_power(q) if q % 4 == residue else None
        if field is not None and (field[1] == 1 or not primes_only):
            return Construction(f"Paley {kind} over GF({q})", partial(build, q))
    return None


def _circulants(n: int) -> Construction | None:
    if n in WILLIAMSON:
        return Construction(f"Williamson {n}", partial(williamson, n))
    return Construction(f"Turyn {n}", partial(turyn, n)) if n in TURYN else None


def _product(n: int) -> Construction | None:
    """The product of two known orders; with a power of two it is a doubling and not this."""
    for left in range(12, int(n**0.5) + 1, 4):
        a, b = (_construction(left), _construction(n // left)) if n % left == 0 else (None, None)
        if a is not None and b is not None:
            return Construction(f"({a.name}) ⊗ ({b.name})", partial(_kron, a, b))
    return None


def _kron(a: Construction, b: Construction) -> Tensor:
    return torch.kron(a.matrix(), b.matrix())


_Maker = Callable[[int], Construction | None]
# An order is reached with as few of these as will do, so that adding one at the end changes no
# matrix that could be made before.
_MAKERS: tuple[_Maker, ...] = (
    partial(_paley, primes_only=True),
    partial(_paley, primes_only=False),
    _circulants,
    _product,
)


@lru_cache(maxsize=4096)
def _construction(n: int) -> Construction | None:
    for count in range(1, len(_MAKERS) + 1):
        found = _with(_MAKERS[:count], n)
        if found is not None:
            return found
    return None


def _with(makers: tuple[_Maker, ...], n: int) -> Construction | None:
    """A doubling if these makers reach n/2, otherwise the first of them that reaches n."""
    if n == 1:
        return Construction("", partial(sylvester, 1))
    if n < 1 or (n != 2 and n % 4):
        return None
    half = _with(makers, n // 2)
    if half is not None:
        return Construction(half.core, half.build, half.doublings + 1)
    return next((found for make in makers if (found := make(n)) is not None), None)
