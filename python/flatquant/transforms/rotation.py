"""Orthogonal changes of basis of any width, as rotation methods use them.

x → x·(base ⊗ H_2^j)/√n: a Hadamard matrix where one of the width is known, and otherwise a random
orthogonal base, which mixes all channels as well but costs multiplications. `ROTATIONS` names what
the residual stream can be turned by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from flatquant.transforms.base import FrozenTransform, kronecker_product
from flatquant.transforms.hadamard import hadamard_split, sylvester
from flatquant.transforms.matrices import random_orthogonal
from flatquant.transforms.split import kronecker_split


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """x → x·(base ⊗ H_power)/√n.

    Attributes:
        base: [m, m] float64 with base·baseᵀ = m·I; None is m = 1.
        power: 2^j; n = m·2^j.
        op: what of `flatquant_cuda.ops` runs it online. "hadamard" takes base, whose entries are
            ±1 (on a GPU it keeps no more than their signs); "kronecker" takes leftᵀ and right of
            `frozen()`, as a random base needs.
        name: the construction, for reports.
    """

    base: Tensor | None
    power: int
    op: str
    name: str

    @property
    def width(self) -> int:
        """n."""
        return self.power if self.base is None else len(self.base) * self.power

    def frozen(self) -> FrozenTransform:
        """The same map as two orthogonal factors of like size, float64.

        base ⊗ H_ab = (base ⊗ H_a) ⊗ H_b, with the a that makes the larger factor smallest.
        """
        base = torch.ones(1, 1, dtype=torch.float64) if self.base is None else self.base
        a = _left_power(len(base), self.power)
        left = torch.kron(base, sylvester(a).double()) / (len(base) * a) ** 0.5
        right = sylvester(self.power // a).double() / (self.power // a) ** 0.5
        return FrozenTransform(left=left, left_inv_t=left, right=right, right_inv_t=right)


def _left_power(base: int, power: int) -> int:
    a = 1
    while base * a * 2 <= power // (a * 2):
        a *= 2
    return a


def rotation_sizes(n: int) -> tuple[int, int]:
    """(n1, n2) of the factors of `rotation(n).frozen()`."""
    split = hadamard_split(n)
    power = n & -n if split is None else split.power
    left = n // power * _left_power(n // power, power)
    return left, n // left


def rotation(n: int, generator: Generator) -> Rotation:
    """The rotation of width n. The generator is drawn from only where the base is random.

    Raises:
        ValueError: n < 1.
    """
    split = hadamard_split(n)
    name = rotation_name(n)
    if split is not None:
        return Rotation(base=split.base_matrix(), power=split.power, op="hadamard", name=name)
    power = n & -n
    base = random_orthogonal(n // power, generator).contiguous() * (n // power) ** 0.5
    return Rotation(base=base, power=power, op="kronecker", name=name)


def rotation_name(n: int) -> str:
    """How `rotation(n)` is constructed: "Paley I over GF(11) ⊗ 2^7", or that it is random."""
    split = hadamard_split(n)
    if split is not None:
        return split.name
    power = n & -n
    rest = f" ⊗ 2^{power.bit_length() - 1}" if power > 1 else ""
    return f"random orthogonal {n // power}{rest} (no Hadamard matrix of order {n} known)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """x → x·R with R = diag(signs)·(left ⊗ right) orthogonal: what Site.RESIDUAL takes.

    Attributes:
        left: P1 [n1, n1], or None.
        right: P2 [n2, n2], n = n1·n2.
        signs: ±1 [n], or None.
    """

    left: Tensor | None
    right: Tensor | None
    signs: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x·R along the last dimension, in the dtype of x. Differentiable."""
        return kronecker_product(
            x if self.signs is None else x * self.signs.to(x.dtype), self.left, self.right
        )

    def undo(self, x: Tensor) -> Tensor:
        """x·Rᵀ along the last dimension, in the dtype of x. Differentiable."""
        left, right = (None if m is None else m.mT for m in (self.left, self.right))
        x = kronecker_product(x, left, right)
        return x if self.signs is None else x * self.signs.to(x.dtype)

    def apply_to_outputs(self, weight: Tensor) -> Tensor:
        """Rᵀ·W of a weight [n, in]: its outputs are then those of W in the new basis."""
        return self.apply(weight.mT).mT

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        found = next(m for m in (self.left, self.right, self.signs) if m is not None)
        return found.device

    def to(self, device: torch.device) -> Turn:
        """The same rotation on another device."""
        left, right, signs = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.left, self.right, self.signs)
        )
        return Turn(left=left, right=right, signs=signs)


def _fixed(n: int, generator: Generator) -> Turn:
    factors = rotation(n, generator).frozen()
    return Turn(left=factors.left, right=factors.right)


def _randomised(n: int, generator: Generator) -> Turn:
    signs = 2.0 * torch.randint(0, 2, (n,), generator=generator).double() - 1.0
    return replace(_fixed(n, generator), signs=signs)


def _random(n: int, generator: Generator) -> Turn:
    left, right = (random_orthogonal(size, generator) for size in kronecker_split(n))
    return Turn(left=left, right=right)


ROTATIONS: dict[str, Callable[[int, Generator], Turn]] = {
    "hadamard": _fixed,
    "randomised-hadamard": _randomised,
    "random": _random,
}
"""Rotations of the residual stream by name: (width, generator) -> Turn. A randomised Hadamard
matrix has random signs in front (QuaRot, section 3); "random" is the Kronecker product of two
Haar-distributed matrices (QuIP, section 4.1)."""
