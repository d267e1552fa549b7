# SPDX-License-Identifier: MIT
"""The order of the drivers under one workload: by time where times tell, else by what was counted.

Counts are the same in every run, times are not. So drivers whose times are within noise of each other, by a
factor or because their rounds overlap, are put in the order of their counts, and the ranking says so. Times
that contradict the counts must be further apart: where noise moves a driver over the first bound, its place
stays what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from .options import Options
from .results import Cell

#: Times that differ by less than this factor are within noise, whatever their rounds say.
NOISE = 1.8
#: And by less than this one, where the counts say that the slower driver comes first.
AGAINST_COUNTS = 3.0

#: What a machine of our day takes, to the order of magnitude: for the order of drivers within noise alone.
_FAULT_US, _INVALIDATION_US, _MAP_US, _PIN_US, _COPY_US = 50.0, 20.0, 0.1, 0.2, 1.0

BY_TIME = "time"
BY_COUNTS = "counts"


@dataclass(frozen=True, slots=True)
class Ranked:
    """``place`` from 1 on, None for a driver that gave wrong bytes; ``by``: BY_TIME or BY_COUNTS.

    Drivers of one ``group`` are not told apart by their times.
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
        for cell in sorted(group, key=lambda cell: _by_counts(cell, options)):
            ranked.append(Ranked(cell, len(ranked) + 1, by, number))
    return ranked + [Ranked(cell, None, BY_TIME, -1) for cell in cells if not cell.safe]


def _groups(cells: list[Cell], options: Options) -> list[list[Cell]]:
    """Cells in the order of their times.

    The first of a group is slower than the first of the group before by more than noise. And no group comes
    before another against the counts of any two of theirs, unless their times are that far apart.
    """
    groups: list[list[Cell]] = []
    for number, cell in enumerate(cells):
        if groups and not (
            _tell_apart(groups[-1][0], cell, options) and _in_order(cells[:number], cells[number:], options)
        ):
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def _in_order(before: list[Cell], after: list[Cell], options: Options) -> bool:
    return all(
        _agree(one, other, options) or _tell_apart(one, other, options)
        for one, other in product(before, after)
    )


def _agree(faster: Cell, slower: Cell, options: Options) -> bool:
    """Whether counts order them as their times do."""
    return _by_counts(faster, options) < _by_counts(slower, options)


def _by_counts(cell: Cell, options: Options) -> tuple[float, str]:
    return cost_us(cell, options), cell.driver


def _tell_apart(faster: Cell, slower: Cell, options: Options) -> bool:
    """Whether times put them in order: in all rounds, and by more than noise."""
    total = slower.total_us(options)
    noise = NOISE if _agree(faster, slower, options) else AGAINST_COUNTS
    return apart(faster.total_us(options), total, noise) and faster.slowest_us(options) < total


def apart(one: float, other: float, noise: float = NOISE) -> bool:
    """Whether two times differ by more than noise."""
    return max(one, other) >= noise * min(one, other)


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
