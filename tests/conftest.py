"""Which tests stay together when several processes share them (pytest-xdist)."""

from __future__ import annotations

from typing import Any

import pytest

#: Folders whose tests share what is slow to make: a build, the machine code of all kernels.
TOGETHER = ("tests/cuda/", "tests/emulated/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each of these folders to one process, and all other tests one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid)

    return Folders(config, log)
