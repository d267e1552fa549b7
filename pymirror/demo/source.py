"""Real data for the memory: bytes of files that the machine has, and generated arrays between them."""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

SMALLEST_FILE = 64 << 10
ROOTS = (
    sysconfig.get_paths()["stdlib"],
    str(Path(sys.executable).parent),
    "/usr/bin",
    "/usr/lib",
    "/usr/share",
)


def machine_files(smallest: int = SMALLEST_FILE, roots: tuple[str, ...] = ROOTS) -> Iterator[tuple[str, int]]:
    """Path and size of readable regular files of at least `smallest` bytes, each once, lazily."""
    seen: set[tuple[int, int]] = set()
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    info = os.stat(path, follow_symlinks=False)
                except OSError:
                    continue
                if (
                    not stat.S_ISREG(info.st_mode)
                    or info.st_size < smallest
                    or (info.st_dev, info.st_ino) in seen
                ):
                    continue
                if not os.access(path, os.R_OK):
                    continue
                seen.add((info.st_dev, info.st_ino))
                yield path, info.st_size


class DataSource:
    """Fills buffers: three of four from files, one with an array; all with arrays once the files run out."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.from_files = 0
        self.generated = 0
        self._files = machine_files()
        self._fd = -1
        self._turn = 0

    def fill(self, buffer: Bytes) -> None:
        self._turn += 1
        done = 0 if self._turn % 4 == 0 else self._read(buffer.data)
        self.from_files += done
        self.generated += buffer.size - done
        if done < buffer.size:
            buffer[done:] = generate(self.rng, buffer.size - done, self._turn)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _read(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            if self._fd < 0 and not self._open_next():
                break
            try:
                n = os.readv(self._fd, [view[done:]])
            except OSError:
                n = 0
            if n == 0:
                self.close()
            done += n
        return done

    def _open_next(self) -> bool:
        for path, _ in self._files:
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            return True
        return False


def generate(rng: np.random.Generator, size: int, turn: int) -> Bytes:
    """`size` bytes of an array: noise, a wave, random integers or a ramp, by turn."""
    maker = _MAKERS[turn // 4 % len(_MAKERS)]
    return maker(rng, -(-size // 8)).view(np.uint8)[:size]


_MAKERS: tuple[Callable[[np.random.Generator, int], npt.NDArray[np.generic]], ...] = (
    lambda rng, n: rng.standard_normal(n),
    lambda rng, n: np.sin(np.arange(n) * rng.uniform(1e-4, 1e-2)),
    lambda rng, n: rng.integers(0, 1 << 63, n, dtype=np.uint64),
    lambda rng, n: np.arange(n, dtype=np.int64) + int(rng.integers(0, 1 << 32)),
)
