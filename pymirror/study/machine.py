# SPDX-License-Identifier: MIT
"""The machine that figures are of."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from ..features import probe
from ..inspection.procfs import read


@dataclass(frozen=True, slots=True)
class Machine:
    """``missing`` names the features of pymirror that this kernel or user does not have."""

    kernel: str
    cpu: str
    cpus: int
    memory_bytes: int
    python: str
    root: bool
    missing: tuple[str, ...]

    @classmethod
    def own(cls) -> Machine:
        features = probe()
        return cls(
            kernel=f"{platform.system()} {platform.release()}",
            cpu=_cpu(),
            cpus=len(os.sched_getaffinity(0)),
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            python=platform.python_version(),
            root=os.geteuid() == 0,
            missing=tuple(sorted(features.why)),
        )

    def __str__(self) -> str:
        user = "root" if self.root else "an ordinary user"
        return (
            f"{self.kernel}, {self.cpu}, {self.cpus} CPUs, {self.memory_bytes / (1 << 30):.1f} GiB,"
            f" Python {self.python}, as {user}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _cpu() -> str:
    for line in (read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
