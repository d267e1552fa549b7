# SPDX-License-Identifier: MIT
"""`pymirror bench`: what pymirror costs, beside the same work in bare C."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from pymirror.cli.main import EXIT_REFUSED, CommandError, positive_int

_ROOT = Path(__file__).resolve().parent.parent.parent


class BenchCommand:
    """Measure pymirror beside its floor: the same work in bare C, in the same run, in turns.

    Each NAME is a benchmark; * and ? match. A row has the medians of both sides, their ratio, and where that
    lies in 95 of 100 samples drawn from the rounds. Absolute times change with the machine and its load,
    ratios hardly do. docs/performance.md says how it is measured and what was found. What the system refuses
    to this user is left out, and the exit code is 3 then.

    The floors are compiled when they are needed, so this runs in a clone of the project, with a C compiler.

    examples:
      pymirror bench --list
      pymirror bench 'fault-*' --rounds 200
      pymirror bench --json >new.json
      pymirror bench --compare old.json new.json      exit code 1: something has become slower

    --json prints one object:
      machine       what it ran on
      results       list of {name, ours, floor, ratio, spread (where it lies in 95 of 100
                    samples drawn from the rounds), goal (the greatest
                    ratio; null: none), unit (of ours and floor)}
      alternatives  by name, what else one might write: {what: cost in the same unit}
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("names", metavar="NAME", nargs="*", help="only these benchmarks (default: all)")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
        parser.add_argument("--plot", metavar="FILE", help="draw the ratios and goals: .png or .svg")
        parser.add_argument(
            "--rounds", type=positive_int, help="measured rounds of each side (default: each benchmark's own)"
        )
        parser.add_argument(
            "--scale",
            type=positive_int,
            default=1,
            help="divide sizes and counts by this, to see that everything works; no goal is judged then",
        )
        parser.add_argument("--list", action="store_true", help="say what there is, and measure nothing")
        parser.add_argument(
            "--compare",
            metavar=("OLD", "NEW"),
            nargs=2,
            help="compare two files that --json has written, and measure nothing",
        )

    def run(self, args: argparse.Namespace) -> int:
        return int(_benchmarks().run(args))


def _benchmarks() -> Any:
    """benchmarks/command.py of the clone that this package is in."""
    if not (_ROOT / "benchmarks" / "command.py").is_file():
        raise CommandError(
            "the benchmarks are not installed with the package, they compile C sources; do: run it in a clone"
            " of the project, after make",
            EXIT_REFUSED,
        )
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    return importlib.import_module("benchmarks.command")
