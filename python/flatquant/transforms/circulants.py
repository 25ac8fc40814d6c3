"""Hadamard matrices of order 4t made of four circulant blocks A, B, C, D of order t.

Any four circulants of ±1 with A·Aᵀ + B·Bᵀ + C·Cᵀ + D·Dᵀ = 4t·I give one, by the array of J. M.
Goethals and J. J. Seidel (A skew Hadamard matrix of order 36, J. Austral. Math. Soc. 11, 1970).
They stand here for the orders that models have and Paley's constructions do not reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Symmetric blocks, as J. Williamson first used them (Hadamard's determinant theorem and the sum of
# four squares, Duke Math. J. 11, 1944, where 172 is found). First found for 92 by L. Baumert,
# S. Golomb and M. Hall (Bull. AMS 68, 1962), for 116 by L. Baumert (Bull. AMS 72, 1966), for 156 by
# L. Baumert and M. Hall (Bull. AMS 71, 1965). These rows were searched anew: over all symmetric
# rows for 92 and 116; over B, with C[k] = B[16k], D[k] = B[22k] and A[k] = A[16k], for 156; over
# rows with r[k] = r[6k] for 172 (indices modulo t). Entries 0 … (t − 1)/2 of the first rows of
# A, B, C, D; entry t − k equals entry k.
WILLIAMSON = {
    92: ("+++-++--+-+-", "++++--+-+-++", "++-++--+++--", "+-+++-----+-"),
    116: ("++-+++---+--+-+", "+-+-++---+--+-+", "++++---+++-+--+", "+++++++---+-++-"),
    156: (
        "+---+---+-++-++----+",
        "+-++------++--+-+-++",
        "++--+++-+--++-+-----",
        "+---+--++++----+-+-+",
    ),
    172: (
        "+---++--++++-+-+++-++-",
        "++---++++-+--+--++----",
        "+++-+-++--+-+-++++-+--",
        "++-++++++----+-+--++-+",
    ),
}

# Turyn-type sequences X, Y, Z of length 36 and W of length 35, from H. Kharaghani and
# B. Tayfeh-Rezaie, A Hadamard matrix of order 428, J. Combin. Designs 13 (2005) 435-440, in the
# notation of D. Best, D. Đoković, H. Kharaghani and H. Ramp (Turyn-type sequences, 2012):
# hexadecimal digit i holds the signs of X[i], Y[i], Z[i], W[i] (1 is minus), the last one no W.
TURYN = {428: "060989975b685d8fc80750b21c0212eceb26"}


def williamson(order: int) -> Tensor:
    """The matrix of a `WILLIAMSON` order, int8 [order, order]."""
    return _array([_symmetric(half) for half in WILLIAMSON[order]])


def turyn(order: int) -> Tensor:
    """The matrix of a `TURYN` order, int8 [order, order].

    (Z, 0, 0), (0, W, 0), (0, 0, (X + Y)/2) and (0, 0, (X − Y)/2) are T-sequences of length
    t = 3·36 − 1 (Kharaghani and Tayfeh-Rezaie); the four sums of them below are the first rows of
    the circulants (J. Cooper and J. Wallis, Bull. Austral. Math. Soc. 7, 1972).
    """
    x, y, z, w = _sequences(TURYN[order])
    n, t = len(z), order // 4
    one, two, three, four = torch.zeros(4, t, dtype=torch.int8)
    one[:n], two[n : 2 * n - 1] = z, w
    three[2 * n - 1 :], four[2 * n - 1 :] = (x + y) // 2, (x - y) // 2
    return _array(
        [
            one + two + three + four,
            -one + two + three - four,
            -one - two + three + four,
            -one + two - three + four,
        ]
    )


def _symmetric(half: str) -> Tensor:
    row = torch.tensor([1 if sign == "+" else -1 for sign in half], dtype=torch.int8)
    return torch.cat((row, row[1:].flip(0)))


def _sequences(digits: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bits = [f"{int(digit, 16):04b}" for digit in digits[:-1]] + [f"{int(digits[-1], 16):03b}"]
    x, y, z, w = (
        torch.tensor([1 - 2 * int(place[i]) for place in bits if i < len(place)], dtype=torch.int8)
        for i in range(4)
    )
    return x, y, z, w


def _array(rows: Sequence[Tensor]) -> Tensor:
    """The array of Goethals and Seidel of four circulants, given by their first rows [t]."""
    t = len(rows[0])
    index = torch.arange(t)
    a, b, c, d = (row[(index[None, :] - index[:, None]) % t] for row in rows)
    # With R the reversal of columns, X·R and Xᵀ·R are symmetric and commute among themselves.
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)
    btr, ctr, dtr = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    blocks = ((a, br, cr, dr), (-br, a, dtr, -ctr), (-cr, -dtr, a, btr), (-dr, ctr, -btr, a))
    return torch.cat([torch.cat(line, dim=1) for line in blocks])
