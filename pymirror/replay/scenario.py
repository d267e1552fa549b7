"""Recorded scenarios: the file format, and the comparison of an outcome with its recording.

A file holds one JSON object a line: ``{"id", "steps": [...], "expect": [...]}``, where ``expect[i]`` is what
step ``i`` gave on the recorded kernel; golden/README.md names the steps. This module runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("errno", "data", "prot", "cpages", "faults")
RUN_LENGTH_FIELDS = frozenset({"data", "prot"})
SUPPORTED_STEPS = frozenset(
    {
        "mmap",
        "munmap",
        "mprotect",
        "madvise",
        "mremap",
        "cpu_write",
        "cpu_read",
        "fork",
        "child_write",
        "reap",
        "dev_read",
        "dev_write",
        "snapshot",
        "migrate_to_dev",
        "migrate_to_sys",
        "exclusive",
        "check_exclusive",
    }
)

Step = Mapping[str, Any]
Outcome = Mapping[str, Any]
Run = Sequence[int]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of a recording."""

    id: str
    steps: Sequence[Step]
    expect: Sequence[Outcome]
    devices: str = "private"

    def unsupported(self) -> str | None:
        """Why this scenario cannot be replayed, or None."""
        if self.devices not in ("private", "coherent"):
            return f"{self.devices} device memory"
        missing = sorted({str(step["op"]) for step in self.steps} - SUPPORTED_STEPS)
        return f"steps {', '.join(missing)}" if missing else None

    @property
    def kind(self) -> str:
        """The kind of the mapping, "" where the scenario makes none."""
        return next((str(step["kind"]) for step in self.steps if step["op"] == "mmap"), "")


class FormatError(ValueError):
    """A file of scenarios that cannot be read: which line, and why."""


def load(path: str | Path) -> list[Scenario]:
    """The scenarios of a file, in its order.

    Raises OSError when it cannot be read, FormatError naming the line that is no scenario.
    """
    scenarios = []
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    scenarios.append(_parse(line, f"{path}:{number}"))
        except UnicodeDecodeError:
            raise FormatError(f"{path}: not text, so no scenarios") from None
    if not scenarios:
        raise FormatError(f"{path}: no scenarios in it")
    return scenarios


def _parse(line: str, where: str) -> Scenario:
    try:
        fields = json.loads(line)
        scenario = Scenario(
            str(fields["id"]), fields["steps"], fields["expect"], str(fields.get("devices", "private"))
        )
        ops = [step["op"] for step in scenario.steps]
    except ValueError as error:
        raise FormatError(f"{where}: not JSON: {error}") from None
    except KeyError as field:
        raise FormatError(f"{where}: not a scenario: it has no field {field}") from None
    except TypeError:
        raise FormatError(f"{where}: not a scenario: not an object with id, steps and expect") from None
    if len(ops) != len(scenario.expect):
        raise FormatError(f"{where}: {len(ops)} steps but {len(scenario.expect)} outcomes")
    return scenario


def expand(runs: Iterable[Run]) -> bytes:
    """The bytes, one a page, that a run-length list stands for."""
    out = bytearray()
    for run in runs:
        value, times = run[0], run[1]
        counts_up = len(run) > 2 and run[2]
        out += bytes((value + i) & 0xFF for i in range(times)) if counts_up else bytes([value]) * times
    return bytes(out)


def compress(values: bytes, counting: bool) -> list[list[int]]:
    """The run-length list of one byte a page; `counting`: also runs that go up by one, as `data` has them."""
    runs: list[list[int]] = []
    for value in values:
        if runs and _extends(runs[-1], value, counting):
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _extends(run: list[int], value: int, counting: bool) -> bool:
    if len(run) == 2 and run[0] == value:
        return True
    if not counting or (run[0] + run[1]) & 0xFF != value:
        return False
    if len(run) == 2 and run[1] == 1:
        run.append(1)
    return len(run) == 3


def differing_fields(expected: Outcome, got: Outcome) -> set[str]:
    """The fields in which the outcome of a step differs from its recording.

    A differing errno is one difference: what a failed step does not give is not counted again.
    """
    if expected.get("errno", 0) != got.get("errno", 0):
        return {"errno"}
    return {field for field in FIELDS if _value(expected, field) != _value(got, field)}


def _value(outcome: Outcome, field: str) -> object:
    value = outcome.get(field)
    if value is None or field not in RUN_LENGTH_FIELDS:
        return value
    return expand(value)


def page_values(outcome: Outcome, field: str) -> bytes:
    """A run-length field of an outcome as one byte a page, empty where the outcome has none."""
    return expand(outcome.get(field) or ())
