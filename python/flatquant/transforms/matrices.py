"""Square invertible matrices, learned or fixed: the building blocks of every transform.

Each gives the pair (P, P^-T); what differs is how P is parametrised.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from flatquant.transforms.hadamard import hadamard_matrix


def random_orthogonal(n: int, generator: Generator) -> Tensor:
    """A Haar-distributed n×n orthogonal matrix, float64 (QR of a Gaussian, signs fixed)."""
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.sign(torch.diagonal(r))


def normalised_hadamard(n: int) -> Tensor | None:
    """H/√n, orthogonal, float64; None where no Hadamard matrix is constructed."""
    matrix = hadamard_matrix(n)
    return None if matrix is None else matrix / n**0.5


class InvertibleMatrix(nn.Module, ABC):
    """An n×n matrix P that knows its inverse transpose."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """(P, P^-T), each [n, n], differentiable in the parameters."""

    def advance(self, progress: float) -> None:
        """Hear how far the fit is, from 0 in the first epoch to 1 in the last one."""
        return  # most parametrisations do not care


class Fixed(InvertibleMatrix):
    """An orthogonal matrix that is not learned; P^-T = P."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0])
        self.register_buffer("matrix", matrix.to(torch.float32))

    def pair(self) -> tuple[Tensor, Tensor]:
        """(P, P)."""
        return self.matrix, self.matrix


class SVD(InvertibleMatrix):
    """P = U·diag(s)·Vᵀ with U, V by the Cayley map (FlatQuant, section 3.1); exact inverse.

    Q = (I + A/2)(I − A/2)^-1 for the skew A of a free square generator. U and V are stored
    relative to a fixed orthogonal start (P = U0·U·diag(s)·Vᵀ), so that any start, Hadamard or
    random, begins at A = 0 where the map is best conditioned. `s` = exp(log_s) stays positive.
    """

    start: Tensor

    def __init__(self, start: Tensor, generator: Generator, *, cayley_start: bool = False) -> None:
        """`cayley_start` begins as the authors do: U, V = Cayley(random), no fixed start."""
        n = start.shape[0]
        super().__init__(n)
        if cayley_start:
            start = torch.eye(n, dtype=torch.float64)
            left, right = (random_orthogonal(n, generator) for _ in range(2))
        else:
            left = right = torch.zeros(n, n, dtype=torch.float64)
        self.register_buffer("start", start.to(torch.float32))
        self.u = nn.Parameter(left.to(torch.float32))
        self.v = nn.Parameter(right.to(torch.float32))
        self.log_s = nn.Parameter(torch.zeros(n))

    @staticmethod
    def _cayley(generators: Tensor) -> Tensor:
        lower = torch.tril(generators, -1)
        half = (lower - lower.mT) / 2
        eye = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
        return torch.linalg.solve(eye - half, eye + half)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(U diag(s) Vᵀ, U diag(1/s) Vᵀ), U including the start."""
        u, v = self._cayley(torch.stack((self.u, self.v)))
        u = self.start @ u
        s = torch.exp(self.log_s)
        return (u * s) @ v.mT, (u / s) @ v.mT


class Direct(InvertibleMatrix):
    """P is a free matrix and P^-T its numerical inverse, in float64 (FlatQuant's direct_inv)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start.shape[0])
        self.matrix = nn.Parameter(start.to(torch.float32))

    def pair(self) -> tuple[Tensor, Tensor]:
        """(P, inverse(P)ᵀ)."""
        return _with_inverse(self.matrix)


class Gradual(InvertibleMatrix):
    """P from a free matrix through a mask that widens with the epochs (AffineQuant, section 3.2).

    It starts as the identity. The mask is 1 on the diagonal and `factor` within a band around
    it, which is empty in the first epoch and is the whole matrix in the last one; a small factor
    keeps P strictly diagonally dominant, so that it stays invertible (arXiv 2403.12544, theorem
    1 and equation 6).
    """

    distance: Tensor
    band: Tensor

    def __init__(self, n: int, *, factor: float = 0.1) -> None:
        super().__init__(n)
        self.factor = factor
        self.matrix = nn.Parameter(torch.eye(n))
        index = torch.arange(n)
        self.register_buffer("distance", (index[:, None] - index).abs())
        self.register_buffer("band", torch.tensor(0))

    def advance(self, progress: float) -> None:
        """Let in the entries up to progress·(n − 1) away from the diagonal."""
        self.band.fill_(int(progress * (self.n - 1)))

    def pair(self) -> tuple[Tensor, Tensor]:
        """(P, inverse(P)ᵀ)."""
        mask = (self.distance <= self.band).to(self.matrix.dtype) * self.factor
        return _with_inverse(self.matrix * mask.fill_diagonal_(1.0))


def _with_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    inverse = torch.linalg.inv(matrix.to(torch.float64))
    return matrix, inverse.mT.to(matrix.dtype)


def _hadamard_or_random(n: int, generator: Generator) -> Tensor:
    matrix = normalised_hadamard(n)
    return random_orthogonal(n, generator) if matrix is None else matrix


def _hadamard(n: int, generator: Generator) -> InvertibleMatrix:
    matrix = normalised_hadamard(n)
    if matrix is None:
        warnings.warn(
            f"no Hadamard matrix of order {n}: a random orthogonal one takes its place",
            stacklevel=2,
        )
        matrix = random_orthogonal(n, generator)
    return Fixed(matrix)


def _randomised(n: int, generator: Generator) -> InvertibleMatrix:
    signs = 2.0 * torch.randint(0, 2, (n, 1), generator=generator).double() - 1.0
    return Fixed(signs * _hadamard(n, generator).pair()[0])


MATRICES: dict[str, Callable[[int, Generator], InvertibleMatrix]] = {
    "svd": lambda n, g: SVD(_hadamard_or_random(n, g), g),
    "svd-cayley": lambda n, g: SVD(torch.eye(n), g, cayley_start=True),
    "direct": lambda n, g: Direct(random_orthogonal(n, g)),
    "gradual": lambda n, g: Gradual(n),
    "hadamard": _hadamard,
    "randomised-hadamard": _randomised,
    "random": lambda n, g: Fixed(random_orthogonal(n, g)),
}
"""Parametrisations by name: (n, generator) -> matrix."""
