"""The demonstration: it agrees with the CPU, finds a driver's mistakes, and leaves nothing behind."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymirror as pm
from pymirror.demo import Demo, Options, Stop, driver, runner
from pymirror.demo.memory import SHARES, Kind
from pymirror.demo.pages import PageStates
from pymirror.demo.source import DataSource

MIB = 1 << 20
SMALL = Options(size=32 * MIB, seconds=1.0)
COMMAND = [sys.executable, "-m", "pymirror.cli", "demo", "--size", "32M"]


def run_json(command: list[str], **options: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, **options)
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


@pytest.fixture(scope="module")
def whole_run() -> dict[str, Any]:
    done, report = run_json([*COMMAND, "--seconds", "2"])
    assert done.returncode == 0, report["failures"]
    assert done.stderr == ""
    return report


def test_every_checksum_agrees(whole_run: dict[str, Any]) -> None:
    assert whole_run["ok"]
    assert whole_run["failures"] == []
    assert whole_run["checksums"]["wrong"] == 0
    assert whole_run["device"]["stale"] == 0
    assert whole_run["checksums"]["bytes"] > 2 * 32 * MIB


def test_every_kind_of_memory_is_there(whole_run: dict[str, Any]) -> None:
    assert set(whole_run["memory"]) >= {kind.value for kind in SHARES}
    for kind, size in whole_run["memory"].items():
        pages = whole_run["pages"]["end"][kind]
        assert pages["total"] * 4096 == size
        assert pages["valid"] + pages["absent"] == pages["total"]
    assert whole_run["data"]["from_files"] > 0
    assert whole_run["data"]["generated"] > 0


def test_events_come_with_every_guarantee(whole_run: dict[str, Any]) -> None:
    counted = {(entry["event"], entry["guarantee"]) for entry in whole_run["events"] if entry["count"]}
    assert {("UNMAP", "before"), ("CLEAR", "before"), ("PROTECTION_VMA", "before")} <= counted
    assert ("UNMAP", "after") in counted
    assert "detected" in {guarantee for _, guarantee in counted}


def test_every_operation_has_run(whole_run: dict[str, Any]) -> None:
    operations = whole_run["operations"]
    assert set(operations["api"]) == {
        "write",
        "unmap",
        "mprotect",
        "mprotect_none",
        "dontneed",
        "mremap",
        "fork",
    }
    assert set(operations["raw"]) >= {
        "write",
        "unmap",
        "map_over",
        "mremap",
        "dontneed",
        "mprotect",
        "punch_hole",
    }
    assert operations["device"]["device_writes"] > 0
    assert all(whole_run["device"]["refused"].values())


def test_the_phases_come_in_order_with_their_times(whole_run: dict[str, Any]) -> None:
    names = [phase["name"] for phase in whole_run["phases"]]
    assert names == [
        "map",
        "first fault",
        "quiet checksum",
        "checksum under fire",
        "drain",
        "final checksum",
        "close",
    ]
    assert all(phase["seconds"] > 0 for phase in whole_run["phases"])
    under_fire = whole_run["phases"][3]
    assert under_fire["device_mb_s"] > 0
    assert under_fire["cpu_mb_s"] > 0


def test_the_tables_have_no_control_characters_when_piped() -> None:
    done = subprocess.run([*COMMAND, "--seconds", "0.2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    for title in ("Phases", "by state", "by guarantee", "stale", "all alike"):
        assert title in done.stdout


def test_without_privileges_the_rest_runs_and_what_is_missing_is_named() -> None:
    drop: list[str] = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv (util-linux)")
        drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done, report = run_json([*drop, *COMMAND, "--seconds", "1"])
    assert done.returncode == 0, report["failures"]
    assert report["checksums"]["wrong"] == 0
    missing = {entry["feature"]: entry for entry in report["missing"]}
    assert "pfn" in missing
    assert all(entry["reason"] and entry["command"] for entry in missing.values())
    assert all(states["zero"] is None for states in report["pages"]["end"].values())


@pytest.mark.hugetlb
def test_hugetlb_memory_is_mirrored_where_it_is_to_be_had() -> None:
    done, report = run_json([*COMMAND, "--seconds", "2"])
    assert done.returncode == 0, report["failures"]
    states = report["pages"]["first fault"]["hugetlb"]
    assert states["total"] == states["valid"] == states["huge"] > 0
    assert "hugetlb" not in {entry["feature"] for entry in report["missing"]}


def has_status_page(pid: int) -> bool:
    # A descriptor may be closed between the listing and the look at it.
    with suppress(FileNotFoundError):
        return any("pymirror-status" in os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


def wait_for_an_address_space(pid: int) -> None:
    deadline = time.monotonic() + 30
    while not has_status_page(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("signum", "delay"), [(signal.SIGINT, 0.0), (signal.SIGINT, 2.0), (signal.SIGTERM, 1.0)]
)
def test_a_signal_ends_it_in_order_and_tells_what_was_done(signum: int, delay: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--seconds", "30", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    wait_for_an_address_space(process.pid)
    time.sleep(delay)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, err
    assert err == "" or err.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == []
    if out:
        report = json.loads(out)
        assert report["interrupted"]
        assert report["ok"], report["failures"]
        assert report["phases"][-1]["name"] == "close"


def mapped_bytes_of_the_demo() -> int:
    maps = Path("/proc/self/maps").read_text()
    return sum("pymirror-demo" in line for line in maps.splitlines())


def test_a_run_leaves_no_thread_fd_mapping_or_child() -> None:
    Demo(Options(size=32 * MIB, seconds=0.3)).run()
    gc.collect()
    fds, mappings = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    tasks = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        assert Demo(Options(size=32 * MIB, seconds=0.3)).run().failures == []
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert len(os.listdir("/proc/self/task")) == tasks
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= mappings + 8
    assert mapped_bytes_of_the_demo() == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("demo-")]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_wrong_byte_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = pm.Device.read_into

    def lying(self: pm.Device, mm: pm.AddressSpace, addr: int, buffer: Any) -> Any:
        result = honest(self, mm, addr, buffer)
        buffer[5000] ^= 1
        return result

    monkeypatch.setattr(pm.Device, "read_into", lying)
    report = Demo(Options(size=32 * MIB, seconds=0)).run()
    assert not report.ok
    assert report.work.wrong == report.work.chunks > 0
    assert "1 pages differ" in report.failures[0]


def test_a_driver_that_does_not_clear_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(driver.DemoDriver):
        def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
            pass

    monkeypatch.setattr(runner, "DemoDriver", Forgetful)
    report = Demo(SMALL).run()
    assert not report.ok
    assert report.stale > 0


def test_a_driver_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(driver.DemoDriver):
        def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
            super().sync_cpu_device_pagetables(update)
            raise RuntimeError("a bug of the driver")

    monkeypatch.setattr(runner, "DemoDriver", Broken)
    report = Demo(Options(size=32 * MIB, seconds=0.2)).run()
    assert any("a bug of the driver" in failure for failure in report.failures)


def test_a_stop_before_the_start_maps_hardly_anything() -> None:
    stop = Stop()
    stop.request(signal.SIGINT)
    report = Demo(Options(seconds=0.1), stop).run()
    assert sum(report.memory.values()) <= 2 * MIB
    assert report.signum == signal.SIGINT


@pytest.mark.parametrize(
    "wrong", [{"size": MIB}, {"seconds": -1.0}, {"seconds": float("nan")}, {"threads": 0}, {"seed": -1}]
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Options(**wrong)


@pytest.fixture
def source() -> Iterator[DataSource]:
    source = DataSource(seed=7)
    yield source
    source.close()


def test_a_source_fills_whole_buffers_from_files_and_arrays(source: DataSource) -> None:
    for _ in range(8):
        buffer = np.zeros(MIB + 3, np.uint8)
        source.fill(buffer)
        assert np.count_nonzero(buffer) > buffer.size // 100
    assert source.from_files >= 4 * MIB
    assert source.generated >= 2 * MIB


def test_a_source_without_files_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymirror.demo.source.machine_files", lambda: iter(()))
    source = DataSource(seed=7)
    buffer = np.zeros(MIB, np.uint8)
    source.fill(buffer)
    assert (source.from_files, source.generated) == (0, MIB)
    assert np.count_nonzero(buffer)


def test_page_states_are_counted_from_pfns() -> None:
    valid, write = pm.HMM_PFN_VALID, pm.HMM_PFN_WRITE
    huge = 9 << 53
    pfns = np.array([0, valid | 7, valid | write | 8, valid | write | huge | 512], np.uint64)
    states = PageStates()
    states.count(pfns, zero_pfn=7)
    assert states == PageStates(total=4, valid=3, writable=2, huge=1, zero=1, absent=1)
    states.count(pfns, zero_pfn=None)
    assert states.zero is None


def test_small_machines_get_a_temporary_file_in_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymirror.demo.memory.machine_files", lambda smallest: iter(()))
    report = Demo(Options(size=32 * MIB, seconds=0)).run()
    assert report.ok, report.failures
    assert report.memory[Kind.FILE_PRIVATE] > 0


def test_temporary_files_have_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[int] = []
    Demo(
        Options(size=32 * MIB, seconds=0), progress=lambda *_: seen.append(len(list(tmp_path.iterdir())))
    ).run()
    assert set(seen) == {0}
