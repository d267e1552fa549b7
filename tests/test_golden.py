"""Recordings of a real kernel, replayed: what must be equal, and that differences are accounted for."""

from __future__ import annotations

import ctypes
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from seams import NOT_HERE, needs

import pymirror as pm
from pymirror.replay import Scenario, Summary, load, play, play_all, read_pages

pytestmark = pytest.mark.timeout(240)  # of what is replayed at once

PAGE = 4096
MUST_BE_EQUAL = {"errno", "data", "cpages"}
FIDELITY = Path(__file__).parent.parent / "docs" / "fidelity.md"
ROW = re.compile(r"\| (\w\d+) \| (\w+) \| ([\w, ]+) \| ([^|]+) \|")
HOSTS_OWN = {"fault-around"}
OTHERS = {"split of a vma", "folio shared with a child"}
SURE = {"anon_private", "anon_shared", "hugetlb"}


class Known(NamedTuple):
    """A scenario that differs, as docs/fidelity.md lists it."""

    kind: str
    fields: set[str]
    reason: str


def listed() -> dict[str, Known]:
    rows = ROW.findall(FIDELITY.read_text(encoding="utf-8"))
    return {name: Known(kind, set(fields.split(", ")), reason) for name, kind, fields, reason in rows}


KNOWN = listed()
#: Without these, permissions and where pages are differ in many more.
WITH = ("uffd_kernel", "uffd_events", "wp_async", "move", "pagemap", "pfn")


@cache
def replayed(file: Path) -> Summary:
    return play_all(load(file))


@pytest.fixture(params=["cpu", "scenarios", "coherent"])
def recording(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / f"{request.param}.jsonl"


def scenario_of(golden: Path, name: str) -> Scenario | None:
    every = (one for file in sorted(golden.glob("*.jsonl")) for one in load(file))
    return next((one for one in every if one.id == name), None)


def test_errno_data_and_page_counts_are_equal_in_all(recording: Path) -> None:
    if recording.stem != "cpu":
        needs("uffd_kernel", "move", "pfn")
    wrong = {one.scenario.id: one.fields & MUST_BE_EQUAL for one in replayed(recording).different}
    assert {name: fields for name, fields in wrong.items() if fields} == {}


@pytest.mark.root
def test_every_difference_is_listed_with_its_fields(recording: Path) -> None:
    needs(*WITH)
    found = {one.scenario.id: one.fields for one in replayed(recording).different}
    assert found == {name: KNOWN[name].fields for name in found if name in KNOWN}


@pytest.mark.root
def test_how_many_differ(recording: Path) -> None:
    needs(*WITH)
    results = replayed(recording).results
    sure = [one for one in results if one.scenario.kind in SURE]
    assert sum(bool(one.differing) for one in results) <= 0.05 * len(results)
    assert sum(bool(one.differing) for one in sure) <= 0.01 * len(sure)


@pytest.mark.root
def test_the_raw_page_table_shows_what_is_called_the_hosts_own(recording: Path) -> None:
    needs(*WITH)
    different = {one.scenario.id: one for one in replayed(recording).different}
    called = {name for name in different if name in KNOWN and KNOWN[name].reason in HOSTS_OWN}
    assert {name for name, one in different.items() if one.shown_by_page_table} == called


@pytest.mark.root
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_listed_differs_still(golden: Path, name: str) -> None:
    needs(*WITH)
    scenario = scenario_of(golden, name)
    if scenario is None:
        pytest.skip(f"{NOT_HERE}: no scenario {name} in {golden}")
    if not holds(KNOWN[name].reason):
        pytest.skip(f"{NOT_HERE}: {KNOWN[name].reason} is as it was recorded")
    assert scenario.kind == KNOWN[name].kind
    assert not all(play(scenario).equal for _ in range(3)), "equal now: take it out of docs/fidelity.md"


def test_what_cannot_be_replayed_is_unsupported_and_not_played(recording: Path) -> None:
    for one in replayed(recording).results:
        if one.left_out:
            assert one.scenario.kind == "hugetlb"
        assert bool(one.outcomes) != bool(one.left_out)
        assert not (one.left_out and one.equal)


def test_the_counts_add_up(recording: Path) -> None:
    counts = replayed(recording).json()
    assert list(counts) == ["scenarios", "equal", "unsupported", "differ", "different"]
    assert list(counts["differ"]) == ["errno", "data", "prot", "cpages", "faults"]
    assert counts["scenarios"] == len(load(recording))
    assert counts["scenarios"] == counts["equal"] + counts["unsupported"] + len(counts["different"])
    assert max(counts["differ"].values()) <= len(counts["different"]) <= sum(counts["differ"].values())


@cache
def holds(reason: str) -> bool:
    """Whether this host does what the reason says of it, seen without a scenario."""
    if reason == "fault-around":
        return a_page_on_a_device_ends_fault_around()
    return reason in OTHERS


def a_page_on_a_device_ends_fault_around() -> bool:
    present = []
    for leaves in (False, True):
        with (
            pm.AddressSpace() as mm,
            pm.DeviceMemory(pm.Device("d"), pm.MiB) as vram,
            tempfile.TemporaryFile(dir="/dev/shm") as file,
        ):
            file.truncate(32 * PAGE)
            file.write(bytes(32 * PAGE))
            file.flush()
            with mm.mmap(32 * PAGE, fd=file.fileno()) as region:
                region[0] = 1
                if leaves:
                    assert pm.migrate_to_device(mm, region.addr, region.addr + PAGE, vram) == 1
                ctypes.string_at(region.addr + 16 * PAGE, 1)
                present.append(sum(page.present for page in read_pages(region.addr, 32)))
    return present[1] < present[0]
