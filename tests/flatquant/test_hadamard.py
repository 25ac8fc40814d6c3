"""Hadamard matrices, exactly; which one the widths of real models get; rotations of any width."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatquant.transforms.circulants import TURYN, WILLIAMSON
from flatquant.transforms.finite_field import prime_power, quadratic_differences
from flatquant.transforms.hadamard import (
    hadamard_matrix,
    hadamard_name,
    hadamard_split,
    sylvester,
)
from flatquant.transforms.matrices import MATRICES
from flatquant.transforms.paley import paley_one, paley_two
from flatquant.transforms.rotation import Rotation, rotation, rotation_name
from flatquant_cuda import ops

METHODS = Path(__file__).resolve().parents[2] / "docs" / "methods.md"

# Hidden and intermediate widths, heads, head_dim, each family's sizes one after the other.
MODELS = {
    "Llama 1": (4096, 11008, 32, 128, 5120, 13824, 40, 6656, 17920, 52, 8192, 22016, 64),
    "Llama 2, 3": (4096, 14336, 32, 128, 2048, 64, 3072, 24, 8192, 28672, 16384, 53248),
    "Qwen 1.5": (1024, 2816, 16, 64, 5120, 13696, 40, 128),
    "Qwen 2": (896, 4864, 14, 1536, 8960, 12, 3584, 18944, 28, 8192, 29568, 64, 128),
    "Qwen 2.5": (2048, 11008, 16, 5120, 13824, 40, 27648, 128),
    "Qwen 3": (1024, 3072, 16, 2048, 6144, 2560, 9728, 32, 4096, 12288, 17408, 40, 25600, 64),
    "Mistral": (4096, 14336, 32, 128, 5120, 32768, 12288, 28672, 96, 6144, 16384, 48),
    "Gemma 2": (2304, 9216, 8, 256, 3584, 14336, 16, 4608, 36864, 32, 128),
    "Gemma 3": (640, 2048, 4, 1152, 6912, 2560, 10240, 3840, 15360, 5376, 21504, 32, 256),
    "Phi 3, 4": (3072, 8192, 32, 96, 4096, 14336, 5120, 17920, 40, 24, 128),
    "SmolLM 2, 3": (576, 1536, 9, 64, 960, 2560, 15, 2048, 8192, 32, 11008, 16, 128),
    "OLMo 2": (2048, 8192, 16, 128, 4096, 11008, 32, 5120, 13824, 40, 27648),
    "Falcon": (4544, 18176, 71, 64, 8192, 32768, 128, 14848, 59392, 232),
    "OPT": (768, 3072, 12, 64, 2560, 10240, 80, 4096, 20480, 7168, 28672, 56, 9216, 36864, 72),
    "OPT-175B": (12288, 49152, 96, 128),
    "StableLM 2": (2048, 5632, 32, 64, 2560, 6912, 80, 5120, 13824, 40, 160),
    "GLM 4": (4096, 13696, 32, 128),
    "SigLIP": (1152, 4304, 16),
    "others": (11264,),
}
NAMED_ORDERS = (12, 20, 28, 36, 52, 60, 76, 92, 108, 116, 140, 148, 156, 172, 428, 924)


def is_hadamard(matrix: Tensor) -> bool:
    """Entries ±1 and H·Hᵀ = n·I, in integers: int8 products, int32 sums."""
    h = matrix.to(torch.int8)
    if not torch.equal(h.to(matrix.dtype), matrix) or not bool((h.abs() == 1).all()):
        return False
    n = len(h)
    gram = torch._int_mm(h, h.T.contiguous()) if n > 16 else h.int() @ h.int().T
    return torch.equal(gram, n * torch.eye(n, dtype=torch.int32))


def test_every_order_up_to_1024_that_is_reached_is_exact() -> None:
    reached = []
    for n in range(1, 1025):
        matrix = hadamard_matrix(n)
        assert (matrix is None) == (hadamard_name(n) is None)
        if matrix is not None:
            assert matrix.dtype == torch.float64 and matrix.shape == (n, n)
            assert is_hadamard(matrix), n
            reached.append(n)
    assert set(NAMED_ORDERS) <= set(reached)
    assert len(reached) == 208
    # These exist, by constructions that are not here.
    short = [n for n in range(4, 513, 4) if n not in reached]
    assert short == [188, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 436, 452, 472, 476, 508]


def test_the_check_sees_a_single_wrong_sign() -> None:
    matrix = hadamard_matrix(172)
    assert matrix is not None
    matrix[5, 7] *= -1
    assert not is_hadamard(matrix)
    again = hadamard_matrix(172)
    assert again is not None and is_hadamard(again)  # what is returned is the caller's own


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (1, "Sylvester 2^0"),
        (64, "Sylvester 2^6"),
        (12, "Paley I over GF(11)"),
        (24, "2^1 ⊗ Paley I over GF(11)"),
        (28, "Paley II over GF(13)"),
        (36, "Paley II over GF(17)"),
        (52, "Paley II over GF(25)"),
        (104, "Paley I over GF(103)"),  # before prime powers were known; 2 ⊗ 52 would be another
        (148, "Paley II over GF(73)"),
        (244, "Paley I over GF(243)"),
        (92, "Williamson 92"),
        (184, "2^1 ⊗ Williamson 92"),
        (428, "Turyn 428"),
        (924, "Paley II over GF(461)"),
        (1904, "(Paley II over GF(13)) ⊗ (Paley I over GF(67))"),
    ],
)
def test_each_order_says_how_it_is_made(n: int, name: str) -> None:
    assert hadamard_name(n) == name
    if n > 1024:
        matrix = hadamard_matrix(n)
        assert matrix is not None and is_hadamard(matrix)


def test_powers_of_two_are_walsh_hadamard() -> None:
    assert torch.equal(hadamard_matrix(32), sylvester(32).double())  # type: ignore[arg-type]
    signs = [[(-1) ** (i & k).bit_count() for k in range(32)] for i in range(32)]
    assert sylvester(32).tolist() == signs
    with pytest.raises(ValueError, match="order 12 must be a power of two"):
        sylvester(12)


# ---- finite fields and their matrices ------------------------------------------------------------


def test_prime_powers() -> None:
    found = [q for q in range(100) if prime_power(q)]
    primes = [q for q in range(2, 100) if all(q % d for d in range(2, q))]
    assert found == sorted([*primes, 4, 8, 16, 32, 64, 9, 27, 81, 25, 49])
    assert prime_power(3**6) == (3, 6)


@pytest.mark.parametrize("q", [3, 13, 9, 25, 27, 49, 81, 121, 125, 243, 343, 625, 729])
def test_differences_of_a_field(q: int) -> None:
    """Paley's lemma, which holds only if the arithmetic is that of a field."""
    matrix = quadratic_differences(q).long()
    eye, ones = torch.eye(q, dtype=torch.long), torch.ones(q, q, dtype=torch.long)
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)
    assert not matrix.sum(1).any()
    if q <= 343:
        assert torch.equal(matrix @ matrix.T, q * eye - ones)


