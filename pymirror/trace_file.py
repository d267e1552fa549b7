# SPDX-License-Identifier: MIT
"""A file in the Chrome trace format that parses at every moment: each write ends with the closing brackets.

The next write goes over them. So a process that is killed leaves a trace up to its last write.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
import time
from contextlib import suppress
from typing import Any

from .errors import MirrorError

#: Bytes that are kept before they are written, and for how many seconds at most while events come.
_BUFFER = 64 << 10
_AGE = 1.0

_HEAD = b'{"traceEvents":[\n'
_TAIL = b"\n]}\n"
_COMMA = b",\n"


class TraceFile:
    """Takes events as dictionaries. ``events`` are written, ``dropped`` came beyond ``limit`` bytes.

    A disk that is full, or any other refusal of the file, ends the writing and nothing else: ``error``.
    """

    def __init__(self, path: str | os.PathLike[str], limit: int) -> None:
        """OSError of open(2); EINVAL for what is no regular file."""
        self.path = os.fspath(path)
        self.limit = limit
        self.events = 0
        self.dropped = 0
        self.error: OSError | None = None
        # Reentrant, for handlers of signals.
        self._lock = threading.RLock()
        self._lines: list[bytes] = []
        self._buffered = 0
        self._fd = _open(self.path)
        self._end = 0
        self._put(_HEAD)
        self._written = time.monotonic()

    def add(self, event: dict[str, Any]) -> None:
        """Write an event, soon."""
        line = json.dumps(event, separators=(",", ":"), default=str).encode()
        with self._lock:
            if self._fd < 0 or self.error is not None:
                return
            if self._end + self._buffered + len(line) > self.limit:
                self.dropped += 1
                return
            self._lines.append(line)
            self._buffered += len(line) + len(_COMMA)
            self.events += 1
            if self._buffered >= _BUFFER or time.monotonic() - self._written >= _AGE:
                self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        with self._lock:
            lines, self._lines, self._buffered = self._lines, [], 0
            if lines:
                # By what is there, not by what was asked for: Ctrl-C may have lost it.
                first = self._end == len(_HEAD)
                self._put((b"" if first else _COMMA) + _COMMA.join(lines))
            self._written = time.monotonic()

    def close(self, about: dict[str, Any]) -> None:
        """Write the rest, and ``about`` as otherData. Idempotent."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                self.flush()
                other = json.dumps(about).encode()
                self._put(b"", b'\n],"displayTimeUnit":"ms","otherData":' + other + b"}\n")
            finally:
                fd, self._fd = self._fd, -1
                os.close(fd)

    def forget(self) -> None:
        """Close it without a write: it is another process's, whose threads may have held the lock."""
        self._lock = threading.RLock()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _put(self, data: bytes, tail: bytes = _TAIL) -> None:
        if self.error is not None:
            return
        try:
            _write_all(self._fd, data + tail, self._end)
            self._end += len(data)
            os.ftruncate(self._fd, self._end + len(tail))
        except OSError as error:
            self.error = error
            # What stood there before was whole, and had room; a disk that is gone has none.
            with suppress(OSError):
                os.ftruncate(self._fd, self._end)
                _write_all(self._fd, _TAIL, self._end)


def _open(path: str) -> int:
    # A FIFO without a reader must not keep us waiting, nor a terminal become ours. A new file is for this
    # user alone: addresses are in it.
    how = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(path, how, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise MirrorError(
                errno.EINVAL, f"Trace: {path} is no regular file", hint="a trace is written to a file on disk"
            )
        os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
