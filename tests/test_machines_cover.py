# SPDX-License-Identifier: MIT
"""Which public calls the state machines make; those that none makes are named here, with the reason.

A function counts where a machine has ``pm.function``, a method where it has an attribute of that name.
"""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

from calls import CALLS

TESTS = Path(__file__).parent
MACHINES = ["machine*.py", "model*.py", "test_property.py", "test_dma_machine.py", "test_dma_property.py"]
IMPLIED = {"__len__": "len()", "__getitem__": "[]"}

#: By the reason: names, with wildcards.
ELSEWHERE = {
    "a callback, which the library calls; the machines' drivers have others of its kind": [
        "IntervalNotifier.invalidate_start",
        "IntervalNotifier.invalidate_finish",
        "*.invalidate_range_end",
        "PageTable.access",
    ],
    "it waits for another thread: test_lock.py, test_close.py, test_fault_buffer.py": [
        "AddressSpace.read_lock",
        "Mirror.mm_down_read",
        "DriverLock.acquire",
        "FaultBuffer.*",
    ],
    "it tells of one object what it was made with, or what became of it": [
        "*.native",
        "*.registered",
        "IntervalNotifier.two_pass",
        "IntervalNotifier.update_lock",
        "Mirror.hmm",
        "Mirror.mm_is_alive",
        "Hmm.*",
        "Range.encoding",
        "Range.page_shift",
        "Range.sub",
        "PageTable.check_mm",
        "PageTable.who_mapped",
        "Adopted.view",
        "Trace.*",
        "PinnedPages.pinned_at",
        "PinnedPages.unpinned_at",
        "MigrateVma.pgmap_owner",
        "DmaMapping.*",
        "HmmDmaMap.iova",
        "SwiotlbPool.bus_last",
        "*Domain.mappings",
        "*Domain.mapping_of",
    ],
    "bookkeeping of the library, that its own calls make": ["*Domain.new_cookie", "*Domain.remember"],
    "arithmetic on pfns and addresses: test_encoding.py, test_hmm.py": [
        "hmm_device_entry_*",
        "hmm_pfn_to_*",
        "migrate_pfn*",
        "is_device_exclusive_pfn",
        "sg_dma_*",
    ],
    "the same as another that a machine calls, under an older name or for one entry": [
        "hmm_vma_fault",
        "hmm_vma_range_done",
        "hmm_range_snapshot",
        "hmm_dma_map_pfn",
        "hmm_dma_unmap_pfn",
        "IntervalNotifier.check_retry",
        "Device.dma_read_into",
        "Device.dma_*_sg",
        "dma_*map_page",
        "dma_*map_sgtable",
        "dma_sync_sg_for_*",
        "PageTable.next",
    ],
    "what a device is and can: test_dma_api.py": [
        "dma_get_*",
        "dma_set_*",
        "dma_addressing_limited",
        "dma_max_mapping_size",
        "dma_need_sync",
        "Device.coherent_dma_mask",
        "IommuDomain.reserve",
    ],
    "through dma_map_single() of a device that bounces": ["SwiotlbPool.alloc", "SwiotlbPool.free"],
    "a part of dma_iova_destroy(): test_two_step.py": ["dma_iova_unlink", "dma_use_iova"],
}


def used() -> tuple[set[str], set[str]]:
    """Names after ``pm.``, and all other attributes and methods."""
    functions, attributes = set(), set()
    for path in (path for pattern in MACHINES for path in TESTS.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                attributes.add(node.name)
            elif isinstance(node, ast.Attribute):
                of_package = isinstance(node.value, ast.Name) and node.value.id == "pm"
                (functions if of_package else attributes).add(node.attr)
    return functions, attributes


def missing() -> set[str]:
    functions, attributes = used()
    found = set()
    for name in (call.name for call in CALLS):
        owner, _, method = name.rpartition(".")
        made = method == "__init__" and owner in functions
        if not (name in functions or (owner and method in attributes) or made or method in IMPLIED):
            found.add(name)
    return found


def test_each_public_call_is_in_a_machine_or_has_a_reason() -> None:
    patterns = [pattern for names in ELSEWHERE.values() for pattern in names]
    assert [name for name in sorted(missing()) if not any(fnmatch(name, one) for one in patterns)] == []


def test_no_reason_is_out_of_date() -> None:
    names = missing()
    for reason, patterns in ELSEWHERE.items():
        for pattern in patterns:
            assert any(fnmatch(name, pattern) for name in names), f"{pattern}: {reason}"
