"""What tests of the odp driver share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from dma import nothing_mapped
from notifying import invalidate
from seams import needs

import pymirror as pm
from pymirror.drivers.odp import (
    IB_ACCESS_LOCAL_WRITE,
    IB_ACCESS_ON_DEMAND,
    IB_ACCESS_REMOTE_ATOMIC,
    IB_ACCESS_REMOTE_READ,
    IB_ACCESS_REMOTE_WRITE,
    Odp,
    OdpMr,
)
from pymirror.drivers.umem_odp import ODP_READ_ALLOWED, ODP_WRITE_ALLOWED

PAGES = 8


CHUNK = 64 << 10


HUGE = 2 << 20


ALL = (
    IB_ACCESS_ON_DEMAND
    | IB_ACCESS_LOCAL_WRITE
    | IB_ACCESS_REMOTE_WRITE
    | IB_ACCESS_REMOTE_READ
    | IB_ACCESS_REMOTE_ATOMIC
)


@pytest.fixture(params=[True, False], ids=["iommu", "direct"])
def odp_by_bus(request: pytest.FixtureRequest, mm: pm.AddressSpace) -> Iterator[Odp]:
    """On a device with an IOMMU or without one; in the end nothing of it is left.

    For a module that says ``odp = odp_by_bus``.
    """
    if not request.param:
        needs("pfn")
    device = pm.Device("mlx5_0", iommu=request.param)
    with Odp(mm, device=device, timeout=10.0, imr_chunk=CHUNK) as made:
        yield made
    assert nothing_mapped(device)
    assert mm.stats()["interval_notifiers"] == 0


def whole(odp: Odp, buf: pm.Region, access: int = ALL) -> OdpMr:
    return odp.reg_user_mr(buf.addr, buf.size, access)


def bits(mr: OdpMr) -> list[int]:
    return (mr.umem.dma_list & np.uint64(ODP_READ_ALLOWED | ODP_WRITE_ALLOWED)).tolist()


def changes_once(odp: Odp, buf: pm.Region, mr: OdpMr) -> None:
    if not mr.stats.invalidations:
        invalidate(odp.mm, buf.addr)
