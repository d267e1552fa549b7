"""Files of a file system on a disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def on_disk(folder: Path) -> bool:
    """Not tmpfs: a file system that wants to hear of the first write to a page."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(mount, kind) for mount, kind in mounts if folder.is_relative_to(mount)]
    return max(inside, key=lambda one: len(one[0]))[1] not in ("tmpfs", "ramfs")


@contextmanager
def disk_file(folder: Path, contents: bytes) -> Iterator[int]:
    """The descriptor of one, in that folder if it is on a disk."""
    place = next((one for one in (folder, Path("/var/tmp"), Path.cwd()) if on_disk(one)), None)
    if place is None:
        pytest.skip("no file system on a disk is writable here")
    with tempfile.TemporaryFile(dir=place) as made:
        made.write(contents)
        made.flush()
        yield made.fileno()
