"""Interleaved rounds and what is made of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.registry import UNITS, Benchmark, Side, Sides

RESAMPLINGS = 2000


@dataclass(frozen=True)
class Samples:
    """One cost a round for each side; round i of all sides was measured together."""

    ours: np.ndarray
    floor: np.ndarray
    alternatives: dict[str, np.ndarray]


def measure(
    setup: Callable[[], AbstractContextManager[Sides]], setups: int, rounds: int, *, primed: bool
) -> Samples:
    """The rounds, as evenly as it goes over the setups, with the collector off, as in timeit."""
    setups = min(setups, rounds)
    parts = []
    for number in range(setups):
        gc.collect()
        with setup() as sides, collector_off():
            parts.append(interleave(sides, (rounds + number) // setups, primed=primed))
    return Samples(
        np.concatenate([part.ours for part in parts]),
        np.concatenate([part.floor for part in parts]),
        {name: np.concatenate([part.alternatives[name] for part in parts]) for name in parts[0].alternatives},
    )


def interleave(sides: Sides, rounds: int, *, primed: bool) -> Samples:
    """Ours, floor, ours, floor, ...; then each alternative.

    Apart, as what follows milliseconds of an interpreted loop takes twice its time, primed or not.
    """
    ours, floor = _by_turns([sides.ours, sides.floor], rounds, primed=primed).T
    others = {
        name: _by_turns([side], rounds, primed=primed)[:, 0] for name, side in sides.alternatives.items()
    }
    return Samples(ours, floor, others)


def _by_turns(sides: list[Side], rounds: int, *, primed: bool) -> np.ndarray:
    costs = np.empty((rounds, len(sides)))
    for side in sides:
        side()
    for row in costs:
        for column, side in enumerate(sides):
            if primed:
                side()
            row[column] = side()
    return costs


@contextmanager
def collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def spread_of_ratio(ours: np.ndarray, floor: np.ndarray) -> tuple[float, float]:
    """The ratio of the medians in 95 of 100 samples that are drawn from these rounds (bootstrap).

    Of pairs, as both sides of a round met the same load.
    """
    drawn = np.random.default_rng(0).integers(len(ours), size=(RESAMPLINGS, len(ours)))
    ratios = np.median(ours[drawn], axis=1) / np.median(floor[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Result:
    """Medians in the benchmark's unit; their ratio; as the spread, where it lies if rounds are drawn anew."""

    benchmark: Benchmark
    ours: float
    floor: float
    ratio: float
    spread: tuple[float, float]
    goal: float | None
    alternatives: dict[str, float]

    @classmethod
    def of(cls, benchmark: Benchmark, samples: Samples, *, judged: bool) -> Result:
        unit = UNITS[benchmark.unit]
        ours, floor = float(np.median(samples.ours)), float(np.median(samples.floor))
        low, high = spread_of_ratio(samples.ours, samples.floor)
        others = {name: float(np.median(costs)) / unit for name, costs in samples.alternatives.items()}
        goal = benchmark.goal if judged else None
        return cls(benchmark, ours / unit, floor / unit, ours / floor, (low, high), goal, others)

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio <= self.goal

    def json(self) -> dict[str, Any]:
        return {
            "name": self.benchmark.name,
            "ours": self.ours,
            "floor": self.floor,
            "ratio": self.ratio,
            "spread": list(self.spread),
            "goal": self.goal,
            "unit": self.benchmark.unit,
        }
