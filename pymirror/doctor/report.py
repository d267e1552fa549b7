# SPDX-License-Identifier: MIT
"""All checks together, and the verdict: what works, what does not, and the one command that helps most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .._version import __version__
from ..features import FEATURES, probe
from . import features, kernel, memory, threads, trial
from .check import Check, Status
from .system import Privileges

_NEEDED = ("pagemap", "process_vm")
#: What a user can do, by the checks that it takes.
_ABILITIES = (
    ("mirroring", ("trial", *_NEEDED)),
    ("PFNs (what is mapped, not only that it is)", ("pfn",)),
    ("munmap, mremap and madvise of others told by the kernel", ("uffd_events", "wp_async")),
    ("raw clone() seen", ("event_fork",)),
    ("faults inside system calls", ("uffd_kernel",)),
    ("moving pages", ("move",)),
    ("inline faults", ("sigbus",)),
    ("pinning", ("io_uring", "memlock")),
    ("transparent huge pages", ("thp",)),
    ("hugetlb pages", ("hugetlb",)),
)
#: How much it matters that a check is good, for the choice of the one command; others count 1.
_WEIGHTS = {"trial": 1000, "pagemap": 500, "process_vm": 500, "uffd": 60, "pfn": 40, "wp_async": 30}
_WEIGHTS |= {"uffd_events": 30, "io_uring": 20, "uffd_kernel": 10, "move": 10, "nofile": 10, "memlock": 5}


@dataclass(frozen=True, slots=True)
class Report:
    """``ok``: everything that mirroring needs is there."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        return not self._lacking(("trial", *_NEEDED))

    def works(self) -> list[str]:
        return [what for what, needs in _ABILITIES if not self._lacking(needs)]

    def does_not(self) -> list[str]:
        return [what for what, needs in _ABILITIES if self._lacking(needs)]

    def _lacking(self, names: tuple[str, ...]) -> bool:
        return any(check.status is Status.MISSING for check in self.checks if check.name in names)

    def best_command(self) -> str:
        """The command that mends what matters most; "" when nothing is to be mended."""
        gains: dict[str, int] = {}
        for check in self.checks:
            if check.bad and check.command:
                gains[check.command] = gains.get(check.command, 0) + _WEIGHTS.get(check.name, 1)
        for command in gains:
            gains[command] += self._gained_by_capabilities(command)
        return max(gains, key=lambda command: gains[command], default="")

    def _gained_by_capabilities(self, command: str) -> int:
        """CAP_SYS_PTRACE opens userfaultfd too."""
        if "sys_ptrace" not in command:
            return 0
        refused = [check for check in self.checks if check.status is Status.MISSING]
        uffd = {feature.name for feature in FEATURES if "userfaultfd" in feature.grant}
        return sum(_WEIGHTS.get(check.name, 1) for check in refused if check.name in uffd)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "ok": self.ok,
            "works": self.works(),
            "does_not": self.does_not(),
            "best_command": self.best_command(),
            "checks": [check.to_json() for check in self.checks],
        }


def examine(pid: int | None = None) -> Report:
    """Run every check; ``pid`` names the process whose threads are looked at (default: this one).

    EINVAL for a name in PYMIRROR_DISABLE that is no feature, ESRCH where there is no process ``pid``.
    """
    who = Privileges.own()
    sigbus = threads.check(pid)
    found = probe()
    return Report(
        [
            *kernel.checks(who),
            trial.check(),
            *features.checks(found, who),
            *features.sources(),
            *memory.checks(who),
            sigbus,
        ]
    )
