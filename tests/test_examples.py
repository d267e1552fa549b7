"""The examples: short, listed, and each shows what it says, as root and as an ordinary user."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import confined
import pytest
from docpages import ROOT
from seams import needs

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DEVICE_MEMORY = ("device_memory.py", "exclusive_access.py")


def output(name: str, *before: str) -> str:
    if name in DEVICE_MEMORY:
        needs("sigbus", "uffd_events", "pagemap")
    done = subprocess.run(
        [*before, sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
class TestEach:
    def test_it_is_short_and_says_what_it_shows(self, example: Path) -> None:
        text = example.read_text()
        assert text.startswith('"""')
        assert len(text.splitlines()) < 60

    def test_it_is_listed(self, example: Path) -> None:
        assert f"[{example.name}]({example.name})" in (ROOT / "examples" / "README.md").read_text()

    def test_it_runs(self, example: Path) -> None:
        assert output(example.name)

    @pytest.mark.root
    def test_it_runs_as_an_ordinary_user(self, example: Path) -> None:
        assert output(example.name, *confined.command({"user": 65534}))


def test_the_race_is_shown_and_survived() -> None:
    lines = output("invalidation_race.py").splitlines()
    programmed = [line.rpartition(": ")[2] for line in lines if "programs the device" in line]
    assert programmed == ["refused", "done"]
    assert lines[-1] == "device  reads b'after!'"


def test_each_guarantee_is_provoked() -> None:
    needs("uffd_events", "pagemap")
    told = re.findall(r"^    ([A-Z_]+) +(\w+) ", output("what_the_kernel_tells.py"), re.MULTILINE)
    assert {guarantee for _, guarantee in told} == {"before", "after", "detected"}
    assert {event for event, _ in told} == {"PROTECTION_VMA", "CLEAR", "UNMAP", "PROTECTION_PAGE"}


def test_the_modern_loop_sees_what_the_cpu_sees() -> None:
    sums = re.findall(r"sums (\d+)", output("interval_notifier.py"))
    assert sums == [str(64 * 4096), str(48 * 4096)]


@pytest.mark.parametrize("example", ["mirror_loop.py"])
def test_both_sides_of_the_series_loop_agree(example: str) -> None:
    pairs = re.findall(r"([\d,]+) == ([\d,]+)", output(example))
    assert len(pairs) == 2
    assert all(device == cpu for device, cpu in pairs)


def test_the_stale_read_is_shown_and_cured() -> None:
    needs("io_uring")
    seen = re.findall(r"reads (b'\w+.?')( - STALE| - as the CPU does)", output("stale_registration.py"))
    assert seen == [("b'first!'", " - STALE"), ("b'second'", " - as the CPU does")]


def test_the_mistakes_of_a_retry_loop_are_named() -> None:
    text = output("retry_mistakes.py")
    assert re.search(r"RuntimeWarning: stale sequence: .* read_begin\(\) inside the retry loop", text)
    assert re.search(r"EPERM: read_retry of .* without 'driver->update'", text)
    assert "through an entry that its callback did not clear" in text


def test_pages_come_home_by_a_touch_and_by_an_eviction() -> None:
    text = output("device_memory.py")
    held = re.findall(r"on the device: (.*)", text)
    assert held == ["[0 1 1 1 1 1 1 1]", "[0 1 1 0 1 1 1 1]"]
    assert text.endswith("  6 pages went home\n  the CPU reads [0 1 2 3 4 5 6 7]\n")


def test_no_increment_of_cpu_or_device_is_lost() -> None:
    text = output("exclusive_access.py")
    assert re.findall(r"it was (\d+)", text) == ["100", "101", "102", "104"]
    assert re.findall(r"has to itself: (\d+)", text) == ["1", "0"]
