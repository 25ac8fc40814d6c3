"""Orthogonal matrices that gradient steps keep orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.transforms.matrices import InvertibleMatrix


class Stiefel(InvertibleMatrix):
    """An orthogonal matrix, learned by `step`; P^-T = P.

    `matrix` is what the forward pass sees, float32; `exact` is the same in float64, so that
    hundreds of steps do not add up their roundings.
    """

    exact: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__(start.shape[0])
        self.register_buffer("exact", start.detach().double())
        self.matrix = nn.Parameter(start.detach().to(torch.float32))

    def pair(self) -> tuple[Tensor, Tensor]:
        """(P, P)."""
        return self.matrix, self.matrix

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One Cayley step against the parameter's gradient, which is cleared."""
        if self.matrix.grad is None:
            raise RuntimeError("Stiefel: step() must follow a backward pass")
        self.exact = cayley_step(self.exact, self.matrix.grad.double(), lr)
        self.matrix.copy_(self.exact)
        self.matrix.grad = None


def cayley_step(matrix: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """R⁺ = (I + α/2·Y)⁻¹·(I − α/2·Y)·R with Y = Ĝ − Ĝᵀ, Ĝ = G·Rᵀ − ½·R·Rᵀ·G·Rᵀ.

    Orthogonal for every α (SpinQuant, arXiv 2405.16406, section 3.2). α is `lr`, but at most
    1/‖Y‖₁, as in Cayley SGD (arXiv 2002.01113, algorithm 1, without momentum). That algorithm
    iterates towards the inverse; here it is solved for.

    Args:
        matrix: R [n, n] orthogonal, float64.
        gradient: G [n, n] of the loss, float64.
        lr: largest step.
    """
    half = gradient @ matrix.mT / 2  # Ĝ of an orthogonal R
    skew = half - half.mT
    largest = float(skew.abs().sum(0).max())
    alpha = min(lr, 1 / largest) if largest > 0 else lr
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    skew = skew * (alpha / 2)
    return torch.linalg.solve(eye + skew, (eye - skew) @ matrix)
