"""Fixtures of the op tests: devices and instruction sets, absent ones skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flatquant_cuda import library


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """A device with its kernels."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not library.loaded:
        pytest.skip(f"no native library: {library.build_info()['library']}")
    return name


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set that this machine has, in force during the test."""
    if not library.loaded:
        pytest.skip(f"no native library: {library.build_info()['library']}")
    before = library.cpu_isa()
    try:
        if library.cpu_isa(request.param) != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield request.param
    finally:
        library.cpu_isa(before)


@pytest.fixture
def native() -> None:
    """Skip unless the library is loaded."""
    if not library.loaded:
        pytest.skip(f"no native library: {library.build_info()['library']}")