def test_squares_modulo_a_prime_follow_euler() -> None:
    p = 31
    want = [(pow(x, (p - 1) // 2, p) + 1) % p - 1 for x in range(p)]
    assert quadratic_differences(p)[:, 0].tolist() == want


def test_orders_outside_the_constructions_are_refused() -> None:
    for q in (6, 8):
        with pytest.raises(ValueError, match=f"q={q} must be a power of an odd prime"):
            quadratic_differences(q)
    with pytest.raises(ValueError, match="q=13 must be 3 modulo 4"):
        paley_one(13)
    with pytest.raises(ValueError, match="q=11 must be 1 modulo 4"):
        paley_two(11)


@pytest.mark.parametrize("order", list(WILLIAMSON))
def test_williamson_rows_are_williamsons(order: int) -> None:
    """Four symmetric circulants whose squares sum to 4t·I: their spectra's squares sum to 4t."""
    t = order // 4
    index = torch.arange(t)
    total = torch.zeros(t, t, dtype=torch.long)
    for half in WILLIAMSON[order]:
        assert len(half) == (t + 1) // 2
        row = torch.tensor([1 if half[min(k, t - k)] == "+" else -1 for k in range(t)])
        circulant = row[(index[None] - index[:, None]) % t]
        assert torch.equal(circulant, circulant.T)
        total += circulant @ circulant
    assert torch.equal(total, order * torch.eye(t, dtype=torch.long))


def test_little_is_stored() -> None:
    """Rows, never matrices: under a kilobyte in all."""
    rows = [*TURYN.values(), *(half for rows in WILLIAMSON.values() for half in rows)]
    assert sum(len(row) for row in rows) < 400


# ---- the widths of real models -------------------------------------------------------------------


def table() -> dict[int, tuple[str, str]]:
    """Width -> (base, construction) of the table in docs/methods.md."""
    found = {}
    page = METHODS.read_text(encoding="utf-8")
    for base, name, widths in re.findall(r"^\| (\d+|none) \| ([^|]+) \| ([\d, ]+) \|$", page, re.M):
        for width in widths.split(", "):
            assert int(width) not in found
            found[int(width)] = (base, name)
    return found


def test_document_lists_the_widths_of_real_models_and_what_they_get() -> None:
    rows = table()
    assert set(rows) == {width for widths in MODELS.values() for width in widths}
    for width, (base, name) in rows.items():
        split = hadamard_split(width)
        if split is None:
            assert (base, name) == ("none", "random orthogonal"), width
            assert rotation_name(width).startswith("random orthogonal")
            continue
        assert split.base * split.power == width
        assert split.power.bit_count() == 1
        short = "Sylvester" if split.base == 1 else hadamard_name(split.base)
        assert (base, name) == (str(split.base), short), width


@pytest.mark.parametrize(
    ("n", "base", "power"),
    [
        (1, 1, 1),
        (4096, 1, 4096),
        (576, 36, 16),
        (104, 52, 2),
        (4864, 76, 64),
        (11008, 172, 64),
        (18944, 148, 128),
        (25600, 100, 256),
        (29568, 924, 32),
        (3072, 12, 256),
    ],
)
def test_split_has_the_smallest_base(n: int, base: int, power: int) -> None:
    split = hadamard_split(n)
    assert split is not None
    assert (split.base, split.power) == (base, power)
    smaller = [base >> j for j in range(1, base.bit_length()) if base % (1 << j) == 0]
    assert [m for m in smaller if hadamard_name(m)] == []


def test_no_split_says_so() -> None:
    assert [n for n in (6, 9, 14, 71, 4304) if hadamard_split(n)] == []
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        hadamard_split(0)
    assert rotation_name(71) == "random orthogonal 71 (no Hadamard matrix of order 71 known)"
    assert rotation_name(4304).startswith("random orthogonal 269 ⊗ 2^4 (no Hadamard")
    assert rotation_name(4864) == "Paley II over GF(37) ⊗ 2^6"
    assert rotation_name(52) == "Paley II over GF(25)"
    assert rotation_name(128) == "Sylvester 2^7"


# ---- what runs online ----------------------------------------------------------------------------


def run_online(turn: Rotation, x: Tensor) -> Tensor:
    if turn.op == "hadamard":
        return ops.hadamard(x, None if turn.base is None else turn.base.float())
    frozen = turn.frozen()
    assert turn.op == "kronecker" and frozen.left is not None and frozen.right is not None
    return ops.kronecker(x, frozen.left.T.float(), frozen.right.float())


@pytest.mark.parametrize("n", [1, 2, 9, 14, 64, 104, 184, 376, 576, 1536])
def test_rotation_is_what_its_op_runs_and_its_merged_form(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    turn = rotation(n, generator)
    assert turn.width == n
    assert turn.name == rotation_name(n)
    base = torch.ones(1, 1, dtype=torch.float64) if turn.base is None else turn.base
    assert (turn.op == "hadamard") == bool(base.abs().eq(1).all())
    assert (turn.op == "kronecker") == turn.name.startswith("random")
    dense = torch.kron(base, sylvester(turn.power).double()) / n**0.5
    assert torch.allclose(dense @ dense.T, torch.eye(n, dtype=torch.float64), atol=1e-12)

    x = torch.randn(5, n, generator=generator)
    frozen = turn.frozen()
    assert torch.allclose(frozen.apply(x.double()), x.double() @ dense, rtol=1e-12, atol=1e-12)
    online = run_online(turn, x).double()
    assert torch.allclose(online, x.double() @ dense, rtol=1e-5, atol=1e-5)
    w = torch.randn(3, n, generator=generator, dtype=torch.float64)
    product = frozen.apply(x.double()) @ frozen.apply_inverse_t(w).T
    assert torch.allclose(product, x.double() @ w.T, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("n", [11008, 29568])
def test_wide_rotations_need_no_wide_matrix(n: int) -> None:
    turn = rotation(n, torch.Generator())
    frozen = turn.frozen()
    assert frozen.left is not None and frozen.right is not None
    assert max(len(frozen.left), len(frozen.right)) < 1024
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = frozen.apply(x)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert torch.allclose(run_online(turn, x.float()).double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [52, 92, 100, 116, 156, 172])
def test_orders_new_to_the_transform_are_used_without_a_warning(n: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix, _ = MATRICES["hadamard"](n, torch.Generator().manual_seed(0)).pair()
    assert torch.equal(matrix.abs(), torch.full((n, n), n**-0.5))
