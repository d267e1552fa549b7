"""Memory that migrates, with a pattern in it by which every byte is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from mirroring import PAGE

import pymirror as pm

PAGES = 64


def pattern(pages: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    numbers = np.repeat(np.arange(1, pages + 1, dtype=np.uint64), PAGE // 8)
    return (numbers * np.uint64(0x9E3779B97F4A7C15)).view(np.uint8)


def patterned(mm: pm.AddressSpace, pages: int = PAGES, **kinds: Any) -> pm.Region:
    buf = mm.mmap(pages * PAGE, **kinds)
    np.frombuffer(buf, np.uint8)[:] = pattern(pages)
    return buf


def intact(buf: pm.Region) -> bool:
    return bool(np.array_equal(np.frombuffer(buf, np.uint8), pattern(buf.size // PAGE)))


def to_device(buf: pm.Region, vram: pm.DeviceMemory) -> int:
    return pm.migrate_to_device(buf.mm, buf.addr, buf.addr + buf.size, vram)
