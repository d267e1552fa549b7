"""The forked child of a scenario: a process that touches nothing until it is told to."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import warnings

_ORDER = struct.Struct("=cQQB")
_WRITE, _QUIT, _DONE = b"w", b"q", b"k"
_PAGE = 4096


class ForkedChild:
    """A child made by a real fork, which writes to its own view of memory when told through a pipe.

    Every wait ends after `timeout` seconds with TimeoutError, and the child is killed then.
    """

    def __init__(self, timeout: float = 10.0) -> None:
        self._timeout = timeout
        order_reader, self._orders = os.pipe()
        self._answers, answer_writer = os.pipe()
        with warnings.catch_warnings():
            # The child runs no more than the loop below: locks that other threads held do not matter to it.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            # Its own copies of these would keep it from seeing the parent go.
            os.close(self._orders)
            os.close(self._answers)
            _serve(order_reader, answer_writer)
        os.close(order_reader)
        os.close(answer_writer)

    def write(self, addr: int, count: int, value: int) -> None:
        """Write byte `(value + i) & 0xff` at the start of the i-th of `count` pages from addr."""
        self._send(_ORDER.pack(_WRITE, addr, count, value & 0xFF))
        if not select.select([self._answers], [], [], self._timeout)[0]:
            self._kill()
            raise TimeoutError(f"the forked child {self.pid} did not write within {self._timeout} s")
        if os.read(self._answers, 1) != _DONE:
            raise ChildProcessError(f"the forked child {self.pid} died writing at {addr:#x}: {self._wait()}")

    def reap(self) -> None:
        """Let the child exit and wait for it. ChildProcessError unless it ends well; once only."""
        if self.pid == 0:
            return
        self._send(_ORDER.pack(_QUIT, 0, 0, 0))
        if not select.select([self._answers], [], [], self._timeout)[0]:
            self._kill()
        status = self._wait()
        if status != 0:
            raise ChildProcessError(f"the forked child ended with status {status}")

    def discard(self) -> None:
        """End the child however it stands."""
        if self.pid != 0:
            self._kill()
            self._wait()

    def _send(self, order: bytes) -> None:
        try:
            os.write(self._orders, order)
        except BrokenPipeError:
            raise ChildProcessError(f"the forked child is gone: status {self._wait()}") from None

    def _kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _wait(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._orders)
        os.close(self._answers)
        self.pid = 0
        return status


def _serve(orders: int, answers: int) -> None:
    """The whole life of the child; it leaves by os._exit, so nothing of the parent's is finalised here."""
    try:
        while True:
            order = os.read(orders, _ORDER.size)
            if len(order) < _ORDER.size:
                os._exit(0)
            what, addr, count, value = _ORDER.unpack(order)
            if what != _WRITE:
                os._exit(0)
            for i in range(count):
                ctypes.c_uint8.from_address(addr + i * _PAGE).value = (value + i) & 0xFF
            os.write(answers, _DONE)
    finally:
        os._exit(1)
