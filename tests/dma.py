"""Ranges of both kinds mapped for DMA, for the tests: mirrored ones and pinned ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mirroring import PAGE, WRITE

import pymirror as pm
from pymirror.pfn import PfnArray


class DmaDriver(pm.Mirror):
    """A mirroring driver: its callback takes what is invalidated off the device's DMA."""

    def __init__(self, mm: pm.AddressSpace, device: pm.Device | None = None) -> None:
        self.device = device or pm.Device("d")
        self.forgets = False
        self.mapped: pm.Range | None = None
        self.updates: list[pm.MmuNotifierRange] = []
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            self.updates.append(update)
            rng = self.mapped
            if rng is not None and not self.forgets:
                pm.hmm_range_dma_unmap(rng, self.device, start=update.start, end=update.end)

    def map(self, rng: pm.Range) -> PfnArray:
        self.mapped = rng
        return pm.hmm_range_dma_map(rng, self.device)


@contextmanager
def mirrored(
    mm: pm.AddressSpace, buf: pm.Region, device: pm.Device | None = None, flags: int = WRITE
) -> Iterator[tuple[DmaDriver, pm.Range]]:
    """A registered range over a Region, and its driver."""
    with DmaDriver(mm, device) as driver, driver.range(buf.addr, buf.addr + buf.size) as rng:
        rng.default_flags, rng.pfn_flags_mask = flags, 0
        yield driver, rng
        pm.hmm_range_dma_unmap(rng, driver.device)


def numbers(buf: pm.Region) -> Any:
    """The Region's bytes, as an array, full of numbers."""
    view = np.frombuffer(buf, np.uint8)
    view[:] = np.arange(view.size) % 251
    return view


def nothing_mapped(device: pm.Device) -> bool:
    """Neither mappings nor IOVAs are left."""
    stats = device.domain.stats()
    if isinstance(device.domain, pm.IommuDomain):
        device.domain.flush()
        assert device.domain.iova_stats()["live"] == 0
    return stats["mappings"] == stats["mapped_pages"] == stats["bytes"] == 0


def pages_of(buf: pm.Region) -> int:
    return buf.size // PAGE
