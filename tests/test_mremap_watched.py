"""Watching a part of a vma splits it; what the library did must not show in mremap(), which wants one vma."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pymirror as pm

PART = 16 * pm.KiB


@pytest.mark.parametrize("how", [{}, {"shared": True}, {"huge": "thp"}])
def test_memory_that_is_mirrored_in_part_moves_as_a_whole(mm: pm.AddressSpace, how: dict[str, Any]) -> None:
    buf = mm.mmap(4 * pm.MiB, **how)
    np.frombuffer(buf, np.uint8)[:] = 7
    device = pm.Device("d0")
    with pm.Mirror(mm) as mirror, mirror.range(buf.addr + pm.MiB, buf.addr + pm.MiB + PART) as rng:
        rng.default_flags = pm.HMM_PFN_REQ_FAULT
        assert device.page_table.map(rng, rng.fault())
        hole = mm.mmap(buf.size, prot=0, huge=how.get("huge"))
        flags = pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED
        moved = mm.mremap(buf.addr, buf.size, buf.size, flags=flags, new_addr=hole.addr)
        assert moved.addr == hole.addr
        assert (np.frombuffer(moved, np.uint8) == 7).all()
