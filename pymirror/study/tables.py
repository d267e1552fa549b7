# SPDX-License-Identifier: MIT
"""The columns of a study's tables, as text."""

from __future__ import annotations

from .options import PAGE, Options
from .ranking import Ranked

COLUMNS = (
    "driver",
    "rank",
    "by",
    "us",
    "CPU",
    "device",
    "model",
    "elapsed",
    "faults",
    "invalid.",
    "retries",
    "mapped",
    "copied",
    "pinned",
    "free",
    "stale",
)

_LEGEND = (
    "in all; processor time in changing memory (CPU) and in driver and device; the model's;"
    " and what elapsed, without the model. Counts of a round: device faults, invalidations, retries; pages"
    " mapped for the device, and copied after forks. MiB at its end: pinned, and free for the kernel to take."
    " stale: reads that gave the device wrong bytes"
)
_MIB = PAGE / (1 << 20)


def which_round(options: Options) -> str:
    """Whose times are shown: one round has none to be compared with."""
    return "the only round" if options.rounds == 1 else f"the fastest of {options.rounds} rounds"


def legend(options: Options) -> str:
    """What the columns have."""
    return f"us an operation, in {which_round(options)}: {_LEGEND}"


def row(one: Ranked, options: Options) -> tuple[str, ...]:
    """A line of the table; legend() says what it has."""
    cell = one.cell
    assert cell.counts is not None
    stage, driver = cell.counts.stage, cell.counts.driver
    return (
        cell.driver,
        "wrong" if one.place is None else str(one.place),
        "-" if one.place is None else one.by,
        _time(cell.total_us(options)),
        _time(cell.best.cpu),
        _time(cell.best.device),
        _time(cell.model_us(options)),
        _time(cell.best.elapsed),
        f"{driver.faults:,}",
        f"{driver.invalidations:,}",
        f"{driver.retries:,}",
        f"{driver.pages_mapped:,}",
        f"{stage.copied:,}",
        f"{stage.pinned * _MIB:.1f}",
        f"{stage.reclaimable * _MIB:.1f}",
        f"{stage.stale_reads:,}",
    )


def _time(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
