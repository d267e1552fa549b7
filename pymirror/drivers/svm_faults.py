# SPDX-License-Identifier: MIT
"""Fault intake of shared virtual memory: a worker that fetches, sorts, coalesces, serves, replays or cancels.

As nouveau's svm does it: the device stalls on what it cannot reach until the driver has it replay.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from ..callback import logger
from ..device import Device
from ..device_fault import DeviceFault
from ..errors import MirrorError, error
from ..fault_buffer import FaultBuffer, FaultEntry, coalesce, strength
from .svm_range import SvmStats

#: Entries of the fault buffer, and how many are served between two replays.
FAULT_BUFFER_SIZE = 256
FAULT_BATCH = 256


class FaultIntake:
    """The fault buffer of ``device`` and its worker. ``serve(fault)`` serves one, or raises.

    EBUSY leaves the fault for the next replay, or is EFAULT with ``busy_is_final``; another error cancels it.
    """

    def __init__(
        self,
        device: Device,
        serve: Callable[[DeviceFault], object],
        stats: SvmStats,
        *,
        timeout: float,
        busy_is_final: bool,
    ) -> None:
        self.device = device
        self.stats = stats
        self.buffer = FaultBuffer(FAULT_BUFFER_SIZE, timeout=timeout)
        self._serve = serve
        self._busy_is_final = busy_is_final
        device.set_fault_handler(self.buffer)
        self._worker = threading.Thread(target=self._work, name=f"{device.name}-svm", daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Cancel what stalls (ESRCH), and join the worker. Idempotent."""
        self.buffer.close()
        self._worker.join()

    def _work(self) -> None:
        while entries := self.buffer.fetch(FAULT_BATCH):
            self.stats.add(batches=1)
            for group in coalesce(entries):
                self._serve_page(group)
            self.buffer.replay()

    def _serve_page(self, group: list[FaultEntry]) -> None:
        """Faults of one page, what asks for most first: what cannot be written may be read still."""
        while group:
            fault = group[0].fault
            refused = self._try(fault)
            if refused is None:
                return
            if refused.errno == errno.EBUSY:
                # Not cancelled: it faults again after the replay.
                self.stats.add(busy=1)
                return
            cancelled = [entry for entry in group if strength(entry.fault) == strength(fault)]
            for entry in cancelled:
                self.buffer.cancel(entry, refused)
            self.stats.add(cancelled=len(cancelled))
            group = group[len(cancelled) :]

    def _try(self, fault: DeviceFault) -> MirrorError | None:
        addr = fault.addr
        try:
            self._serve(fault)
        except MirrorError as refused:
            if refused.errno == errno.EBUSY and self._busy_is_final:
                # To a device EBUSY means again.
                return error(errno.EFAULT, "svm: it does not move here", addr=addr, hint=refused.hint)
            if refused.errno != errno.ENOENT:
                return refused
            # A device knows of memory and of none; vmas are the process's.
            return error(errno.EFAULT, "svm: no vma", addr=addr, hint="map memory there first")
        except Exception:
            logger.exception("%s: serving a fault at %#x failed", self.device.name, addr)
            return error(errno.EIO, "svm: the driver failed", addr=addr, hint="the logger pymirror has it")
        return None
