"""Private mappings of files on a disk, with copies in them that may leave for a device."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirroring import PAGE
from seams import needs

import pymirror as pm

PAGES = 16
#: Those that this process writes to, and so has copies of.
COPIES = range(4, 12)
CONTENTS = b"".join(bytes([page + 1]) * PAGE for page in range(PAGES))


@contextmanager
def space(delivery: str) -> Iterator[pm.AddressSpace]:
    needs("guard", "wp_async", "uffd_events", "pagemap")
    needs("sigbus" if delivery == "inline" else "uffd_kernel")
    with pm.AddressSpace(fault_delivery=delivery) as made:
        yield made


def expected() -> bytearray:
    contents = bytearray(CONTENTS)
    for page in COPIES:
        contents[page * PAGE : (page + 1) * PAGE] = bytes([100 + page]) * PAGE
    return contents


def contents(buf: pm.Region) -> bytes:
    return ctypes.string_at(buf.addr, buf.size)


def to_device(buf: pm.Region, vram: pm.DeviceMemory) -> int:
    return pm.migrate_to_device(buf.mm, buf.addr, buf.addr + buf.size, vram)


PROGRAM = """
import ctypes, faulthandler, os, signal, sys, tempfile
import pymirror as pm

mm = pm.AddressSpace(fault_delivery="DELIVERY")
file = tempfile.TemporaryFile(dir="FOLDER")
file.truncate(4 * 4096)
buf = mm.mmap(4 * 4096, fd=file.fileno())
buf[0] = 1
vram = pm.DeviceMemory(pm.Device("d"), 1 << 20)

def out():
    return pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)

"""


def run(mm: pm.AddressSpace, folder: Path, program: str) -> tuple[int, str]:
    start = PROGRAM.replace("DELIVERY", mm.fault_delivery).replace("FOLDER", str(folder))
    done = subprocess.run([sys.executable, "-c", start + program], timeout=60, capture_output=True, text=True)
    return done.returncode, done.stderr
