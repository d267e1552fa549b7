"""Fixtures and rules that hold for every test.

A test leaves nothing behind (leaks.py). What this user or machine cannot run is left out and named at the
end; with PYMIRROR_REQUIRE_ALL=1 leaving out is a failure, except for what this kernel does not have at all.

With features switched off (PYMIRROR_DISABLE) a test that ends in the library's refusal for the want of one of
them is left out too, but only of a feature without which something cannot be done (MAY_REFUSE): all others
have a substitute, and nothing may be refused for their want.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tally
from leaks import Holdings, armed_seams, left_behind
from seams import NOT_HERE, needs, switched_off

import pymirror as pm
from pymirror.features import DISABLE_VARIABLE
from pymirror.replay.hugepages import overcommit

# A job in a shell's background ignores it, and so would every child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
REQUIRE_ALL = os.environ.get("PYMIRROR_REQUIRE_ALL") == "1"
MAY_REFUSE = {
    "uffd",
    "uffd_kernel",
    "uffd_events",
    "move",
    "sigbus",
    "pagemap",
    "pfn",
    "process_vm",
    "io_uring",
    "guard",
}
_CUT_SHORT = pytest.StashKey[bool]()
SWITCHED_OFF = MAY_REFUSE & set(switched_off())
CAP_SYS_ADMIN = 21
HUGE_PAGES = 64

# Matplotlib says on stderr that it has no home to keep its cache in, as an ordinary user of CI has none. Not
# in a place where others could have put one first.
os.environ.setdefault("MPLCONFIGDIR", str(TESTS.parent / "build" / "matplotlib"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", metavar="DIR", type=Path, default=TESTS / "golden", help="recordings of a real kernel"
    )


def has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("hugetlb"):
            item.fixturenames.append("hugepages")  # type: ignore[attr-defined]
    # What changes the machine for all users comes when others' tests, begun together with these, are over.
    items.sort(key=lambda item: item.get_closest_marker("changes_machine") is not None)


def pytest_collection_finish() -> None:
    # The thousands of tests are no garbage, and every collection in a test would go through them.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    # What may take longer than others is not traced: to read the frames of a thread that runs can crash.
    if item.get_closest_marker("timeout"):
        faulthandler.cancel_dump_traceback_later()
    if item.get_closest_marker("root") and not has_capability(CAP_SYS_ADMIN):
        pytest.skip("needs root (CAP_SYS_ADMIN)")
    for marker in item.iter_markers("needs"):
        needs(*marker.args)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def refuse_to_leave_out(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not REQUIRE_ALL or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = skip_reason(report)
    if reason.startswith(NOT_HERE):
        return
    report.outcome = "failed"
    report.longrepr = f"left out, which PYMIRROR_REQUIRE_ALL=1 forbids: {reason}"


def lost_feature(error: BaseException | None) -> str:
    """The feature that was switched off and for the want of which a test could not go on, or ""."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, pm.FeatureError) and DISABLE_VARIABLE in error.command:
            return error.feature if error.feature in MAY_REFUSE else ""
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if SWITCHED_OFF and report.failed and (name := lost_feature(call.excinfo and call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"{NOT_HERE}: {name} (switched off)")
        item.stash[_CUT_SHORT] = True
    refuse_to_leave_out(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    refuse_to_leave_out(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    for reason, times in reasons.most_common():
        terminalreporter.write_line(f"left out, {times}: {reason}")
    for line in tally.lines():
        terminalreporter.write_line(line)


def forget_traceback() -> None:
    """Of a test that was cut short: it holds what that had made and could not close."""
    for name in ("last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = Holdings.now()
    yield
    if request.node.stash.get(_CUT_SHORT, False):
        forget_traceback()
        return
    lines = armed_seams() + left_behind(before)
    if lines:
        pytest.fail("left behind:\n  " + "\n  ".join(lines), pytrace=False)


@pytest.fixture
def mm(nothing_left_behind: None) -> Iterator[pm.AddressSpace]:
    """A fresh address space, closed afterwards."""
    with pm.AddressSpace() as space:
        yield space


@pytest.fixture
def nothing_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYMIRROR_DISABLE is not set: for a test of what is said of this machine."""
    monkeypatch.delenv(DISABLE_VARIABLE, raising=False)


@pytest.fixture
def vram(mm: pm.AddressSpace) -> Iterator[pm.DeviceMemory]:
    """Device memory for its pages, whatever the module takes for ``mm``."""
    with pm.DeviceMemory(pm.Device("d0"), 16 * pm.MiB) as memory:
        yield memory


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of recordings, see its README."""
    folder: Path = request.config.getoption("--golden")
    return folder


@pytest.fixture
def hugepages() -> Iterator[None]:
    """2 MiB hugetlb pages to be had, as many as HUGE_PAGES; root raises the limit for the test."""
    with overcommit(HUGE_PAGES) as why_not:
        if why_not:
            pytest.skip(why_not)
        yield


@pytest.fixture
def node_of_others(tmp_path: Path) -> str:
    """A second device node of the userfaultfd, for root only, to be put in the first one's place."""
    if not os.path.exists("/dev/userfaultfd"):
        pytest.skip(f"{NOT_HERE}: /dev/userfaultfd")
    node = tmp_path / "userfaultfd"
    os.mknod(node, 0o020600, os.stat("/dev/userfaultfd").st_rdev)
    return str(node)
