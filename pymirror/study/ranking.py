# SPDX-License-Identifier: MIT
"""The order of the drivers under one workload: by time where times tell, else by what was counted.

Counts are the same in every run, times are not. So drivers whose times are within noise of each other, by a
factor or because their rounds overlap, are put in the order of their counts, and the ranking says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from .options import Options
from .results import Cell

#: Times that differ by less than this factor are within noise, whatever their rounds say.
NOISE = 1.8

#: What a machine of our day takes, to the order of magnitude: for the order of drivers within noise alone.
_FAULT_US, _INVALIDATION_US, _MAP_US, _PIN_US, _COPY_US = 50.0, 20.0, 0.1, 0.2, 1.0

BY_TIME = "time"
BY_COUNTS = "counts"


@dataclass(frozen=True, slots=True)
class Ranked:
    """``place`` from 1 on, None for a driver that gave wrong bytes; ``by``: BY_TIME or BY_COUNTS.

    Drivers of one ``group`` are within noise of each other.
    """

    cell: Cell
    place: int | None
    by: str
    group: int


def rank(cells: list[Cell], options: Options) -> list[Ranked]:
    """The drivers in order, those that gave wrong bytes last."""
    safe = sorted(
        (cell for cell in cells if cell.safe), key=lambda cell: (cell.total_us(options), cell.driver)
    )
    ranked: list[Ranked] = []
    for number, group in enumerate(_groups(safe, options)):
        by = BY_TIME if len(group) == 1 else BY_COUNTS
        for cell in sorted(group, key=lambda cell: (cost_us(cell, options), cell.driver)):
            ranked.append(Ranked(cell, len(ranked) + 1, by, number))
    return ranked + [Ranked(cell, None, BY_TIME, -1) for cell in cells if not cell.safe]


def _groups(cells: list[Cell], options: Options) -> list[list[Cell]]:
    """Cells in the order of their times, each group within noise of its fastest."""
    groups: list[list[Cell]] = []
    for cell in cells:
        if groups and not _tell_apart(groups[-1][0], cell, options):
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def _tell_apart(faster: Cell, slower: Cell, options: Options) -> bool:
    """Whether times put them in order: in all rounds, and by more than noise."""
    total = slower.total_us(options)
    return apart(faster.total_us(options), total) and faster.slowest_us(options) < total


def apart(one: float, other: float) -> bool:
    """Whether two times differ by more than noise."""
    return max(one, other) >= NOISE * min(one, other)


def cost_us(cell: Cell, options: Options) -> float:
    """What was counted, as microseconds of the model and, roughly, of software. Equal in every run."""
    assert cell.counts is not None
    driver, stage = cell.counts.driver, cell.counts.stage
    software = (
        driver.faults * _FAULT_US
        + driver.invalidations * _INVALIDATION_US
        + driver.pages_mapped * _MAP_US
        + driver.pages_pinned * _PIN_US
        + stage.copied * _COPY_US
    )
    return cell.model_us(options) + software / max(1, stage.operations)
