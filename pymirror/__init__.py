# SPDX-License-Identifier: MIT
"""pymirror: Linux HMM (Heterogeneous Memory Management) for user space.

Write the mirroring part of a device driver in Python, with the kernel's own concepts and names, and run it
against the real memory of this process.
"""

from __future__ import annotations

from ._version import __version__
from .interpreter import refusal as _refusal

if _why := _refusal():
    raise ImportError(_why)

try:
    from ._shim import ffi as _ffi
    from ._shim import lib as _lib
except ImportError as missing:
    raise ImportError(
        f"the native shim is missing or does not load ({missing}); run: make build"
    ) from missing

if (_built := _ffi.string(_lib.pm_version()).decode()) != __version__:
    raise ImportError(f"the native shim is of version {_built}, pymirror is {__version__}; run: make build")

from .adopt import Adopted
from .affected import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from .device import Device
from .device_fault import DeviceFault, FaultReason, StaleAccessError
from .device_memory import DeviceMemory, coherent_pages
from .dma import api as _dma_api
from .dma.api import *  # noqa: F403
from .dma.domain import DirectDomain, DmaDomain, IommuDomain
from .dma.engine import IommuFaultError, IommuFaultReason, StaleDmaError
from .dma.record import DmaMapping
from .errors import FeatureError, MirrorError
from .event import Event, Guarantee, MmuNotifierRange
from .exclusive import (
    DeviceExclusive,
    exclusive_pfns,
    make_device_exclusive,
    make_device_exclusive_range,
)
from .fault_buffer import FaultBuffer, FaultEntry
from .features import Features
from .gup import PinnedPages, pin_user_pages, unpin_user_pages
from .gup_dma import gup_range_dma_map, gup_range_dma_unmap
from .gup_flags import FOLL_GET, FOLL_LONGTERM, FOLL_PIN, FOLL_WRITE
from .hmm import (
    HMM_RANGE_DEFAULT_TIMEOUT,
    Hmm,
    Mirror,
    Range,
    hmm_device_entry_from_pfn,
    hmm_device_entry_to_pfn,
    hmm_range_fault,
    hmm_range_snapshot,
    hmm_vma_fault,
    hmm_vma_range_done,
)
from .hmm_dma import hmm_range_dma_map, hmm_range_dma_unmap
from .hmm_dma_map import (
    HmmDmaMap,
    hmm_dma_map_alloc,
    hmm_dma_map_free,
    hmm_dma_map_pfn,
    hmm_dma_map_pfns,
    hmm_dma_unmap_pfn,
    hmm_dma_unmap_pfns,
)
from .lock import DriverLock
from .migrate import migrate_to_device, migrate_to_system
from .migrate_device import (
    MigrateDevice,
    migrate_device_finalize,
    migrate_device_pages,
    migrate_device_range,
)
from .migrate_pfn import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from .migrate_vma import (
    MIGRATE_VMA_SELECT_DEVICE_COHERENT,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from .mm import AddressSpace
from .notifier import CallbackError, IntervalNotifier, MmuNotifier
from .page_table import PageTable
from .pfn import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_ERROR,
    HMM_PFN_INOUT_FLAGS,
    HMM_PFN_P2PDMA,
    HMM_PFN_P2PDMA_BUS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
    is_device_exclusive_pfn,
    is_device_private_pfn,
)
from .region import Region
from .trace import Trace
from .vma import Vma

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

__all__ = [
    "FOLL_GET",
    "FOLL_LONGTERM",
    "FOLL_PIN",
    "FOLL_WRITE",
    "HMM_PFN_DMA_MAPPED",
    "HMM_PFN_ERROR",
    "HMM_PFN_INOUT_FLAGS",
    "HMM_PFN_P2PDMA",
    "HMM_PFN_P2PDMA_BUS",
    "HMM_PFN_REQ_FAULT",
    "HMM_PFN_REQ_WRITE",
    "HMM_PFN_VALID",
    "HMM_PFN_WRITE",
    "HMM_RANGE_DEFAULT_TIMEOUT",
    "MIGRATE_PFN_MIGRATE",
    "MIGRATE_PFN_SHIFT",
    "MIGRATE_PFN_VALID",
    "MIGRATE_PFN_WRITE",
    "MIGRATE_VMA_SELECT_DEVICE_COHERENT",
    "MIGRATE_VMA_SELECT_DEVICE_PRIVATE",
    "MIGRATE_VMA_SELECT_SYSTEM",
    "MREMAP_DONTUNMAP",
    "MREMAP_FIXED",
    "MREMAP_MAYMOVE",
    "AddressSpace",
    "Adopted",
    "CallbackError",
    "Device",
    "DeviceExclusive",
    "DeviceFault",
    "DeviceMemory",
    "DirectDomain",
    "DmaDomain",
    "DmaMapping",
    "DriverLock",
    "Event",
    "FaultBuffer",
    "FaultEntry",
    "FaultReason",
    "FeatureError",
    "Features",
    "GiB",
    "Guarantee",
    "Hmm",
    "HmmDmaMap",
    "IntervalNotifier",
    "IommuDomain",
    "IommuFaultError",
    "IommuFaultReason",
    "KiB",
    "MiB",
    "MigrateDevice",
    "MigrateVma",
    "Mirror",
    "MirrorError",
    "MmuNotifier",
    "MmuNotifierRange",
    "PageTable",
    "PinnedPages",
    "Range",
    "Region",
    "StaleAccessError",
    "StaleDmaError",
    "Trace",
    "Vma",
    "__version__",
    "coherent_pages",
    "exclusive_pfns",
    "gup_range_dma_map",
    "gup_range_dma_unmap",
    "hmm_device_entry_from_pfn",
    "hmm_device_entry_to_pfn",
    "hmm_dma_map_alloc",
    "hmm_dma_map_free",
    "hmm_dma_map_pfn",
    "hmm_dma_map_pfns",
    "hmm_dma_unmap_pfn",
    "hmm_dma_unmap_pfns",
    "hmm_pfn_to_map_order",
    "hmm_pfn_to_pfn",
    "hmm_range_dma_map",
    "hmm_range_dma_unmap",
    "hmm_range_fault",
    "hmm_range_snapshot",
    "hmm_vma_fault",
    "hmm_vma_range_done",
    "is_device_exclusive_pfn",
    "is_device_private_pfn",
    "make_device_exclusive",
    "make_device_exclusive_range",
    "migrate_device_finalize",
    "migrate_device_pages",
    "migrate_device_range",
    "migrate_pfn",
    "migrate_pfn_to_pfn",
    "migrate_to_device",
    "migrate_to_system",
    "migrate_vma_finalize",
    "migrate_vma_pages",
    "migrate_vma_setup",
    "pin_user_pages",
    "unpin_user_pages",
]
__all__ += _dma_api.__all__
