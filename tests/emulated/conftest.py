"""Fixtures: the libraries that run CUDA sources on the host, compiled on first use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from . import build
from .emulated import ORDERS, Emulated


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder where nothing can be emulated."""
    reason = build.why_not()
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class Libraries:
    """The builds of one session; the sanitized one is made while other tests run."""

    def __init__(self, config: pytest.Config, sanitized_too: bool) -> None:
        self.capture: Any = config.pluginmanager.getplugin("capturemanager")
        self.pool = ThreadPoolExecutor(1)
        with self.visible():
            self.shim = build.build("shim", [build.HERE / "shim.cu"])
            self.ops = build.build_ops()
        for counts in self.ops.parent.glob("*.gcda"):  # of earlier runs
            counts.unlink()
        self.later: Future[Path] | None = None
        if sanitized_too:
            self.later = self.pool.submit(build.build_ops, build.SANITIZED)

    def visible(self) -> AbstractContextManager[None]:
        """Progress goes to the terminal."""
        shown: AbstractContextManager[None] = self.capture.global_and_fixture_disabled()
        return shown

    def sanitized(self) -> Path:
        """The ops, compiled with the sanitizers."""
        with self.visible():
            return self.later.result() if self.later else build.build_ops(build.SANITIZED)


@pytest.fixture(scope="session")
def libraries(request: pytest.FixtureRequest) -> Libraries:
    """All builds."""
    wanted = any("sanitized" in getattr(i, "fixturenames", ()) for i in request.session.items)
    return Libraries(request.config, wanted)


@pytest.fixture(scope="session")
def emulated(libraries: Libraries) -> Emulated:
    """The ops of csrc/cuda."""
    return Emulated(libraries.ops)


@pytest.fixture(scope="session")
def sanitized(libraries: Libraries) -> Path:
    """The ops of csrc/cuda under the sanitizers, for a process of its own."""
    return libraries.sanitized()


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The other core compiles; and the references are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    """An order in which the emulator runs threads."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Kernels are compiled with -fsanitize=alignment, whose findings go to standard error."""
    yield
    assert "runtime error" not in (found := capfd.readouterr().err), found
