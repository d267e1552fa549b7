# SPDX-License-Identifier: MIT
"""What the figures say, in sentences. Each is chosen by comparing figures, and has those it stands on."""

from __future__ import annotations

from collections.abc import Iterator

from .options import PAGE, Options
from .ranking import BY_COUNTS, Ranked, apart, cost_us, rank
from .results import Cell, Report
from .workloads import WORKLOADS

_MIB = PAGE / (1 << 20)
_LONGEST_FAULT_US = 1000.0


def verdict(report: Report, workload: str) -> list[str]:
    """Sentences on one workload; none where nothing was measured."""
    cells, options = report.of(workload), report.options
    if not cells:
        return []
    ranked = rank(cells, options)
    operation = next(one.operation for one in WORKLOADS if one.name == workload)
    return [
        *_wrong(cells),
        *_first(ranked, options, operation),
        *_tipping(ranked, options),
        *_held(cells),
        *_copied(cells),
        *_cpu_side(cells),
        *_unsteady(cells),
    ]


def _wrong(cells: list[Cell]) -> Iterator[str]:
    for cell in cells:
        assert cell.counts is not None
        stage = cell.counts.stage
        if cell.safe:
            continue
        found = (
            [f"{stage.stale_reads} of {stage.reads} reads gave the device stale bytes"]
            if stage.stale_reads
            else []
        )
        if stage.lost_writes:
            found.append(f"{stage.lost_writes} of {stage.writes} device writes did not reach the CPU")
        if stage.wrong_snapshots:
            found.append(f"{stage.wrong_snapshots} snapshots of children were not what they forked with")
        yield f"{cell.driver} is wrong here: {'; '.join(found)}. It is not ranked."


def _first(ranked: list[Ranked], options: Options, operation: str) -> Iterator[str]:
    safe = [one for one in ranked if one.place is not None]
    if len(safe) < 2:
        return
    first, second, last = safe[0], safe[1], safe[-1]
    if first.by == BY_COUNTS:
        close = [one.cell for one in safe if one.group == first.group]
        names = _listed([cell.driver for cell in close])
        times = _span([cell.total_us(options) for cell in close])
        yield (
            f"{names} are not told apart by time ({times} us for {operation});"
            f" {_by_counts(first.cell, close, options)}."
        )
    else:
        mine = first.cell.total_us(options)
        next_one = min((one.cell for one in safe[1:]), key=lambda cell: cell.total_us(options))
        other = next_one.total_us(options)
        fastest = _most("is the fastest", "took least", options)
        yield (
            f"{first.cell.driver} {fastest}: {_us(mine)} us for {operation}. {next_one.driver} takes"
            f" {other / mine:.1f} times as much ({_us(other)})."
        )
    if last.group > second.group:
        slow = [one.cell for one in safe if one.group == last.group]
        totals = [cell.total_us(options) for cell in slow]
        factor = min(totals) / min(one.cell.total_us(options) for one in safe)
        least = "at least " if len(slow) > 1 else ""
        slowest = _most("are the slowest" if len(slow) > 1 else "is the slowest", "took most", options)
        yield (
            f"{_listed([cell.driver for cell in slow])} {slowest}:"
            f" {_span(totals)} us, {least}{factor:.1f} times the {_most('fastest', 'least', options)}."
        )


def _most(measured: str, once: str, options: Options) -> str:
    """One round says what was, not what is."""
    return measured if options.rounds > 1 else once


def _by_counts(first: Cell, close: list[Cell], options: Options) -> str:
    if all(cost_us(cell, options) == cost_us(first, options) for cell in close):
        return "their counts are equal too, and their order is that of their names"
    return f"by counts {first.driver} comes first: {_why(first, close)}"


def _why(first: Cell, close: list[Cell]) -> str:
    """The counts in which it has the least of all that it is close to."""
    names = {
        "faults": "faults",
        "invalidations": "invalidations",
        "pages_mapped": "pages mapped",
        "copied": "pages copied after forks",
    }
    mine, others = _counted(first), [_counted(cell) for cell in close if cell is not first]
    fewest = [
        f"{mine[key]:,} {name.replace('s', '', 1) if mine[key] == 1 else name}"
        for key, name in names.items()
        if all(mine[key] <= other[key] for other in others)
        and any(mine[key] < other[key] for other in others)
    ]
    return _listed(fewest) if fewest else "the least when all are weighed"


