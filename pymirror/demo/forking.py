"""fork under a device: parent and child each keep what is theirs, whatever the device writes in between."""

from __future__ import annotations

import os
import select
import signal
import struct
import zlib
from typing import NoReturn

from pymirror.demo.memory import Chunk
from pymirror.demo.world import Worker

CHILD_TIMEOUT = 20.0
WRITE_SIZE = 64


def fork(worker: Worker, chunk: Chunk) -> None:
    """Fork; the device writes to the parent's memory, then the child checksums its own.

    The child of a private mapping must see the bytes of before, that of a shared one what the device wrote.
    """
    world = worker.world
    before = zlib.crc32(chunk.view().data)
    go_read, go_write = os.pipe()
    result_read, result_write = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            _child(chunk, (go_read, go_write), result_write)
        try:
            if chunk.writable:
                offset = int(worker.rng.integers(0, chunk.size - WRITE_SIZE))
                world.device.write(world.mm, chunk.addr + offset, worker.rng.bytes(WRITE_SIZE))
            expected = zlib.crc32(chunk.view().data) if chunk.kind.shared else before
        finally:
            os.write(go_write, b"g")
            seen = _result(pid, result_read)
    finally:
        for fd in (go_read, go_write, result_read, result_write):
            os.close(fd)
    if seen is None:
        world.fail(f"a forked child did not answer: {chunk.kind} at {chunk.addr:#x}")
    elif seen != expected:
        world.fail(f"a forked child read other bytes than it must: {chunk.kind} at {chunk.addr:#x}")


def _child(chunk: Chunk, go: tuple[int, int], result: int) -> NoReturn:
    """Only this thread exists here: it reads, and _exit is the only way out. It ends with its parent."""
    try:
        # With its write end open here, the end of the parent would go unseen.
        os.close(go[1])
        if os.read(go[0], 1):
            os.write(result, struct.pack("=I", zlib.crc32(chunk.view().data)))
    finally:
        os._exit(0)


def _result(pid: int, fd: int) -> int | None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data = os.read(fd, 4) if poll.poll(CHILD_TIMEOUT * 1000) else b""
    if len(data) < 4:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return int(struct.unpack("=I", data)[0]) if len(data) == 4 else None
