"""P = P1 ⊗ P2, the transform of FlatQuant, with either factor optional."""

from __future__ import annotations

from flatquant.transforms.base import FrozenTransform, Transform
from flatquant.transforms.matrices import InvertibleMatrix


class Kronecker(Transform):
    """x → x·(P1 ⊗ P2) with any parametrisation of the two factors (paper, equation 3)."""

    def __init__(self, left: InvertibleMatrix | None, right: InvertibleMatrix | None) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def matrices(self) -> FrozenTransform:
        """The two pairs, differentiable."""
        left, left_inv_t = (None, None) if self.left is None else self.left.pair()
        right, right_inv_t = (None, None) if self.right is None else self.right.pair()
        return FrozenTransform(
            left=left, left_inv_t=left_inv_t, right=right, right_inv_t=right_inv_t
        )
