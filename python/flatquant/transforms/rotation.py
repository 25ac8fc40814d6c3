"""A fixed orthogonal change of basis of any width, not learned, as rotation methods use it.

x → x·(base ⊗ H_2^j)/√n: a Hadamard matrix where one of the width is known, and otherwise a random
orthogonal base, which mixes all channels as well but costs multiplications.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from flatquant.transforms.base import FrozenTransform
from flatquant.transforms.hadamard import hadamard_split, sylvester
from flatquant.transforms.matrices import random_orthogonal


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
        a = 1
        while len(base) * a * 2 <= self.power // (a * 2):
            a *= 2
        left = torch.kron(base, sylvester(a).double()) / (len(base) * a) ** 0.5
        right = sylvester(self.power // a).double() / (self.power // a) ** 0.5
        return FrozenTransform(left=left, left_inv_t=left, right=right, right_inv_t=right)


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
