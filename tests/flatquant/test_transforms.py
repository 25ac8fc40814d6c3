"""Transforms: the law of each, splits, Hadamard matrices."""

from __future__ import annotations

import warnings

import pytest
import torch

from flatquant.models.spec import Geometry, Site
from flatquant.transforms import TRANSFORMS, kronecker_split
from flatquant.transforms.hadamard import hadamard_matrix
from flatquant.transforms.matrices import MATRICES, SVD, random_orthogonal

GEOMETRY = Geometry(hidden=48, intermediate=80, heads=6, kv_heads=3, head_dim=8)


@pytest.mark.parametrize(
    ("n", "pair"),
    [
        (576, (24, 24)),
        (1536, (32, 48)),
        (4096, (64, 64)),
        (4304, (16, 269)),
        (11008, (86, 128)),
        (13824, (108, 128)),
        (14336, (112, 128)),
        (18944, (128, 148)),
        (28672, (128, 224)),
        (6, (2, 3)),
        (2, (1, 2)),
        (1, (1, 1)),
    ],
)
def test_split_is_the_pair_with_the_smallest_sum(n: int, pair: tuple[int, int]) -> None:
    assert kronecker_split(n) == pair


def test_primes_fall_back_to_one_dense_matrix_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="4099 channels are prime"):
        assert kronecker_split(4099) == (1, 4099)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        kronecker_split(0)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 64, 76, 108, 128])
def test_hadamard_matrices_are_orthogonal(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix is not None
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 9, 18])
def test_orders_without_a_hadamard_matrix_say_so(n: int) -> None:
    assert hadamard_matrix(n) is None
    with pytest.warns(UserWarning, match=f"order {n}"):
        MATRICES["hadamard"](n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", list(TRANSFORMS))
@pytest.mark.parametrize("site", [s for s in Site if s not in (Site.V_HEAD,)])
def test_apply_and_inverse_cancel(kind: str, site: Site) -> None:
    """apply(x) @ apply_inverse_t(w).T == x @ w.T, after moving every parameter at random."""
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transform = TRANSFORMS[kind](site, GEOMETRY, generator)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    width = GEOMETRY.width(site)
    x = torch.randn(7, width, generator=generator, dtype=torch.float64)
    w = torch.randn(5, width, generator=generator, dtype=torch.float64)
    frozen = transform.freeze()
    product = frozen.apply(x) @ frozen.apply_inverse_t(w).T
    assert torch.allclose(product, x @ w.T, rtol=1e-12, atol=1e-10)
    left = torch.eye(width // frozen.right.shape[0]) if frozen.left is None else frozen.left
    right = torch.eye(width // left.shape[0]) if frozen.right is None else frozen.right
    dense = torch.kron(left.double().contiguous(), right.double().contiguous())
    assert torch.allclose(frozen.apply(x), x @ dense, rtol=1e-12, atol=1e-12)


def test_svd_inverse_is_accurate_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = SVD(random_orthogonal(32, generator), generator)
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    p, p_inv_t = matrix.pair()
    assert float((p @ p_inv_t.T - torch.eye(32)).abs().max()) < 1e-5
