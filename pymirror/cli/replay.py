"""`pymirror replay`: recorded scenarios of a real kernel, on this host's memory."""

from __future__ import annotations

import argparse
import json
import sys

from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, CommandError
from pymirror.cli.tracing import add_trace_option, tracing
from pymirror.features import probe
from pymirror.replay import FIELDS, FormatError, Result, Scenario, Summary, describe, load, play_all


class ReplayCommand:
    """Replay recorded scenarios and compare: errno, data, protections, page counts, faults.

    Each FILE holds one scenario a line: steps of the CPU and of devices, and what a real kernel gave for
    each. They run on this process's real memory. Scenarios with steps that cannot be replayed are counted
    as unsupported, never as equal.

    A difference in `prot` is the host's own doing when the raw page table (pagemap, PAGEMAP_SCAN) itself is
    not what was recorded: these are marked `host`, and --show prints that evidence. The exit code is 1 when
    anything else differs, 2 for a file that holds no scenarios and an unknown ID.

    examples:
      pymirror replay tests/golden/cpu.jsonl
      pymirror replay tests/golden/cpu.jsonl --show 12
      pymirror replay tests/golden/*.jsonl --json | jq .differ

    --json prints one object: scenarios, equal, unsupported, differ (how many scenarios differ in each field)
    and different (their ids).
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("files", metavar="FILE", nargs="+", help="scenarios, one JSON object a line")
        parser.add_argument("--json", action="store_true", help="print the counts as one JSON object")
        parser.add_argument(
            "--verbose", action="store_true", help="print every differing step with its evidence"
        )
        add_trace_option(parser)
        parser.add_argument(
            "--show",
            metavar="ID",
            action="append",
            default=[],
            help="play only this scenario and print every step",
        )

    def run(self, args: argparse.Namespace) -> int:
        scenarios = _chosen(_load(args.files), args.show)
        with tracing(args.trace):
            summary = play_all(scenarios)
        if args.json:
            json.dump(summary.json(), sys.stdout)
            print()
        else:
            _print(summary, every_step=bool(args.show), evidence=args.verbose or bool(args.show))
        explained = all(result.shown_by_page_table for result in summary.different)
        return EXIT_OK if explained else EXIT_FAILURE


def _load(files: list[str]) -> list[Scenario]:
    try:
        return [scenario for name in files for scenario in load(name)]
    except FormatError as error:
        raise CommandError(
            f"EINVAL: {error}; do: give files of one JSON object a line, as tests/golden/README.md has them",
            EXIT_USAGE,
        ) from None


def _chosen(scenarios: list[Scenario], ids: list[str]) -> list[Scenario]:
    if not ids:
        return scenarios
    unknown = set(ids) - {scenario.id for scenario in scenarios}
    if unknown:
        raise CommandError(
            f"ENOENT: no scenario {', '.join(sorted(unknown))} in these files;"
            ' do: give an id, the "id" of a line',
            EXIT_USAGE,
        )
    return [scenario for scenario in scenarios if scenario.id in ids]


def _print(summary: Summary, *, every_step: bool, evidence: bool) -> None:
    if evidence:
        for result in summary.results if every_step else summary.different:
            _print_steps(result, every_step)
    counts = summary.json()
    print(f"{'scenarios':12}{counts['scenarios']:6}")
    print(f"{'equal':12}{counts['equal']:6}")
    print(f"{'unsupported':12}{counts['unsupported']:6}")
    for name in FIELDS:
        print(f"{'differ in' if name == FIELDS[0] else '':12}{counts['differ'][name]:6}  {name}")
    for result in summary.different:
        whose = "host" if result.shown_by_page_table else "different"
        print(
            f"{whose:12}{result.scenario.id:>6}  {result.scenario.kind}: {', '.join(sorted(result.fields))}"
        )
    if summary.different and "pfn" not in (features := probe()):
        # Not a fault of the library's: the zero page, huge pages and copy-on-write breaks show by PFNs.
        print(f"without PFNs prot and faults cannot be judged; do: {features.missing('pfn').command}")
    for reason, number in sorted(_reasons(summary).items()):
        print(f"{'left out':12}{number:6}  {reason}")


def _reasons(summary: Summary) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for result in summary.unsupported:
        reason = str(result.left_out)
        reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def _print_steps(result: Result, every_step: bool) -> None:
    scenario = result.scenario
    print(f"{scenario.id}: {scenario.kind}" + (f", left out: {result.left_out}" if result.left_out else ""))
    for index, (step, outcome) in enumerate(zip(scenario.steps, result.outcomes, strict=False)):
        differs = index in result.differing
        if not (every_step or differs):
            continue
        arguments = " ".join(f"{key}={value}" for key, value in step.items() if key != "op")
        print(f"  {index:3} {step['op']} {arguments}")
        if outcome:
            print(f"        {'got' if differs else 'equal':8} {json.dumps(outcome)}")
        if differs:
            print(f"        {'recorded':8} {json.dumps(scenario.expect[index])}")
            for line in describe(result.raw.get(index, [])):
                print(f"        {'raw':8} {line}")
    print()
