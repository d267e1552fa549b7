# SPDX-License-Identifier: MIT
"""The study itself: each workload against each driver, round by round."""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Callable

from .. import trace
from .._version import __version__
from ..errors import FeatureError, MirrorError
from ..mm import AddressSpace
from . import contenders
from .contender import Contender
from .machine import Machine
from .options import Options
from .results import Cell, Counts, Report, Times
from .stage import Stage
from .workloads import WORKLOADS, Workload

Progress = Callable[[str, float], None]

#: What a user may not have, rather than a bug.
_REFUSALS = (errno.EPERM, errno.ENOMEM, errno.EMFILE)


def silent(_what: str, _fraction: float) -> None:
    """A Progress that shows nothing."""


def run(options: Options, progress: Progress = silent) -> Report:
    """Run a study. ``progress`` is called with what is being measured and the fraction that is done.

    A driver that this user cannot have is left out with the reason. Other errors are raised.
    """
    begin = time.monotonic()
    report = Report(__version__, options, Machine.own())
    pairs = [
        (workload, driver, Cell(workload.name, driver.name))
        for workload in chosen(options.workloads)
        for driver in contenders.chosen(options.drivers)
    ]
    report.cells = [cell for _, _, cell in pairs]
    steps = len(pairs) * options.rounds
    # Round by round, so that what the machine does meanwhile strikes all drivers alike.
    for number in range(options.rounds):
        for step, (workload, driver, cell) in enumerate(pairs):
            progress(f"{workload.name}: {driver.name}", (number * len(pairs) + step) / steps)
            if cell.left_out is not None:
                continue
            with trace.span(trace.Track.RUN, f"{workload.name}: {driver.name}", None, round=number + 1):
                _measure(workload, driver, options, cell)
    report.seconds = time.monotonic() - begin
    return report


def chosen(names: tuple[str, ...]) -> list[Workload]:
    """The workloads of these names, or all."""
    return [workload for workload in WORKLOADS if not names or workload.name in names]


def _measure(workload: Workload, driver: type[Contender], options: Options, cell: Cell) -> None:
    gc.collect()
    contender = driver(options)
    with AddressSpace() as mm:
        stage = Stage(mm, contender, options)
        contender.open(mm)
        try:
            workload.run(stage)
        except MirrorError as refused:
            if not isinstance(refused, FeatureError) and refused.errno not in _REFUSALS:
                raise
            cell.left_out = str(refused)
            return
        finally:
            contender.close()
        stage.look_behind()
    operations = max(1, stage.counts.operations)
    cell.add(
        Counts(stage.counts, contender.counters()),
        Times(
            cpu=stage.cpu_clock.used / operations / 1e3,
            device=stage.device_clock.used / operations / 1e3,
            elapsed=(stage.cpu_clock.elapsed + stage.device_clock.elapsed) / operations / 1e3,
        ),
    )
