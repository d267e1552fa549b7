"""A checker of trace files: what the Chrome trace format asks for, and what a row of a time line must be."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]

REQUIRED = {
    "X": {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"},
    "B": {"name", "cat", "ph", "ts", "pid", "tid", "args"},
    "i": {"name", "cat", "ph", "ts", "pid", "tid", "args", "s"},
    "M": {"name", "ph", "ts", "pid", "tid", "args"},
}


def load(path: Path) -> list[Event]:
    """The events of a file that is well-formed: see check()."""
    document = json.loads(path.read_text())
    assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
    events: list[Event] = document["traceEvents"]
    check(events)
    return events


def check(events: list[Event]) -> None:
    for event in events:
        assert set(event) == REQUIRED[event["ph"]], event
        assert event["ts"] >= 0, event
        assert event.get("dur", 0) >= 0, event
    named = rows(events)
    for row, about in by_row(events).items():
        assert row in named, "a row without a name"
        assert {event["cat"] for event in about} == {named[row].partition(":")[0]}
        check_nesting(about)
        check_order(about)


def rows(events: list[Event]) -> dict[tuple[int, int], str]:
    """The name of each row, by (pid, tid)."""
    names = {}
    for event in events:
        if event["ph"] == "M" and event["name"] == "thread_name":
            key = event["pid"], event["tid"]
            assert key not in names, "a row with two names"
            names[key] = event["args"]["name"]
    return names


def by_row(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    found = defaultdict(list)
    for event in events:
        if event["ph"] != "M":
            found[event["pid"], event["tid"]].append(event)
    return found


def check_nesting(events: list[Event]) -> None:
    """Spans of a row lie one behind the other, or one in the other."""
    ends: list[float] = []
    for event in sorted(spans(events), key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        end = event["ts"] + event["dur"]
        # Nanoseconds in a float of microseconds: what is equal may differ in the last place.
        assert not ends or end <= ends[-1] + 0.001, event
        ends.append(end)


def check_order(events: list[Event]) -> None:
    """A row's events are written when they end, so in the order of their ends."""
    ends = [event["ts"] + event.get("dur", 0) for event in events if event["ph"] != "B"]
    assert all(earlier <= later + 0.001 for earlier, later in itertools.pairwise(ends))


def spans(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def of_track(events: list[Event], track: str) -> list[Event]:
    return [event for event in events if event.get("cat") == track]
