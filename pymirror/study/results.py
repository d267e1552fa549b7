# SPDX-License-Identifier: MIT
"""What a study has found: cells of workload by driver, and the whole as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .contender import DriverCounts
from .machine import Machine
from .options import Options
from .stage import StageCounts

#: Drivers whose known fault the study shows.
MAY_BE_WRONG = ("pinned",)


@dataclass(slots=True)
class Counts:
    """What happened in one round: the study's counts and the driver's."""

    stage: StageCounts
    driver: DriverCounts

    def to_json(self) -> dict[str, int]:
        return {**asdict(self.stage), **asdict(self.driver)}


@dataclass(frozen=True, slots=True)
class Times:
    """Of one round, microseconds an operation.

    ``cpu`` and ``device`` are processor time of the whole process: in changing memory, callbacks included,
    and in registrations, accesses and their faults. ``elapsed`` is time on the wall, of both.
    """

    cpu: float
    device: float
    elapsed: float

    @property
    def measured(self) -> float:
        return self.cpu + self.device


@dataclass(slots=True)
class Cell:
    """One driver under one workload. ``left_out`` says why there are no figures.

    ``counts`` are of the first round; ``differing`` names those that another round had otherwise.
    """

    workload: str
    driver: str
    counts: Counts | None = None
    times: list[Times] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    left_out: str | None = None

    def add(self, counts: Counts, times: Times) -> None:
        """A round."""
        self.times.append(times)
        if self.counts is None:
            self.counts = counts
            return
        first, now = self.counts.to_json(), counts.to_json()
        self.differing += [name for name in first if first[name] != now[name] and name not in self.differing]

    def model_us(self, options: Options) -> float:
        """What a device would have taken for its faults and invalidations, microseconds an operation."""
        if self.counts is None:
            return 0.0
        driver = self.counts.driver
        cost = driver.faults * options.fault_us + driver.invalidations * options.invalidation_us
        return cost / max(1, self.counts.stage.operations)

    @property
    def best(self) -> Times:
        """The fastest round: what else the machine does only adds to times."""
        return min(self.times, key=lambda times: times.measured)

    def total_us(self, options: Options) -> float:
        """Processor time of the fastest round, and the model's: microseconds an operation."""
        return self.best.measured + self.model_us(options)

    def slowest_us(self, options: Options) -> float:
        """The same of the slowest round."""
        return max(times.measured for times in self.times) + self.model_us(options)

    @property
    def safe(self) -> bool:
        """Device, CPU and children saw what they must."""
        if self.counts is None:
            return True
        stage = self.counts.stage
        return not (stage.stale_reads or stage.lost_writes or stage.wrong_snapshots)

    @property
    def left_behind(self) -> int:
        """Pages that the driver had not given back when it was closed."""
        return self.counts.stage.left_behind if self.counts is not None else 0

    def to_json(self, options: Options) -> dict[str, Any]:
        found: dict[str, Any] = {"workload": self.workload, "driver": self.driver, "left_out": self.left_out}
        if self.counts is None:
            return found
        return {
            **found,
            "counts": self.counts.to_json(),
            "differing": self.differing,
            "us_per_operation": {
                "cpu": self.best.cpu,
                "device": self.best.device,
                "model": self.model_us(options),
                "total": self.total_us(options),
                "elapsed": self.best.elapsed,
                "slowest": self.slowest_us(options),
            },
        }


@dataclass(slots=True)
class Report:
    """A study: ``cells`` in order of workloads, then drivers."""

    version: str
    options: Options
    machine: Machine
    cells: list[Cell] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, workload: str) -> list[Cell]:
        """The cells of a workload that have figures."""
        return [cell for cell in self.cells if cell.workload == workload and cell.counts is not None]

    @property
    def as_it_must_be(self) -> bool:
        """Rounds agree, nothing is left mapped or pinned, no driver is wrong that promises not to be."""
        return all(
            not cell.differing and not cell.left_behind and (cell.safe or cell.driver in MAY_BE_WRONG)
            for cell in self.cells
        )

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(cell.workload for cell in self.cells))

    @property
    def drivers(self) -> list[str]:
        return list(dict.fromkeys(cell.driver for cell in self.cells))
