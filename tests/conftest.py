"""Which tests stay together when several processes share them (pytest-xdist)."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Folders whose tests share what is slow to make: a build, the machine code of all kernels.
TOGETHER = ("cuda", "emulated")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each of these folders to one process."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(folder))
