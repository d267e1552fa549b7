"""`pymirror bench`, whose options are in pymirror/cli/bench.py."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

from benchmarks import cases, compare, plot, report
from benchmarks.measure import Result, measure
from benchmarks.registry import Benchmark, Scale, registered
from pymirror import MirrorError
from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_USAGE, CommandError


def run(args: argparse.Namespace) -> int:
    cases.load()
    if args.compare:
        return compared(*args.compare, as_json=args.json)
    benchmarks = chosen(args.names)
    if args.list:
        report.print_list(benchmarks)
        return EXIT_OK
    if args.plot:
        plot.check_format(args.plot)
    results = list(measured(benchmarks, Scale(args.scale), args.rounds))
    found = to_json(results)
    if args.plot:
        plot.save(found, args.plot)
    if args.json:
        print_json(found)
    else:
        report.print_table(results)
    return EXIT_OK if len(results) == len(benchmarks) else EXIT_REFUSED


def chosen(names: list[str]) -> list[Benchmark]:
    benchmarks = list(registered().values())
    unknown = [name for name in names if not fnmatch.filter([one.name for one in benchmarks], name)]
    if unknown:
        raise CommandError(f"no benchmark {', '.join(unknown)}; --list names them", EXIT_USAGE)
    return [one for one in benchmarks if not names or any(fnmatch.fnmatch(one.name, name) for name in names)]


def measured(benchmarks: list[Benchmark], scale: Scale, rounds: int | None) -> Iterator[Result]:
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


def to_json(results: list[Result]) -> dict[str, Any]:
    return {
        "machine": report.machine(),
        "results": [one.json() for one in results],
        "alternatives": {one.benchmark.name: one.alternatives for one in results if one.alternatives},
    }


def compared(old: str, new: str, *, as_json: bool) -> int:
    try:
        pairs = compare.pairs(compare.load(old), compare.load(new))
    except ValueError as error:
        raise CommandError(str(error)) from None
    if as_json:
        print_json([pair.json() for pair in pairs])
    else:
        report.print_pairs(pairs)
    return EXIT_FAILURE if any(pair.verdict == "slower" for pair in pairs) else EXIT_OK


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
