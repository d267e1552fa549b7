"""What a run of the demonstration found, as plain data: one object, the same for tables and for --json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pymirror.demo.checker import Work
from pymirror.demo.options import Options
from pymirror.demo.pages import PageStates
from pymirror.features import Missing


@dataclass(slots=True)
class Phase:
    """`seconds` by the clock; `work`, if the phase checksummed, has the seconds of its threads."""

    name: str
    seconds: float
    bytes: int = 0
    work: Work | None = None


@dataclass(slots=True)
class Report:
    """events: callbacks by (event, guarantee); operations: by who ("api", "raw", "device"), then name;
    pages: by when ("first fault", "end"), then kind."""

    version: str
    options: Options
    signum: int = 0
    failures: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    from_files: int = 0
    generated: int = 0
    pages: dict[str, dict[str, PageStates]] = field(default_factory=dict)
    events: dict[tuple[str, str], int] = field(default_factory=dict)
    operations: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    stale: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures and self.stale == 0

    @property
    def work(self) -> Work:
        total = Work()
        for phase in self.phases:
            if phase.work is not None:
                total.add(phase.work)
        return total

    def to_json(self) -> dict[str, Any]:
        """The object of `pymirror demo --json`; its schema stands in the command's help."""
        total = self.work
        return {
            "version": self.version,
            "options": asdict(self.options),
            "ok": self.ok,
            "interrupted": self.signum != 0,
            "failures": self.failures,
            "memory": self.memory,
            "data": {"from_files": self.from_files, "generated": self.generated},
            "pages": {
                when: {kind: asdict(states) for kind, states in kinds.items()}
                for when, kinds in self.pages.items()
            },
            "events": [
                {"event": event, "guarantee": guarantee, "count": count}
                for (event, guarantee), count in sorted(self.events.items())
            ],
            "operations": self.operations,
            "device": {"faults": self.faults, **self.device, "refused": self.refused, "stale": self.stale},
            "retries": self.retries,
            "checksums": {"chunks": total.chunks, "bytes": total.bytes, "wrong": total.wrong},
            "phases": [_phase(phase) for phase in self.phases],
            "missing": [asdict(missing) for missing in self.missing],
        }


def mb_per_second(size: int, seconds: float) -> float | None:
    """10^6 bytes a second; None where nothing was measured."""
    return size / seconds / 1e6 if size and seconds > 0 else None


def _phase(phase: Phase) -> dict[str, Any]:
    result: dict[str, Any] = {"name": phase.name, "seconds": phase.seconds, "bytes": phase.bytes}
    if phase.work is not None:
        result["device_mb_s"] = mb_per_second(phase.work.bytes, phase.work.device_seconds)
        result["cpu_mb_s"] = mb_per_second(phase.work.bytes, phase.work.cpu_seconds)
    return result