def _counted(cell: Cell) -> dict[str, int]:
    assert cell.counts is not None
    return cell.counts.to_json()


def _tipping(ranked: list[Ranked], options: Options) -> Iterator[str]:
    """At which cost of a device fault the best that mirrors and the best that pins would be equal."""
    safe = [one.cell for one in ranked if one.place is not None]
    pins = [cell for cell in safe if cell.counts and cell.counts.driver.pages_pinned]
    mirrors = [cell for cell in safe if cell.counts and not cell.counts.driver.pages_pinned]
    if not pins or not mirrors:
        return
    pin, mirror = (min(group, key=lambda cell: cell.total_us(options)) for group in (pins, mirrors))
    faults = _per_operation(mirror, "faults") - _per_operation(pin, "faults")
    if faults <= 0 or not apart(pin.total_us(options), mirror.total_us(options)):
        return
    # With faults that cost nothing.
    pin_us, mirror_us = (
        cell.total_us(options) - _per_operation(cell, "faults") * options.fault_us for cell in (pin, mirror)
    )
    if not apart(pin_us, mirror_us):
        return
    if mirror_us > pin_us:
        yield (
            f"That is not what the device takes for a fault: with 0 us for it {mirror.driver} would take"
            f" {_us(mirror_us)} us, {mirror_us / pin_us:.1f} times as much as {pin.driver}."
        )
        return
    tipping = (pin_us - mirror_us) / faults
    # No device takes longer than that: it would say nothing.
    if tipping <= _LONGEST_FAULT_US:
        yield (
            f"{mirror.driver} and {pin.driver} would take the same if the device took {_us(tipping)} us a"
            f" fault (here {options.fault_us:g}); below that {mirror.driver} is faster."
        )


def _held(cells: list[Cell]) -> Iterator[str]:
    alike: dict[tuple[int, int], list[str]] = {}
    for cell in cells:
        counted = _counted(cell)
        alike.setdefault((counted["pinned"], counted["stranded"]), []).append(cell.driver)
    free = alike.pop((0, 0), [])
    for (pinned, stranded), drivers in alike.items():
        of_it = f", {stranded * _MIB:.1f} MiB of it given back by the process already" if stranded else ""
        hold = "holds" if len(drivers) == 1 else "each hold"
        yield (
            f"In the end {_listed(drivers)} {hold} {pinned * _MIB:.1f} MiB that"
            f" the kernel cannot take{of_it}."
        )
    if alike and free:
        yield f"{_listed(free)} {'has' if len(free) == 1 else 'have'} nothing pinned then."


def _copied(cells: list[Cell]) -> Iterator[str]:
    copied = {cell.driver: _counted(cell)["copied"] for cell in cells}
    few, many = min(copied.values()), max(copied.values())
    if many < 2 * few or many - few < 100:
        return
    most, least = ([driver for driver, count in copied.items() if count == bound] for bound in (many, few))
    yield f"Forks had {many:,} pages copied under {_listed(most)}, and {few:,} under {_listed(least)}."


def _cpu_side(cells: list[Cell]) -> Iterator[str]:
    cheapest, dearest = (choose(cells, key=lambda cell: cell.best.cpu) for choose in (min, max))
    # Little of anything is within noise of anything.
    if dearest.best.cpu < 2 * cheapest.best.cpu or dearest.best.cpu - cheapest.best.cpu < 10:
        return
    yield (
        f"Changing memory takes the CPU {_us(dearest.best.cpu)} us under {dearest.driver},"
        f" {_us(cheapest.best.cpu)} under {cheapest.driver}."
    )


def _unsteady(cells: list[Cell]) -> Iterator[str]:
    for cell in cells:
        if cell.differing:
            names = _listed(cell.differing)
            yield f"Rounds of {cell.driver} differ in {names}: these counts are not to be relied on."


def _per_operation(cell: Cell, what: str) -> float:
    assert cell.counts is not None
    return float(getattr(cell.counts.driver, what)) / max(1, cell.counts.stage.operations)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _span(values: list[float]) -> str:
    low, high = _us(min(values)), _us(max(values))
    return low if low == high else f"{low} to {high}"


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
