"""Results for people, and the machine that they are of."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

import pymirror as pm
from benchmarks.compare import Pair
from benchmarks.measure import Result
from benchmarks.registry import Benchmark


def machine() -> dict[str, Any]:
    with pm.AddressSpace() as mm:
        pfns = "pfn" in mm.features
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "pymirror": pm.__version__,
        "pfns": pfns,
        "load": os.getloadavg()[0],
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor()


def print_list(benchmarks: list[Benchmark]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("goal", justify="right")
    table.add_column("work")
    for one in benchmarks:
        table.add_row(one.name, "" if one.goal is None else f"{one.goal:g}", one.work)
    Console().print(table)


def print_table(results: list[Result]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("benchmark", no_wrap=True)
    for column in ("ours", "floor", "", "ratio", "95 %", "goal"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    for result in results:
        _add(table, result)
    Console().print(table)


def print_pairs(pairs: list[Pair]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("benchmark", no_wrap=True)
    for column in ("old", "new", "change", "goal", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    colors = {"slower": "[red]", "faster": "[green]"}
    for pair in pairs:
        ratios = ["" if one is None else f"{one:.2f}" for one in (pair.old, pair.new, pair.change)]
        goal = "" if pair.goal is None else f"{pair.goal:g}"
        verdict = "" if pair.verdict == "same" else pair.verdict
        table.add_row(pair.name, *ratios, goal, f"{colors.get(pair.verdict, '')}{verdict}")
    Console().print(table)


def _add(table: Table, result: Result) -> None:
    unit = result.benchmark.unit
    color = {None: "", True: "[green]", False: "[red]"}[result.met]
    spread = "-".join(f"{edge:.2f}" for edge in result.spread)
    goal = "" if result.goal is None else f"{result.goal:g}"
    cost, floor = _figure(result.ours), _figure(result.floor)
    table.add_row(result.benchmark.name, cost, floor, unit, f"{color}{result.ratio:.2f}", spread, goal)
    for name, other in result.alternatives.items():
        table.add_row(
            f"  [dim]{name}", f"[dim]{_figure(other)}", "", f"[dim]{unit}", f"[dim]{other / result.floor:.2f}"
        )


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
