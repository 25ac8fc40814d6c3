"""Which elements of a finite field are squares: all that Paley's constructions ask of it.

The q = p^k elements are the numbers 0 … q − 1. The digits of a number in base p, lowest first, are
the coefficients of a polynomial over Z/p of degree below k; elements are added digit by digit and
multiplied as polynomials, modulo an irreducible polynomial of degree k. With k = 1 all of this is
arithmetic modulo p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    prime = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    exponent, rest = 0, q
    while rest % prime == 0:
        rest //= prime
        exponent += 1
    return (prime, exponent) if rest == 1 else None


def quadratic_differences(q: int) -> Tensor:
    """χ(a − b) for all elements a, b of the field of q elements: int8 [q, q].

    χ(x) is 0 for x = 0, 1 for the other squares and −1 for the rest.

    Raises:
        ValueError: q is no power of an odd prime (with p = 2 every element is a square).
    """
    power = prime_power(q)
    if power is None or power[0] == 2:
        raise ValueError(f"quadratic_differences: q={q} must be a power of an odd prime")
    p, k = power
    weights = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // weights % p
    character = torch.full((q,), -1, dtype=torch.int8)
    character[_squares(digits, p) @ weights] = 1
    character[0] = 0
    return character[(digits[:, None] - digits[None, :]) % p @ weights]


def _squares(digits: Tensor, p: int) -> Tensor:
    """The square of every element, digits [q, k] in and out."""
    q, k = digits.shape
    result = torch.zeros(q, 2 * k - 1, dtype=digits.dtype)
    for i in range(k):
        result[:, i : i + k] += digits[:, i : i + 1] * digits
    low = torch.tensor(_irreducible(p, k)[:k])
    for top in range(2 * k - 2, k - 1, -1):
        # x^top = −x^(top − k)·low, as x^k + low is zero in the field.
        result[:, top - k : top] -= result[:, top : top + 1] * low
        result[:, : top + 1] %= p
    return result[:, :k] % p


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The first monic polynomial of degree k without a divisor, lowest coefficient first."""
    return next(
        poly
        for poly in _monic(p, k)
        if all(any(_remainder(poly, d, p)) for n in range(1, k // 2 + 1) for d in _monic(p, n))
    )


def _monic(p: int, degree: int) -> Iterator[tuple[int, ...]]:
    return ((*low, 1) for low in product(range(p), repeat=degree))


def _remainder(poly: Sequence[int], divisor: Sequence[int], p: int) -> list[int]:
    """The remainder of a polynomial after division by a monic one, modulo p."""
    rest = list(poly)
    while len(rest) >= len(divisor):
        factor = rest.pop()
        for i, coefficient in enumerate(divisor[:-1]):
            place = len(rest) - len(divisor) + 1 + i
            rest[place] = (rest[place] - factor * coefficient) % p
    return rest
