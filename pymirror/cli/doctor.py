"""`pymirror doctor`: what this kernel, user and machine can do, and the command that grants the rest."""

from __future__ import annotations

import argparse
import json
import sys

from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, positive_int
from pymirror.cli.text import Lines
from pymirror.doctor import Report, Status, examine

_STYLES = {
    Status.OK: "green",
    Status.LIMITED: "yellow",
    Status.MISSING: "bold red",
    Status.UNKNOWN: "magenta",
    Status.INFO: "cyan",
}


class DoctorCommand:
    """Say what this kernel, user and machine can do, what is missing, and the command that grants it.

    Features are tried, not inferred from a version. Nothing is changed. The last two lines are the verdict.

    examples:
      pymirror doctor                       everything
      sudo pymirror doctor                  what root would have
      pymirror doctor --pid 4242            the threads of that process: which of them block SIGBUS
      pymirror doctor --json | jq -r '.checks[] | select(.status == "missing") | .command'

    exit codes:
      0  everything that mirroring needs is there (there may be less than all)
      1  mirroring does not work here
      3  no check possible: no process of that number, a wrong name in PYMIRROR_DISABLE

    --json prints one object:
      version, ok          of pymirror; everything that mirroring needs is there
      works, does_not      lists of what can be done here, and what not
      best_command         the one command that helps most, or ""
      checks               list of
        area, name         what was checked
        status             ok, limited, missing, unknown, info
        value              what was found, in words
        lost, why, command unless all is well: what cannot be done, the reason, what grants it
        data               the same as numbers (sizes in bytes, null: no limit or not known)
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        parser.add_argument(
            "--pid", metavar="PID", type=positive_int, help="look at the threads of this process"
        )

    def run(self, args: argparse.Namespace) -> int:
        report = examine(args.pid)
        if args.json:
            json.dump(report.to_json(), sys.stdout, indent=2)
            print()
        else:
            _print(report)
        return EXIT_OK if report.ok else EXIT_FAILURE


def _print(report: Report) -> None:
    lines = Lines()
    area = ""
    for check in report.checks:
        if check.area != area:
            area = check.area
            lines.add(area, "bold")
        lines.pair(check.status, f"{check.name:15} {check.value}", _STYLES[check.status], width=8)
        for name, text in (("lost", check.lost), ("why", check.why), ("do", check.command)):
            if text:
                lines.add(f"{'':27}{name + ':':5} {text}")
    lines.add()
    lines.add(f"Works here: {'; '.join(report.works()) or 'nothing'}.", "green" if report.ok else "red")
    lines.add(_what_does_not(report))
    lines.write()


def _what_does_not(report: Report) -> str:
    missing, command = report.does_not(), report.best_command()
    text = f"Does not: {'; '.join(missing)}." if missing else "Nothing that pymirror can use is missing."
    return f"{text} What helps most: {command}" if command else text
