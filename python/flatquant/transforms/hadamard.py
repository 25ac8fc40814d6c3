"""Hadamard matrices by construction: Sylvester, Paley I and Paley II over prime fields."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = χ(i − j) with χ the quadratic character of the field of prime order q."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[[(x * x) % q for x in range(1, q)]] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _paley_one(n: int) -> Tensor:
    """Order n = q + 1 with a prime q ≡ 3 (mod 4): I + S, S skew."""
    q = n - 1
    skew = torch.zeros(n, n, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = _jacobsthal(q)
    return torch.eye(n, dtype=torch.float64) + skew


def _paley_two(n: int) -> Tensor:
    """Order n = 2(q + 1) with a prime q ≡ 1 (mod 4): a symmetric conference matrix doubled."""
    q = n // 2 - 1
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = conference[1:, 0] = 1.0
    conference[1:, 1:] = _jacobsthal(q)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    eye = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(eye, minus)


@lru_cache(maxsize=64)
def hadamard_matrix(n: int) -> Tensor | None:
    """An n×n matrix of ±1 with H·Hᵀ = n·I, float64, or None if no construction here gives one.

    Doubling (Sylvester) is tried first, so powers of two are the usual Walsh-Hadamard matrix.
    """
    if n in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:n, :n].clone()
    if n % 4:
        return None
    half = hadamard_matrix(n // 2)
    if half is not None:
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        return torch.kron(two, half)
    if _is_prime(n - 1):
        return _paley_one(n)
    if (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        return _paley_two(n)
    return None
