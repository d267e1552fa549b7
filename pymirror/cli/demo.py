"""`pymirror demo`: the main job on real memory, with progress and tables."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pymirror.cli.demo_tables import print_report
from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, CommandError, memory_size
from pymirror.cli.text import console
from pymirror.cli.tracing import add_trace_option, tracing
from pymirror.demo import Demo, Options, Report, Stop
from pymirror.demo import runner as demo_runner

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DemoCommand:
    """Mirror real data in a device while threads change the memory, and compare every checksum.

    Files of this machine and generated arrays are put into every kind of memory: private and shared,
    anonymous and file-backed, 4 KiB and huge pages. A software device checksums them through its own page
    table, filled by device faults that a driver serves with HMM's retry loop. Meanwhile CPU threads write,
    munmap, mprotect, madvise, mremap and fork through the API, and one more thread does so with plain libc
    calls. Each checksum of the device is compared with the CPU's own: a wrong one, or an access through a
    stale entry, makes the exit code 1.

    examples:
      pymirror demo                         the default: 256 MiB, 6 s under fire
      pymirror demo --size 1G --seconds 60  more memory, for longer
      pymirror demo --json | jq .phases     the same as data

    --json prints one object:
      version, options   what ran
      ok, interrupted    no failure was found; a signal ended the run early
      failures           sentences, one a failure
      memory             bytes by kind of memory
      data               bytes from_files of this machine, and generated
      pages              by time ("first fault", "end"), then by kind: 4 KiB pages total, valid, writable,
                         huge, zero (null where PFNs cannot be read), absent
      events             list of {event, guarantee, count}: the driver's callbacks
      operations         how many of each: api (through the library), raw (libc calls), device
      device             faults by reason, refused (as it must be), pages_mapped, entries_cleared, stale,
                         reads_redone (an invalidation passed), changes_detected (of which no event told)
      retries            EAGAIN, EBUSY, map_refused, window_halved: what sent the driver's loop round again
      checksums          chunks, bytes, wrong
      phases             list of {name, seconds, bytes, device_mb_s, cpu_mb_s}; the rates, where checksums
                         were taken, are 10^6 bytes per second of one thread's time: copy and checksum by
                         the device, checksum only by the CPU
      missing            list of {feature, errno, reason, lost, command}: the command grants the feature
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        default = Options()
        parser.add_argument(
            "--size", type=memory_size, default=default.size, help="memory to mirror (default: 256M)"
        )
        parser.add_argument(
            "--seconds",
            type=float,
            default=default.seconds,
            help=f"length of the phase under fire (default: {default.seconds:g})",
        )
        parser.add_argument(
            "--threads",
            type=int,
            default=default.threads,
            help=f"CPU threads that change memory through the API (default: {default.threads})",
        )
        parser.add_argument(
            "--seed", type=int, default=default.seed, help="of data and operations (default: 1)"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        add_trace_option(parser)

    def run(self, args: argparse.Namespace) -> int:
        try:
            options = Options(args.size, args.seconds, args.threads, args.seed)
        except ValueError as error:
            raise CommandError(str(error), EXIT_USAGE) from None
        with tracing(args.trace):
            report = _run(options)
        if args.json:
            json.dump(report.to_json(), sys.stdout, indent=2)
            print()
        else:
            sys.stdout.write(_tables(report))
        if not report.ok:
            return EXIT_FAILURE
        return 128 + report.signum if report.signum else EXIT_OK


def _tables(report: Report) -> str:
    """In one piece: rich answers a closed pipe with an exit of its own."""
    out = console()
    with out.capture() as capture:
        print_report(out, report)
    return capture.get()


def _run(options: Options) -> Report:
    stop = Stop()
    with _stopping_at_signals(stop), _progress() as progress:
        return Demo(options, stop, progress).run()


@contextmanager
def _stopping_at_signals(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C ends the run in order; a second one interrupts whatever hangs."""

    def ask(signum: int, _frame: object) -> None:
        stop.request(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    for signum in STOP_SIGNALS:
        signal.signal(signum, ask)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _progress() -> Iterator[demo_runner.Progress]:
    """Progress on standard error, if that is a terminal."""
    errors = console(stderr=True)
    if not errors.is_terminal:
        yield demo_runner.silent
        return
    columns = (
        TextColumn("{task.description:20}"),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=errors, transient=True) as bars:
        task = bars.add_task("", total=1.0, note="")

        def show(phase: str, fraction: float, note: str) -> None:
            bars.update(task, description=phase, completed=min(fraction, 1.0), note=note)

        yield show
