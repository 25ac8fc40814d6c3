"""Replace a folder as a whole: readers see the old one or the new one, never a mixture."""

from __future__ import annotations

import ctypes
import glob
import itertools
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_counter = itertools.count()


@contextmanager
def replacing(target: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `target`; put it in `target`'s place when the block succeeds.

    What `target` holds and the block did not write is kept (hard links), except files for whose
    name `stale` is true. If the block raises, or the process dies in it, `target` is as it was;
    what a dead process left behind is removed by the next call.

    Raises:
        ValueError: `target` is a file, a mount point or (above) the current directory; those
            cannot be renamed.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"save: {target} is a file: the name of a folder is needed")
    if Path.cwd().is_relative_to(target) or os.path.ismount(target):
        raise ValueError(
            f"save: {target} is a mount point or holds the current directory: it cannot be "
            "replaced as a whole; give the name of a folder inside it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    staging = target.with_name(f"{_prefix(target)}{os.getpid()}-{next(_counter)}")
    staging.mkdir()
    try:
        yield staging
        if target.exists():
            _keep_rest(target, staging, stale)
            _sync(staging)
            _exchange(staging, target)
        else:
            _sync(staging)
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after an exchange: the old folder


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-{socket.gethostname()}-"


def _remove_leftovers(target: Path) -> None:
    """Delete the staging folders of processes of this machine that are gone."""
    for leftover in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        process = leftover.name.removeprefix(_prefix(target)).partition("-")[0]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _keep_rest(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    """Link into `new` what only `old` has."""
    for entry in old.iterdir():
        if (new / entry.name).exists() or stale(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(entry), str(new / entry.name))


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """Have the files on the disk before the rename that makes them visible."""
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; one atomic step on Linux, two renames elsewhere."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        names = (os.fsencode(new), os.fsencode(old))
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    backup = new.with_name(new.name + "-old")
    old.rename(backup)
    try:
        new.rename(old)
    except OSError:
        backup.rename(old)
        raise
    backup.rename(new)
