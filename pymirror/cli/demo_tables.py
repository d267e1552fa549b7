"""The tables of `pymirror demo`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pymirror.demo.report import Phase, Report, mb_per_second

_PLAIN: Any = {"highlight": False, "soft_wrap": True}
GUARANTEES = ("before", "after", "detected")


def print_report(console: Console, report: Report) -> None:
    for title, table in _tables(report):
        console.print(f"[bold]{title}[/bold]", table, highlight=False)
    for command in dict.fromkeys(missing.command for missing in report.missing):
        names = ", ".join(missing.feature for missing in report.missing if missing.command == command)
        console.print(f"This grants {names}:\n    {escape(command)}", **_PLAIN)
    console.print(_verdict(report), **_PLAIN)


def _tables(report: Report) -> Iterator[tuple[str, Table]]:
    yield (
        "Phases (MB/s of one thread: the device copies and checksums, the CPU only checksums)",
        _phases(report),
    )
    if report.pages:
        when = "at the end" if "end" in report.pages else "after the first fault"
        yield f"Pages of 4 KiB by state, {when}", _pages(report)
    yield "Invalidations that the driver got, by guarantee", _events(report)
    if report.operations:
        yield "Operations under fire, by who made them", _operations(report)
    yield "The device and its driver", _device(report)
    if report.missing:
        yield "What this run had to do without", _missing(report)


def _table(first: str | Sequence[str], *numbers: str) -> Table:
    """Columns of text, then right-aligned ones."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in (first,) if isinstance(first, str) else first:
        table.add_column(name, overflow="fold", min_width=8)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _phases(report: Report) -> Table:
    table = _table("phase", "seconds", "MB", "device MB/s", "CPU MB/s")
    for phase in report.phases:
        mb = phase.bytes / 1e6 if phase.bytes else None
        table.add_row(phase.name, _number(phase.seconds, 2), _number(mb), *_rates(phase))
    return table


def _rates(phase: Phase) -> tuple[str, str]:
    work = phase.work
    if work is None:
        return "-", "-"
    return (
        _number(mb_per_second(work.bytes, work.device_seconds)),
        _number(mb_per_second(work.bytes, work.cpu_seconds)),
    )


def _pages(report: Report) -> Table:
    kinds = list(report.pages.values())[-1]
    table = _table("memory", "MiB", "pages", "valid", "writable", "huge", "zero", "absent")
    for kind, states in kinds.items():
        counts = (states.total, states.valid, states.writable, states.huge, states.zero, states.absent)
        table.add_row(_words(kind), _number(report.memory[kind] / (1 << 20)), *map(_number, counts))
    return table


def _events(report: Report) -> Table:
    table = _table("event", *GUARANTEES)
    for event in sorted({event for event, _ in report.events}):
        counts = (report.events.get((event, guarantee)) for guarantee in GUARANTEES)
        table.add_row(event, *map(_number, counts))
    return table


def _operations(report: Report) -> Table:
    table = _table("operation", "API", "libc", "device")
    groups = [report.operations.get(group, {}) for group in ("api", "raw", "device")]
    for name in dict.fromkeys(name for group in groups for name in group):
        table.add_row(_words(name), *(_number(group.get(name)) for group in groups))
    return table


def _device(report: Report) -> Table:
    table = _table(("what", "which"), "count")
    work = report.work
    rows = [
        *(("device fault", reason, count) for reason, count in sorted(report.faults.items())),
        *(("retry", _words(reason), count) for reason, count in report.retries.items()),
        *(("page table", _words(name), count) for name, count in report.device.items()),
        *(("refused, as it must be", _words(name), count) for name, count in sorted(report.refused.items())),
        ("checksums", "compared", work.chunks),
        ("checksums", "wrong", work.wrong),
        ("accesses", "stale", report.stale),
    ]
    previous = ""
    for what, which, count in rows:
        table.add_row("" if what == previous else what, which, _number(count))
        previous = what
    return table


def _missing(report: Report) -> Table:
    table = _table(("feature", "why", "what is lost"))
    for missing in report.missing:
        table.add_row(missing.feature, missing.reason, missing.lost)
    return table


def _verdict(report: Report) -> str:
    work = report.work
    files, generated = report.from_files / 1e6, report.generated / 1e6
    lines = [
        f"Data: {files:,.0f} MB copied from files of this machine, {generated:,.0f} MB generated; "
        "private file mappings are of the machine's own files."
    ]
    if report.signum:
        lines.append(
            "Interrupted: the tables tell what was done until then; everything is unmapped and closed."
        )
    lines += [f"[red]failure[/red]: {escape(failure)}" for failure in report.failures]
    if report.ok and not work.chunks:
        return "\n".join([*lines, "nothing was compared yet"])
    verdict = "[green]all alike[/green]" if report.ok else "[bold red]FAILED[/bold red]"
    lines.append(
        f"{verdict}: {work.chunks:,} checksums over {work.bytes / 1e9:,.2f} GB, {work.wrong} wrong; "
        f"{report.stale} stale accesses."
    )
    return "\n".join(lines)


def _words(name: str) -> str:
    return name.replace("_", " ")
