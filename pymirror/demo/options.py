"""What a run of the demonstration may be asked for, and how it is asked to stop."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """size: bytes to mirror; seconds: length of the phase under fire; seed: of data and operations.

    threads: CPU threads that change memory through the API; one more does so behind the library's back.
    """

    size: int = 256 * MIB
    seconds: float = 6.0
    threads: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        if self.size < MINIMUM_SIZE:
            raise ValueError(
                f"the size must be at least {MINIMUM_SIZE // MIB} MiB, so that each kind of memory is there"
            )
        if not 0 <= self.seconds <= 86400:
            raise ValueError("the seconds must be between 0 and 86400")
        if not 1 <= self.threads <= 64:
            raise ValueError("the threads must be between 1 and 64")
        if self.seed < 0:
            raise ValueError("the seed must not be negative")


MINIMUM_SIZE = 32 * MIB


class Stop:
    """A request to end early. A plain store, so that a signal handler may make it: it can take no lock."""

    def __init__(self) -> None:
        self.signum = 0

    @property
    def requested(self) -> bool:
        return self.signum != 0

    def request(self, signum: int, _frame: object = None) -> None:
        self.signum = signum
