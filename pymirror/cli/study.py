# SPDX-License-Identifier: MIT
"""`pymirror study`: mirror or pin?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, CommandError, memory_size, positive_int, size
from pymirror.cli.text import console
from pymirror.cli.tracing import add_trace_option, tracing
from pymirror.study import Options, Report, html, plot, run
from pymirror.study.contenders import CONTENDERS
from pymirror.study.data import to_json
from pymirror.study.ranking import rank
from pymirror.study.runner import Progress as Step
from pymirror.study.runner import silent
from pymirror.study.tables import COLUMNS, legend, row
from pymirror.study.verdict import verdict
from pymirror.study.workloads import WORKLOADS

_WIDEST = 1000


class StudyCommand:
    """Mirror or pin? Run drivers of both kinds on this machine's memory, and compare.

    Drivers that follow the CPU's page table (odp, userptr, svm) and drivers that pin, under six workloads:
    memory that is used once, used again and again, mapped and unmapped by malloc, forked, touched at
    random, and kept by a forked child as a snapshot. The memory, the faults and the pins are real; what the
    device itself would take for a fault or an invalidation is a model, added to its time and never waited.
    Every byte that the device reads is compared with the CPU's: a driver that gives stale ones is not ranked.

    Times are processor time, so that it matters little what else runs. Counts are the same in every run;
    drivers whose times are within noise are ranked by them.

    examples:
      pymirror study                                the default: 32 MiB, five rounds
      pymirror study --plot study.png               the figures as a picture; .svg too
      pymirror study --html report.html             all of it as one page
      pymirror study --fault-us 80 --workload reuse --driver odp --driver pinned
      pymirror study --json | jq .says

    The exit code is 1 when rounds differ in a count, or a driver other than "pinned" gives wrong bytes: that
    one does, where memory is unmapped behind its back.

    --json prints one object:
      version, options, machine, seconds   what ran, where, for how long
      cells      list of {workload, driver, left_out, counts, differing, us_per_operation}: counts of one
                 round (resident, pinned, reclaimable, stranded: pages of 4 KiB at its end; pages_mapped,
                 pages_pinned: pages; others: times), the counts in which rounds differ, and
                 cpu, device (processor time), model, total (of these), elapsed: us an operation of the
                 fastest round; slowest: the total of the slowest
      ranking    by workload, list of {driver, place (null: wrong bytes), by ("time" or "counts")}
      says       by workload, sentences
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        default = Options()
        parser.add_argument(
            "--size", type=memory_size, default=default.size, help="memory of a workload (default: 32M)"
        )
        parser.add_argument(
            "--chunk", type=size, default=default.chunk, help="bytes of one device access (default: 64K)"
        )
        parser.add_argument(
            "--notifier-span",
            type=size,
            default=default.notifier_span,
            help="align notifiers to this size (default: as each driver has it)",
        )
        parser.add_argument(
            "--fault-us",
            type=float,
            default=default.fault_us,
            help=f"what a device fault costs the device, us (default: {default.fault_us:g})",
        )
        parser.add_argument(
            "--invalidation-us",
            type=float,
            default=default.invalidation_us,
            help=f"and an invalidation (default: {default.invalidation_us:g})",
        )
        parser.add_argument(
            "--rounds",
            type=positive_int,
            default=default.rounds,
            help=f"measure each figure so often, and show the fastest (default: {default.rounds})",
        )
        parser.add_argument(
            "--seed", type=int, default=default.seed, help="of data and addresses (default: 1)"
        )
        parser.add_argument(
            "--workload",
            action="append",
            default=[],
            choices=[one.name for one in WORKLOADS],
            help="only this one; may be repeated",
        )
        parser.add_argument(
            "--driver",
            action="append",
            default=[],
            choices=[one.name for one in CONTENDERS],
            help="only this one; may be repeated",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        parser.add_argument("--plot", metavar="FILE", help="draw the figures: .png or .svg")
        parser.add_argument("--html", metavar="FILE", help="write a report that is one page of HTML")
        add_trace_option(parser)

    def run(self, args: argparse.Namespace) -> int:
        options = _options(args)
        # Before the work, not after it.
        if args.plot is not None:
            plot.check_format(args.plot)
            _writable(args.plot)
        if args.html is not None:
            plot.require_matplotlib()
            _writable(args.html)
        with tracing(args.trace), _progress() as progress:
            report = run(options, progress)
        if args.plot is not None:
            plot.save(report, args.plot)
        if args.html is not None:
            Path(args.html).write_text(html.page(report), "utf-8")
        if args.json:
            json.dump(to_json(report), sys.stdout, indent=2)
            print()
        else:
            sys.stdout.write(_text(report))
        return EXIT_OK if report.as_it_must_be else EXIT_FAILURE


def _options(args: argparse.Namespace) -> Options:
    try:
        return Options(
            args.size,
            args.chunk,
            args.notifier_span,
            args.fault_us,
            args.invalidation_us,
            args.rounds,
            args.seed,
            tuple(dict.fromkeys(args.workload)),
            tuple(dict.fromkeys(args.driver)),
        )
    except ValueError as error:
        raise CommandError(str(error), EXIT_USAGE) from None


def _writable(path: str) -> None:
    with open(path, "ab"):
        pass


def _text(report: Report) -> str:
    """In one piece: rich answers a closed pipe with an exit of its own."""
    out = console()
    with out.capture() as capture:
        for workload in WORKLOADS:
            if workload.name in report.workloads:
                table = _table(report, workload.name)
                # Where it is narrower, a terminal breaks lines; a table whose figures are cut is of no use.
                needed = table.__rich_measure__(out, out.options.update(max_width=_WIDEST)).maximum
                out.width = max(out.width, needed)
                out.print(f"[bold]{workload.name}[/bold]: {workload.about}", table, highlight=False)
        out.print(f"[dim]{legend(report.options)}[/dim]\n", soft_wrap=True)
        for cell in report.cells:
            if cell.left_out is not None:
                out.print(f"{cell.workload}: {cell.driver} left out: {escape(cell.left_out)}", soft_wrap=True)
        for workload in WORKLOADS:
            for sentence in verdict(report, workload.name):
                out.print(f"[bold]{workload.name}[/bold]: {escape(sentence)}", soft_wrap=True)
        out.print(f"{escape(str(report.machine))}; {report.seconds:.0f} s", soft_wrap=True)
        out.print(f"again: {escape(report.options.command())}", soft_wrap=True)
    return capture.get()


def _table(report: Report, workload: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for one in rank(report.of(workload), report.options):
        table.add_row(*row(one, report.options), style="red" if one.place is None else "")
    return table


@contextmanager
def _progress() -> Iterator[Step]:
    """Progress on standard error, if that is a terminal."""
    errors = console(stderr=True)
    if not errors.is_terminal:
        yield silent
        return
    columns = (TextColumn("{task.description:32}"), BarColumn(30), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bars:
        task = bars.add_task("", total=1.0)

        def show(what: str, fraction: float) -> None:
            bars.update(task, description=what, completed=fraction)

        yield show
