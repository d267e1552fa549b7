# SPDX-License-Identifier: MIT
"""A forked child that keeps its copy of some memory until it is asked for a checksum of it."""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import warnings
import zlib
from types import TracebackType

from ..errors import MirrorError

_TIMEOUT = 20.0


class Child:
    """Forks at once. A context manager: the child has ended when it is left. It ends with its parent, too."""

    def __init__(self, memory: memoryview) -> None:
        self._ask, self._answer = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            # Other threads are the library's own; the child calls nothing that could need their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            self._wait_and_tell(memory)
        os.close(self._ask[0])
        os.close(self._answer[1])

    def checksum(self) -> int:
        """CRC-32 of the memory as the child has it. ETIMEDOUT."""
        os.write(self._ask[1], b"?")
        poll = select.poll()
        poll.register(self._answer[0], select.POLLIN)
        data = os.read(self._answer[0], 4) if poll.poll(_TIMEOUT * 1000) else b""
        if len(data) < 4:
            raise MirrorError(
                errno.ETIMEDOUT, "study: a forked child did not answer", hint="the machine may be overloaded"
            )
        return int(struct.unpack("=I", data)[0])

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self._ask[1])
        os.close(self._answer[0])
        if value is not None:
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _wait_and_tell(self, memory: memoryview) -> None:
        try:
            # With its write end open here, the end of the parent would go unseen.
            os.close(self._ask[1])
            while os.read(self._ask[0], 1):
                os.write(self._answer[1], struct.pack("=I", zlib.crc32(memory)))
        finally:
            os._exit(0)
