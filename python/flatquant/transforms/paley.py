"""Paley's two constructions of Hadamard matrices from the squares of a finite field.

R. E. A. C. Paley, On orthogonal matrices, Journal of Mathematics and Physics 12 (1933) 311-320.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.transforms.finite_field import quadratic_differences


def paley_one(q: int) -> Tensor:
    """Order q + 1 for a prime power q ≡ 3 (mod 4): I + S with S skew. int8 [q + 1, q + 1]."""
    _check(q, 3)
    matrix = _bordered(q, -1)
    matrix.diagonal().fill_(1)
    return matrix


def paley_two(q: int) -> Tensor:
    """Order 2(q + 1) for a prime power q ≡ 1 (mod 4): a symmetric conference matrix doubled."""
    _check(q, 1)
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    eye = torch.eye(q + 1, dtype=torch.int8)
    return torch.kron(_bordered(q, 1), plus) + torch.kron(eye, minus)


def _check(q: int, residue: int) -> None:
    if q % 4 != residue:
        raise ValueError(f"Paley: q={q} must be {residue} modulo 4")


def _bordered(q: int, left: int) -> Tensor:
    """[[0, 1], [left, Q]] with Q[i, j] = χ(i − j): symmetric or skew, zero on the diagonal."""
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, left
    matrix[1:, 1:] = quadratic_differences(q)
    return matrix
