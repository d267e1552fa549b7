"""Memory for DMA tests: page-aligned buffers, masks below and above a page's address, errnos."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import pymirror as pm
from pymirror.dma.swiotlb import SwiotlbPool

PAGE = 4096


def pages(n: int, fill: int | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """n whole pages that begin with a page, of bytes that tell their place, or all of one."""
    array = np.frombuffer(mmap.mmap(-1, n * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[:] = np.arange(n * PAGE, dtype=np.uint64) * 7 % 251 if fill is None else fill
    return array


def mapped(device: pm.Device, buffer: Any, direction: int, size: int | None = None, offset: int = 0) -> int:
    """dma_map_single() of a whole buffer, with the check that drivers must make."""
    size = memoryview(buffer).nbytes - offset if size is None else size
    addr = pm.dma_map_single(device, buffer, size, direction, offset=offset)
    assert not pm.dma_mapping_error(device, addr)
    return addr


@contextmanager
def refuses(number: int, category: str | None = None) -> Iterator[Any]:
    """The block ends with a MirrorError of that errno, and with a report of that category if one is named."""
    with pytest.raises(pm.MirrorError) as caught:
        yield caught
    assert caught.value.errno == number, errno.errorcode.get(caught.value.errno)
    if category is not None:
        assert isinstance(caught.value, pm.DmaDebugError)
        assert caught.value.report.category == category


def bouncing(pool: SwiotlbPool | None = None) -> pm.Device:
    """A device without an IOMMU whose mask reaches the bounce pool and no page of memory."""
    return pm.Device("bouncing", iommu=False, dma_mask=pm.DMA_BIT_MASK(23), swiotlb=pool)


def line_of(function: Callable[..., Any]) -> int:
    return function.__code__.co_firstlineno
