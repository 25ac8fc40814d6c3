"""The interface of a change of basis, and what is left of it once it is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class FrozenTransform:
    """Matrices of a finished transform, float64; None stands for the identity.

    Attributes:
        left: P1 [n1, n1]; `left_inv_t` is P1^-T.
        right: P2 [n2, n2]; `right_inv_t` is P2^-T.
    """

    left: Tensor | None = None
    left_inv_t: Tensor | None = None
    right: Tensor | None = None
    right_inv_t: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x·(P1 ⊗ P2) along the last dimension, in the dtype of x."""
        return kronecker_product(x, self.left, self.right)

    def apply_inverse_t(self, w: Tensor) -> Tensor:
        """w·(P1^-T ⊗ P2^-T) along the last dimension, in the dtype of w."""
        return kronecker_product(w, self.left_inv_t, self.right_inv_t)


def kronecker_product(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """x·(left ⊗ right) along the last dimension: vec_row(leftᵀ·X·right), X = x.reshape(n1, n2).

    A missing factor is the identity of the size that remains. Differentiable.
    """
    shape = x.shape
    if left is None and right is None:
        return x
    if left is None:
        assert right is not None
        return (x.reshape(-1, right.shape[0]) @ right.to(x.dtype)).reshape(shape)
    n1 = left.shape[0]
    x = x.reshape(-1, n1, shape[-1] // n1)
    x = left_product(left.to(x.dtype).mT, x)
    if right is not None:
        x = x @ right.to(x.dtype)
    return x.reshape(shape)


def left_product(matrix: Tensor, rows: Tensor) -> Tensor:
    """matrix @ rows[i] for every i: [m, n1] and [rows, n1, n2] -> [rows, m, n2].

    As a batched product of a broadcast matrix: `matrix @ rows` would transpose all rows twice.
    """
    return torch.bmm(matrix.expand(rows.shape[0], *matrix.shape), rows)


class Transform(nn.Module, ABC):
    """A learnable change of basis of the last dimension, x → x·P, and of weights, w → w·P^-T.

    The law that every transform obeys: apply(x) @ apply_inverse_t(w).T == x @ w.T.
    """

    @abstractmethod
    def matrices(self) -> FrozenTransform:
        """The matrices as they are now: differentiable, in the parameters' dtype."""

    def freeze(self, dtype: torch.dtype = torch.float64) -> FrozenTransform:
        """The finished matrices in float64, for merging.

        The factors are rounded to `dtype`, in which the online op will hold them, and the
        inverses are those of the rounded factors, so that the two cancel as well as they can.
        """
        now = self.matrices()
        left, left_inv_t = _rounded(now.left, dtype)
        right, right_inv_t = _rounded(now.right, dtype)
        return FrozenTransform(
            left=left, left_inv_t=left_inv_t, right=right, right_inv_t=right_inv_t
        )


def _rounded(matrix: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if matrix is None:
        return None, None
    online = matrix.detach().to(dtype).double()
    return online, online.inverse().mT.contiguous()
