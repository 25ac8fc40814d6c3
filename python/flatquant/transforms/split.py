"""How a channel count is split into the two sizes of a Kronecker product."""

from __future__ import annotations

import math
import warnings


def kronecker_split(n: int) -> tuple[int, int]:
    """The divisor pair (n1, n2) of n with the smallest sum, n1 <= n2 (FlatQuant, section 3.1).

    Found by search downward from √n, so every size has an answer; a prime has only 1×n, a
    dense transform, which is slow online and is warned about.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"kronecker_split: n={n} must be at least 1")
    left = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    if left == 1 and n > 64:
        warnings.warn(
            f"{n} channels are prime: the transform is one dense {n}x{n} matrix",
            stacklevel=2,
        )
    return left, n // left
