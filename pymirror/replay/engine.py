"""Plays scenarios and sums up how their outcomes compare with the recording."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from .evidence import RawPage, shown_by_page_table
from .hugepages import overcommit
from .scenario import FIELDS, Scenario, differing_fields, page_values
from .stage import Stage


@dataclass(slots=True)
class Result:
    """What a scenario gave, as recordings write it, and the raw page table after each step that differs."""

    scenario: Scenario
    left_out: str | None = None
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    differing: dict[int, set[str]] = field(default_factory=dict)
    raw: dict[int, list[RawPage]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether every step gave what was recorded; a scenario that was not played is never equal."""
        return self.left_out is None and not self.differing

    @property
    def fields(self) -> set[str]:
        """The fields that differ in some step."""
        return set().union(*self.differing.values())

    @property
    def shown_by_page_table(self) -> bool:
        """Whether the raw page table accounts for every difference (evidence.shown_by_page_table)."""
        return bool(self.differing) and all(self._shown(index) for index in self.differing)

    def _shown(self, index: int) -> bool:
        if self.differing[index] != {"prot"}:
            return False
        recorded = page_values(self.scenario.expect[index], "prot")
        got = page_values(self.outcomes[index], "prot")
        return shown_by_page_table(recorded, got, self.raw[index])


@dataclass(slots=True)
class Summary:
    """The counts of a replay; `json()` is what `pymirror replay --json` prints."""

    results: list[Result]

    @property
    def unsupported(self) -> list[Result]:
        """Scenarios that were not played, each with its reason."""
        return [result for result in self.results if result.left_out is not None]

    @property
    def different(self) -> list[Result]:
        """Scenarios of which some step differs from the recording."""
        return [result for result in self.results if result.differing]

    def json(self) -> dict[str, Any]:
        """Counts of scenarios; `differ` counts a scenario once in every field in which it differs."""
        different = self.different
        return {
            "scenarios": len(self.results),
            "equal": sum(result.equal for result in self.results),
            "unsupported": len(self.unsupported),
            "differ": {name: sum(name in result.fields for result in different) for name in FIELDS},
            "different": [result.scenario.id for result in different],
        }


def play(scenario: Scenario) -> Result:
    """Play one scenario in an address space of its own. What cannot be played is left out with its reason."""
    result = Result(scenario, scenario.unsupported())
    if result.left_out is not None:
        return result
    with Stage(scenario.id, scenario.devices) as stage:
        for index, (step, expected) in enumerate(zip(scenario.steps, scenario.expect, strict=True)):
            outcome = stage.play(step)
            result.outcomes.append(outcome)
            fields = differing_fields(expected, outcome)
            if fields:
                result.differing[index] = fields
            if fields and not stage.mapped:
                # Later steps would touch memory that is not there.
                break
            if fields:
                result.raw[index] = stage.raw_pages(step)
    return result


def play_all(scenarios: Iterable[Scenario]) -> Summary:
    """Play scenarios in order. Those of hugetlb pages are left out where there are none to be had."""
    results = []
    with ExitStack() as stack:
        refused: str | None = None
        asked = False
        for scenario in scenarios:
            if scenario.kind == "hugetlb" and not asked:
                asked = True
                refused = stack.enter_context(overcommit())
            if scenario.kind == "hugetlb" and refused is not None:
                results.append(Result(scenario, refused))
            else:
                results.append(play(scenario))
    return Summary(results)
