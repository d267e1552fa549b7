"""The replay engine: its file format, that it sees differences, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from seams import needs

from pymirror.cli.main import main
from pymirror.replay import (
    FormatError,
    Scenario,
    engine,
    evidence,
    hugepages,
    load,
    play,
    play_all,
    read_pages,
)
from pymirror.replay.child import ForkedChild
from pymirror.replay.evidence import RawPage, shown_by_page_table
from pymirror.replay.scenario import compress, differing_fields, expand

PAGE = 4096
ABSENT = RawPage(False, False, False, False, False, False, False, 0)
SMALL = replace(ABSENT, present=True, exclusive=True, pfn=7)
HUGE = replace(SMALL, huge=True)
ZERO = replace(ABSENT, present=True, zero=True, pfn=3)


def scenario(*steps: Mapping[str, Any], expect: list[dict[str, Any]] | None = None) -> Scenario:
    mapped = {"op": "mmap", "kind": "anon_private", "pages": 4, "prot": "rw"}
    every = [mapped, *steps]
    return Scenario("s", every, expect or [{"errno": 0}] * len(every))


def test_run_lengths_are_those_of_the_recordings(golden: Path) -> None:
    for file in golden.glob("*.jsonl"):
        for outcome in (outcome for one in load(file) for outcome in one.expect):
            for field in ("data", "prot"):
                if field in outcome:
                    assert compress(expand(outcome[field]), counting=field == "data") == outcome[field]


def test_a_counting_run_wraps_at_256() -> None:
    assert expand([[254, 4, 1], [9, 2]]) == bytes([254, 255, 0, 1, 9, 9])


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"id": "a"}',
        '{"id": "a", "steps": [{"op": "fork"}], "expect": []}',
        '{"id": 1, "steps": 2}',
    ],
)
def test_a_line_that_is_no_scenario_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(FormatError, match=r"bad\.jsonl:2"):
        load(file)


@pytest.mark.parametrize(
    ("field", "other"),
    [("errno", "EFAULT"), ("data", [[1, 4]]), ("prot", [[2, 3], [1, 1]]), ("cpages", 3), ("faults", 2)],
)
def test_a_difference_in_each_field_is_seen(field: str, other: object) -> None:
    outcome = {"errno": 0, "data": [[0, 4]], "prot": [[2, 4]], "cpages": 4, "faults": 1}
    assert differing_fields(outcome, dict(outcome)) == set()
    assert differing_fields({**outcome, field: other}, outcome) == {field}


def test_data_written_in_other_runs_is_the_same_data() -> None:
    assert differing_fields({"data": [[1, 2, 1], [3, 2]]}, {"data": [[1, 3, 1], [3, 1]]}) == set()


def test_a_step_that_failed_counts_once() -> None:
    assert differing_fields({"errno": "EFAULT"}, {"errno": 0, "cpages": 4, "faults": 1}) == {"errno"}


def test_a_wrong_expectation_is_found_in_a_replay() -> None:
    steps = (
        {"op": "dev_write", "page": 1, "count": 2, "value": 255, "dev": 1},
        {"op": "cpu_read", "page": 0, "count": 4},
    )
    right = [{"errno": 0}, {"errno": 0, "cpages": 2, "faults": 1}, {"data": [[0, 1], [255, 2, 1], [0, 1]]}]
    assert play(scenario(*steps, expect=right)).equal
    wrong = [*right[:2], {"data": [[0, 1], [255, 2], [0, 1]]}]
    result = play(scenario(*steps, expect=wrong))
    assert result.differing == {2: {"data"}}
    assert len(result.raw[2]) == 4
    assert not result.shown_by_page_table


def test_the_rest_of_a_page_that_the_device_writes_is_0xee() -> None:
    write = {"op": "dev_write", "page": 0, "count": 1, "value": 7, "dev": 0}
    with engine.Stage() as stage:
        stage.play({"op": "mmap", "kind": "anon_private", "pages": 1, "prot": "rw"})
        stage.play(write)
        region = stage._regions[0]
        assert bytes(region[0:PAGE]) == bytes([7]) + bytes([0xEE]) * (PAGE - 1)
        del region


def test_an_unknown_step_makes_a_scenario_unsupported_never_equal() -> None:
    summary = play_all([scenario({"op": "sing", "page": 0, "count": 1, "dev": 0}), scenario({"op": "dance"})])
    assert summary.json()["unsupported"] == 2
    assert summary.json()["equal"] == 0


def test_devices_of_no_kind_are_unsupported() -> None:
    assert play(replace(scenario(), devices="public")).left_out == "public device memory"


def test_a_scenario_that_ends_with_its_child_alive_leaves_nothing() -> None:
    fork = {"op": "fork"}
    write = {"op": "child_write", "page": 0, "count": 1, "value": 3}
    result = play(
        scenario(
            fork,
            write,
            {"op": "cpu_read", "page": 0, "count": 1},
            expect=[{"errno": 0}, {}, {}, {"data": [[0, 1]]}],
        )
    )
    assert result.equal


def test_a_child_that_dies_is_an_error_not_a_hang() -> None:
    child = ForkedChild()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"died writing|is gone"):
        child.write(PAGE, 1, 0)
    child.discard()


def test_a_child_whose_parent_goes_away_ends() -> None:
    child = ForkedChild()
    os.close(child._orders)
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 0
    os.close(child._answers)


@pytest.mark.parametrize(
    ("recorded", "got", "raw", "shown"),
    [
        (0x01, 0x00, ABSENT, True),
        (0x11, 0x06, HUGE, True),
        (0x11, 0x02, SMALL, True),
        (0x01, 0x02, SMALL, False),
        (0x00, 0x01, ABSENT, False),
        (0x02, 0x00, SMALL, False),
        (0x11, 0x01, ZERO, False),
        (0x05, 0x06, HUGE, False),
    ],
)
def test_the_raw_page_table_must_be_what_differs(recorded: int, got: int, raw: RawPage, shown: bool) -> None:
    assert shown_by_page_table(bytes([recorded, 0]), bytes([got, 0]), [raw, ABSENT]) is shown


@pytest.mark.root
def test_raw_pages_are_what_the_kernel_says() -> None:
    needs("pagemap_scan", "pfn")
    with engine.Stage() as stage:
        stage.play({"op": "mmap", "kind": "anon_private", "pages": 3, "prot": "rw"})
        stage.play({"op": "cpu_write", "page": 0, "count": 1, "value": 1})
        stage.play({"op": "cpu_read", "page": 1, "count": 1})
        written, zero, absent = read_pages(stage._addr, 3)
    assert (written.present, written.zero, written.exclusive) == (True, False, True)
    assert (zero.present, zero.zero) == (True, True)
    assert absent == evidence.RawPage(False, False, False, False, False, False, False, 0)


def test_huge_pages_that_may_not_be_had_leave_a_scenario_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Refusing:
        def read_text(self) -> str:
            return "0\n"

        def write_text(self, text: str) -> None:
            raise PermissionError(text)

    monkeypatch.setattr(hugepages, "_OVERCOMMIT", Refusing())
    monkeypatch.setattr(hugepages, "_pool", lambda: dict.fromkeys(("Free", "Rsvd", "Surp"), 0))
    huge = Scenario("h", [{"op": "mmap", "kind": "hugetlb", "pages": 512, "prot": "rw"}], [{"errno": 0}])
    counts = play_all([huge, scenario()]).json()
    assert (counts["equal"], counts["unsupported"], counts["different"]) == (1, 1, [])


class TestCommand:
    def test_json_is_one_object(
        self, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "one.jsonl"
        lines = (golden / "cpu.jsonl").read_text().splitlines()
        file.write_text("\n".join(lines[:3]))
        assert main(["replay", str(file), "--json"]) in (0, 1)
        assert json.loads(capsys.readouterr().out)["scenarios"] == 3

    def test_a_difference_that_no_page_table_shows_is_exit_code_1(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "wrong.jsonl"
        steps = [*scenario({"op": "cpu_read", "page": 0, "count": 4}).steps]
        file.write_text(json.dumps({"id": "w", "steps": steps, "expect": [{"errno": 0}, {"data": [[5, 4]]}]}))
        assert main(["replay", str(file), "--verbose"]) == 1
        out = capsys.readouterr().out
        assert "recorded" in out
        assert "raw" in out

    def test_an_unknown_id_and_a_bad_file_are_messages(self, golden: Path, tmp_path: Path) -> None:
        assert main(["replay", str(golden / "cpu.jsonl"), "--show", "nobody"]) == 2
        assert main(["replay", str(tmp_path / "absent.jsonl")]) == 3
        bad = tmp_path / "bad.jsonl"
        bad.write_text("{}\n")
        assert main(["replay", str(bad)]) == 2
