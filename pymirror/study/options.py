# SPDX-License-Identifier: MIT
"""What a study may be asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20

MINIMUM_SIZE = MIB
_LARGEST_FORKED = 8 * MIB


@dataclass(frozen=True, slots=True)
class Options:
    """size: bytes that the large workloads go over; chunk: bytes of one device access.

    notifier_span: notifiers and regions are aligned outward to it; 0: what each driver has of its own.
    fault_us, invalidation_us: what a device would take for one of each, added to the model's time; no time
    passes for it. rounds: each figure is measured so often. seed: of data, addresses and order.
    workloads, drivers: names; empty: all.
    """

    size: int = 32 * MIB
    chunk: int = 64 * KIB
    notifier_span: int = 0
    fault_us: float = 20.0
    invalidation_us: float = 5.0
    rounds: int = 5
    seed: int = 1
    workloads: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < MINIMUM_SIZE:
            raise ValueError(f"the size must be at least {MINIMUM_SIZE // MIB} MiB")
        if self.chunk & (self.chunk - 1) or not PAGE <= self.chunk <= self.size // 8:
            raise ValueError(
                "the chunk must be a power of two, at least 4 KiB, at most an eighth of the size"
            )
        if self.notifier_span & (self.notifier_span - 1) or 0 < self.notifier_span < PAGE:
            raise ValueError("the notifier span must be a power of two, at least 4 KiB, or 0")
        if not (0 <= self.fault_us < 1e6 and 0 <= self.invalidation_us < 1e6):
            raise ValueError("the costs of a fault and an invalidation must be between 0 and 10^6 us")
        if not 1 <= self.rounds <= 100:
            raise ValueError("the rounds must be between 1 and 100")
        if self.seed < 0:
            raise ValueError("the seed must not be negative")

    @property
    def pages(self) -> int:
        return self.size // PAGE

    @property
    def small(self) -> int:
        """Bytes of the workloads that go over their memory again and again: a quarter, of whole chunks."""
        return max(self.size // 4 // self.chunk, 2) * self.chunk

    @property
    def forked(self) -> int:
        """Bytes of the workloads that fork."""
        return min(self.small, _LARGEST_FORKED // self.chunk * self.chunk or self.chunk)

    def command(self) -> str:
        """The command line that asks for the same."""
        default = Options()
        words = ["pymirror study"]
        if self.size != default.size:
            words.append(f"--size {self.size}")
        if self.chunk != default.chunk:
            words.append(f"--chunk {self.chunk}")
        if self.notifier_span:
            words.append(f"--notifier-span {self.notifier_span}")
        words += [
            f"--{name.replace('_', '-')} {getattr(self, name)}"
            for name in ("fault_us", "invalidation_us", "rounds", "seed")
            if getattr(self, name) != getattr(default, name)
        ]
        words += [f"--workload {name}" for name in self.workloads]
        words += [f"--driver {name}" for name in self.drivers]
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
