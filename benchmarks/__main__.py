"""`python -m benchmarks [NAME...] [--json] [--rounds N]`"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby

from benchmarks import cases, report
from benchmarks.measure import Result, measure
from benchmarks.registry import Benchmark, Scale, registered
from pymirror import MirrorError

#: What the system refuses to this user (pins beyond RLIMIT_MEMLOCK, say) is left out, the others are run.
EXIT_LEFT_OUT = 3


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure pymirror against bare C doing the same work, interleaved.",
    )
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="only these benchmarks; * and ? match (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--rounds", type=positive, help="measured rounds of each side (default: each benchmark's own)"
    )
    parser.add_argument(
        "--scale",
        type=positive,
        default=1,
        help="divide sizes and counts by this, to see that everything works; no goal is judged then",
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and measure nothing")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def chosen(names: list[str]) -> list[Benchmark]:
    benchmarks = list(registered().values())
    for name in names:
        if not fnmatch.filter(registered(), name):
            raise SystemExit(f"no benchmark {name!r}; --list names them")
    return [one for one in benchmarks if not names or any(fnmatch.fnmatch(one.name, name) for name in names)]


def run(benchmarks: list[Benchmark], scale: Scale, rounds: int | None) -> Iterator[Result]:
    for fixture, group in groupby(benchmarks, key=lambda one: one.fixture):
        with fixture(scale) as shared:
            for one in group:
                try:
                    with progress(one.name):
                        setup = partial(one.prepare, shared)
                        samples = measure(setup, one.setups, rounds or one.rounds, primed=one.primed)
                except MirrorError as refused:
                    print(f"left out: {one.name}: {refused}", file=sys.stderr)
                    continue
                yield Result.of(one, samples, judged=scale.divisor == 1)


@contextmanager
def progress(name: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    cases.load()
    benchmarks = chosen(args.names)
    if args.list:
        report.print_list(benchmarks)
        return 0
    results = list(run(benchmarks, Scale(args.scale), args.rounds))
    if args.json:
        found = {"machine": report.machine(), "results": [one.json() for one in results]}
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        report.print_table(results)
    return 0 if len(results) == len(benchmarks) else EXIT_LEFT_OUT


if __name__ == "__main__":
    sys.exit(main())
