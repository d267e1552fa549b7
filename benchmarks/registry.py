"""The list of benchmarks: a name, the work, a goal, and how its sides are set up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

Side = Callable[[], float]
"""Does one round; gives what the work cost, without preparing and checking it, in nanoseconds or bytes."""

Prepare = Callable[[Any], AbstractContextManager["Sides"]]
Fixture = Callable[["Scale"], AbstractContextManager[Any]]

UNITS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "bytes": 1.0}


@dataclass(frozen=True)
class Scale:
    """Divides sizes and counts, so that a smoke test does the same in no time."""

    divisor: int = 1

    def count(self, n: int) -> int:
        return max(n // self.divisor, 1)

    def size(self, n: int, *, multiple: int = 4096) -> int:
        return max(n // self.divisor // multiple, 1) * multiple


@dataclass(frozen=True)
class Sides:
    ours: Side
    floor: Side
    alternatives: dict[str, Side] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """See benchmark() for what the fields mean."""

    name: str
    work: str
    goal: float | None
    unit: str
    rounds: int
    setups: int
    primed: bool
    fixture: Fixture
    prepare: Prepare


@contextmanager
def only_scale(scale: Scale) -> Iterator[Scale]:
    """The fixture of a benchmark that shares nothing with its neighbours."""
    yield scale


_registered: dict[str, Benchmark] = {}


def benchmark(
    name: str,
    *,
    goal: float | None,
    unit: str,
    rounds: int = 41,
    setups: int = 1,
    primed: bool = True,
    fixture: Fixture = only_scale,
) -> Callable[[Prepare], Prepare]:
    """Register a context manager that yields Sides.

    ``goal`` is the greatest ratio of ours to the floor. ``unit`` is that of the printed costs. The ``rounds``
    are spread over this many ``setups`` of all sides, since how memory happens to lie matters. ``primed``: an
    uncounted round of the same side comes before each counted one, so that no side pays for what another did
    to the caches. ``fixture``: what benchmarks in a row share; they are given what it yields.
    """

    def register(prepare: Prepare) -> Prepare:
        work = " ".join((inspect.getdoc(prepare) or "").split())
        assert name not in _registered
        assert work
        assert unit in UNITS
        _registered[name] = Benchmark(name, work, goal, unit, rounds, setups, primed, fixture, prepare)
        return prepare

    return register


def registered() -> dict[str, Benchmark]:
    return dict(_registered)
