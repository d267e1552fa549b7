"""`pymirror study`: counts that are the same in every run, sums that agree, sentences that figures carry."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import traces
from hypothesis import given
from hypothesis import strategies as st
from seams import needs

from pymirror.cli.study import StudyCommand, _options
from pymirror.study import Cell, Machine, Options, Report
from pymirror.study.contender import DriverCounts
from pymirror.study.contenders import CONTENDERS
from pymirror.study.options import MIB
from pymirror.study.ranking import AGAINST_COUNTS, BY_COUNTS, BY_TIME, NOISE, cost_us, rank
from pymirror.study.results import Counts, Times
from pymirror.study.stage import StageCounts
from pymirror.study.verdict import verdict
from pymirror.study.workloads import MALLOCS, WORKLOADS

pytestmark = pytest.mark.timeout(240)

RUN = (sys.executable, "-m", "pymirror.cli", "study")
SMALL = ("--size", "1M", "--chunk", "16K")
DRIVERS = [one.name for one in CONTENDERS]
PINS = {"pinned", "pinned-notified"}
Json = dict[str, Any]


def study(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *SMALL, *args], capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    """Two runs in processes of their own, the second with two rounds and all that it can write."""
    needs("uffd_events", "pagemap", "populate", "process_vm", "io_uring")
    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp("study")
        names = {"trace": "trace.json", "plot": "study.png", "html": "study.html"}
        files = [f"--{option}={folder / name}" for option, name in names.items()] if number else []
        done = study("--json", f"--rounds={1 + number}", *files)
        assert (done.returncode, done.stderr) == (0, "")
        found.append({**json.loads(done.stdout), "folder": folder})
    return found


def cells(run: Json) -> dict[tuple[str, str], Json]:
    return {(cell["workload"], cell["driver"]): cell for cell in run["cells"]}


def test_every_driver_ran_under_every_workload(runs: list[Json]) -> None:
    assert set(cells(runs[0])) == {(one.name, driver) for one in WORKLOADS for driver in DRIVERS}
    assert [cell["left_out"] for cell in runs[0]["cells"] if cell["left_out"] is not None] == []


def test_two_runs_agree_in_every_count(runs: list[Json]) -> None:
    first, second = map(cells, runs)
    assert {key: cell["counts"] for key, cell in first.items()} == {
        key: cell["counts"] for key, cell in second.items()
    }
    assert [cell["differing"] for run in runs for cell in run["cells"] if cell["differing"]] == []


def test_two_runs_order_what_is_far_apart_in_both_alike(runs: list[Json]) -> None:
    for workload in runs[0]["ranking"]:
        times = [
            {driver: cells(run)[workload, driver]["us_per_operation"]["total"] for driver in DRIVERS}
            for run in runs
        ]
        for one in DRIVERS:
            for other in DRIVERS:
                faster = [at[other] >= 3 * at[one] for at in times]
                slower = [at[one] >= 3 * at[other] for at in times]
                assert not (faster[0] and slower[1]), (workload, one, other)


def test_only_the_driver_that_nobody_tells_reads_stale_bytes(runs: list[Json]) -> None:
    stale = {key: cell["counts"]["stale_reads"] for key, cell in cells(runs[0]).items()}
    assert {key for key, count in stale.items() if count} == {("malloc-churn", "pinned")}
    assert stale["malloc-churn", "pinned"] == MALLOCS - 1
    places = {one["driver"]: one["place"] for one in runs[0]["ranking"]["malloc-churn"]}
    assert [driver for driver, place in places.items() if place is None] == ["pinned"]


@pytest.mark.parametrize("count", ["left_behind", "lost_writes", "wrong_snapshots"])
def test_nothing_is_lost_or_left(runs: list[Json], count: str) -> None:
    assert {cell["counts"][count] for cell in runs[0]["cells"]} == {0}


def test_the_sums_agree(runs: list[Json]) -> None:
    size, chunk = runs[0]["options"]["size"], runs[0]["options"]["chunk"]
    for (workload, driver), cell in cells(runs[0]).items():
        found = cell["counts"]
        assert found["reads"] == found["operations"]
        assert found["resident"] - found["reclaimable"] == found["pinned"] - found["stranded"]
        assert (found["pages_pinned"] > 0) == (driver in PINS)
        assert found["pinned"] <= found["pages_pinned"] <= found["pages_mapped"]
        assert driver in PINS or (found["faults"] > 0 and found["pages_mapped"] >= found["faults"])
        if workload == "stream-once":
            assert found["operations"] == size // chunk
            assert found["invalidations"] == (0 if driver == "pinned" else size // chunk)
        if workload not in ("fork-heavy", "cow-server"):
            assert found["copied"] == 0


def test_a_pin_makes_forks_copy_and_a_mirror_does_not(runs: list[Json]) -> None:
    copied = {driver: cells(runs[0])["fork-heavy", driver]["counts"]["copied"] for driver in DRIVERS}
    assert all(copied[pin] > copied[driver] for pin in PINS for driver in ("odp", "svm"))


def test_the_parts_of_the_time_add_up(runs: list[Json]) -> None:
    options = runs[0]["options"]
    for cell in runs[0]["cells"]:
        us, found = cell["us_per_operation"], cell["counts"]
        model = found["faults"] * options["fault_us"] + found["invalidations"] * options["invalidation_us"]
        assert us["model"] == pytest.approx(model / found["operations"])
        assert us["total"] == pytest.approx(us["cpu"] + us["device"] + us["model"])
        assert us["slowest"] >= us["total"]


def test_a_study_can_be_traced(runs: list[Json]) -> None:
    events = traces.load(runs[1]["folder"] / "trace.json")
    found = {event.get("cat") for event in events}
    assert found >= {
        "runs",
        "CPU operations",
        "invalidations",
        "callbacks",
        "range faults",
        "DMA maps",
        "pins",
    }
    parts = [(event["name"], event["args"]["round"]) for event in traces.of_track(events, "runs")]
    assert parts == [
        (f"{one.name}: {driver}", number) for number in (1, 2) for one in WORKLOADS for driver in DRIVERS
    ]
    # What makes svm retry, a fork's write protection, an ordinary user's kernel does not tell of.
    assert "retries" in found or not any(cell["counts"]["retries"] for cell in runs[1]["cells"])


class Page(HTMLParser):
    """What a page refers to, and whether its tags are balanced."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_page_that_needs_nothing_else(runs: list[Json]) -> None:
    text = (runs[1]["folder"] / "study.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.seen.count("svg") == 2
    assert page.seen.count("table") == len(WORKLOADS)
    assert "script" not in page.seen
    assert text.count("in the fastest of 2 rounds") == 2
    # Inside a picture references are to the picture itself.
    assert [link for link in page.links if not link.startswith("#")] == []
    assert "pymirror study --size 1048576 --chunk 16384 --rounds 2 --html" in text
    for workload, sentences in runs[1]["says"].items():
        assert workload in text
        assert len(sentences) > 0


def test_the_plot_is_a_picture(runs: list[Json]) -> None:
    assert (runs[1]["folder"] / "study.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_tables_and_sentences() -> None:
    needs("uffd_events", "pagemap", "populate", "process_vm", "io_uring")
    done = study("--rounds", "1", "--workload", "malloc-churn", "--driver", "pinned", "--driver", "svm")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^ pinned +wrong +- ", done.stdout, re.MULTILINE)
    assert re.search(r"^ svm +1 +time ", done.stdout, re.MULTILINE)
    assert (
        f"pinned is wrong here: {MALLOCS - 1} of {MALLOCS} reads gave the device stale bytes" in done.stdout
    )
    assert "us an operation, in the only round: " in done.stdout
    assert "again: pymirror study" in done.stdout
    assert "…" not in done.stdout


def test_svg_is_a_format_too(tmp_path: Path) -> None:
    needs("uffd_events", "pagemap", "populate", "process_vm")
    path = tmp_path / "study.svg"
    assert study("--rounds=1", "--workload=reuse", "--driver=svm", f"--plot={path}").returncode == 0
    assert "<svg" in path.read_text()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--size", "4K"), 2, "at least 1 MiB"),
        (("--chunk", "12K"), 2, "a power of two"),
        (("--chunk", "1M"), 2, "an eighth"),
        (("--notifier-span", "12K"), 2, "a power of two"),
        (("--fault-us", "nan"), 2, "10^6"),
        (("--rounds", "0"), 2, "positive"),
        (("--seed", "-1"), 2, "negative"),
        (("--driver", "none"), 2, "invalid choice"),
        (("--plot", "study.gif"), 3, ".png or .svg"),
        (("--html", "/nonexistent/report.html"), 3, "No such file"),
        (("--trace", "/nonexistent/trace.json"), 3, "No such file"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(args: tuple[str, ...], code: int, said: str) -> None:
    done = study(*args)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def cell(driver: str, total: float, *, workload: str = "reuse", **counts: int) -> Cell:
    """One of 100 operations, whose time is the CPU's."""
    stage = StageCounts(operations=100, reads=100)
    mine = DriverCounts()
    for name, count in counts.items():
        setattr(stage if hasattr(stage, name) else mine, name, count)
    made = Cell(workload, driver)
    made.add(Counts(stage, mine), Times(total, 0.0, total))
    return made


def says(*made: Cell, **options: Any) -> str:
    report = Report("0", Options(**options), Machine("k", "c", 2, 1 << 30, "3", True, ()), list(made))
    return " ".join(verdict(report, "reuse"))


NOTHING = {"fault_us": 0.0, "invalidation_us": 0.0}


@pytest.mark.parametrize(
    "asked",
    [
        Options(),
        Options(seed=123456789, fault_us=1234.5678, rounds=2),
        Options(workloads=("reuse",), size=MIB),
    ],
)
def test_the_command_that_is_shown_asks_for_the_same(asked: Options) -> None:
    program, command, *args = shlex.split(asked.command())
    parser = argparse.ArgumentParser()
    StudyCommand().prepare_parser(parser)
    assert (program, command) == ("pymirror", "study")
    assert _options(parser.parse_args(args)) == asked


class TestRanking:
    def places(self, *made: Cell, **options: Any) -> list[tuple[str, int | None, str]]:
        return [(one.cell.driver, one.place, one.by) for one in rank(list(made), Options(**options))]

    def test_by_time_where_times_are_apart(self) -> None:
        found = self.places(cell("a", 10 * NOISE + 0.1, faults=9), cell("b", 10.0), **NOTHING)
        assert found == [("b", 1, BY_TIME), ("a", 2, BY_TIME)]

    @pytest.mark.parametrize("faults", [9, 0])
    def test_against_counts_they_must_be_further_apart(self, faults: int) -> None:
        faster = cell("z", 10.0, faults=9)
        near, far = (cell("a", 10 * AGAINST_COUNTS + by, faults=faults) for by in (-1, 0))
        assert self.places(faster, near, **NOTHING) == [("a", 1, BY_COUNTS), ("z", 2, BY_COUNTS)]
        assert self.places(faster, far, **NOTHING) == [("z", 1, BY_TIME), ("a", 2, BY_TIME)]

    @given(st.lists(st.tuples(st.integers(0, 9), st.floats(1, 20), st.floats(0.6, 1.4)), max_size=6))
    def test_a_noisy_run_ranks_alike(self, drivers: list[tuple[int, float, float]]) -> None:
        """But where times contradict the counts, and noise moves them over that one bound."""
        options = Options(**NOTHING)
        runs = [
            [
                cell(str(n), time * noise**way, faults=faults)
                for n, (faults, time, noise) in enumerate(drivers)
            ]
            for way in (0, 1)
        ]
        ranked = [[one.cell for one in rank(made, options)] for made in runs]
        if all(self.contradicts(made, options) is None for made in ranked):
            assert [one.driver for one in ranked[0]] == [one.driver for one in ranked[1]]

    def contradicts(self, ranked: list[Cell], options: Options) -> Cell | None:
        """The first that comes after one which has more counts; times are that far apart then."""
        for before, after in itertools.combinations(ranked, 2):
            orders = [(cost_us(one, options), one.driver) for one in (before, after)]
            if orders[0] > orders[1]:
                assert after.total_us(options) >= AGAINST_COUNTS * before.total_us(options)
                return after
        return None

    def test_by_counts_within_noise(self) -> None:
        found = self.places(cell("a", 10.0, faults=9), cell("b", 10 * NOISE - 0.1), **NOTHING)
        assert found == [("b", 1, BY_COUNTS), ("a", 2, BY_COUNTS)]

    def test_a_group_is_within_noise_of_its_fastest(self) -> None:
        found = self.places(
            cell("a", 10.0),
            cell("b", 10 * NOISE - 1, faults=1),
            cell("c", 10 * NOISE + 1, faults=2),
            **NOTHING,
        )
        assert [by for _, _, by in found] == [BY_COUNTS, BY_COUNTS, BY_TIME]

    def test_rounds_that_overlap_are_noise_too(self) -> None:
        fast, slow = cell("a", 10.0, faults=9), cell("b", 30.0)
        fast.times.append(Times(31.0, 0.0, 31.0))
        assert self.places(fast, slow, **NOTHING) == [("b", 1, BY_COUNTS), ("a", 2, BY_COUNTS)]

    def test_wrong_bytes_have_no_place(self) -> None:
        found = self.places(cell("a", 1.0, stale_reads=1), cell("b", 100.0))
        assert found == [("b", 1, BY_TIME), ("a", None, BY_TIME)]

    def test_the_model_counts_as_time(self) -> None:
        made = cell("a", 10.0, faults=100), cell("b", 40.0)
        assert self.places(*made, **NOTHING)[0][0] == "a"
        assert self.places(*made, fault_us=50.0, invalidation_us=0.0)[0][0] == "b"


class TestSentences:
    def test_the_fastest_and_by_how_much(self) -> None:
        found = says(cell("a", 10.0), cell("b", 25.0))
        assert "a is the fastest: 10.0 us for a chunk. b takes 2.5 times as much (25.0)." in found

    def test_one_round_says_what_was_and_not_what_is(self) -> None:
        found = says(cell("a", 10.0), cell("b", 25.0), cell("c", 99.0), rounds=1)
        assert "a took least: 10.0 us for a chunk. b takes 2.5 times as much (25.0)." in found
        assert "c took most: 99.0 us, 9.9 times the least." in found

    def test_within_noise_nobody_is_called_fastest(self) -> None:
        found = says(cell("a", 10.0, faults=5), cell("b", 10.5), **NOTHING)
        assert "fastest" not in found
        assert "b and a are not told apart by time (10.0 to 10.5 us for a chunk)" in found
        assert "by counts b comes first: 0 faults" in found

    def test_equal_counts_give_no_reason(self) -> None:
        assert "counts are equal too" in says(cell("a", 10.0), cell("b", 10.5))

    def test_where_mirror_and_pin_would_be_equal(self) -> None:
        """100 faults in 100 operations: 10 + f = 30."""
        found = says(
            cell("odp", 10.0, faults=100),
            cell("pinned", 30.0, pages_pinned=1),
            fault_us=1.0,
            invalidation_us=0.0,
        )
        assert "would take the same if the device took 20.0 us a fault (here 1)" in found

    def test_no_cost_of_faults_is_blamed_that_is_not_theirs(self) -> None:
        found = says(cell("odp", 50.0, faults=100), cell("pinned", 10.0, pages_pinned=1))
        assert "with 0 us for it odp would take 50.0 us, 5.0 times as much as pinned" in found

    @pytest.mark.parametrize("faults", [0, 100])
    def test_nothing_is_said_of_faults_within_noise(self, faults: int) -> None:
        found = says(cell("odp", 10.0, faults=faults), cell("pinned", 11.0, pages_pinned=1), **NOTHING)
        assert "a fault" not in found

    def test_wrong_bytes_and_rounds_that_differ(self) -> None:
        bad = cell("a", 10.0, stale_reads=7)
        bad.add(cell("a", 10.0, stale_reads=8).counts, Times(1.0, 1.0, 1.0))  # type: ignore[arg-type]
        found = says(bad, cell("b", 10.0))
        assert "a is wrong here: 7 of 100 reads gave the device stale bytes. It is not ranked." in found
        assert "Rounds of a differ in stale_reads" in found

    def test_what_is_held(self) -> None:
        found = says(cell("a", 10.0, pinned=256, stranded=128), cell("b", 10.0))
        assert "a holds 1.0 MiB that the kernel cannot take, 0.5 MiB of it given back by the process" in found
        assert "b has nothing pinned then." in found

    def test_nothing_measured_nothing_said(self) -> None:
        assert says(Cell("reuse", "a", left_out="not here")) == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made.differing.append("faults"),
        lambda made: setattr(made.counts.stage, "left_behind", 1),
        lambda made: setattr(made.counts.stage, "stale_reads", 1),
        lambda made: setattr(made.counts.stage, "lost_writes", 1),
    ],
)
def test_a_study_that_is_not_as_it_must_be_fails(spoil: Callable[[Cell], None]) -> None:
    report = Report("0", Options(), Machine("k", "c", 2, 1 << 30, "3", True, ()), [cell("odp", 1.0)])
    assert report.as_it_must_be
    spoil(report.cells[0])
    assert not report.as_it_must_be
