"""Traces: the file is what viewers open, has each event on its row, and parses however the program ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import traces
from mirroring import PAGE, Driver, FaultDriver
from seams import needs

import pymirror as pm
from pymirror import trace
from pymirror.trace import Track

MADV_DONTNEED = 4
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "cpu.jsonl"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def run_everything(mm: pm.AddressSpace) -> None:
    """One of each: an operation, faults, a change that no event tells of, a pin, a DMA mapping."""
    with FaultDriver(mm) as driver:
        buf = mm.mmap(16 * PAGE)
        driver.device.read(mm, buf.addr, buf.size)
        mm.madvise(buf.addr, PAGE, MADV_DONTNEED)
        driver.device.write(mm, buf.addr, b"x")
        with driver.range(buf.addr, buf.addr + buf.size) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            pm.hmm_range_dma_map(rng, driver.device)
            pm.hmm_range_dma_unmap(rng, driver.device)
        mm.munmap(buf.addr, buf.size)


def test_each_kind_of_event_is_on_a_row_of_its_own(mm: pm.AddressSpace, path: Path) -> None:
    with pm.Trace(path):
        run_everything(mm)
    events = traces.load(path)
    names = {event["name"] for event in traces.of_track(events, "CPU operations")}
    assert names == {"mmap", f"madvise {MADV_DONTNEED}", "munmap"}
    assert {event["name"] for event in traces.of_track(events, "device faults")} >= {"missing"}
    assert {event["name"] for event in traces.of_track(events, "DMA maps")} == {"map", "unmap"}
    assert {"fault"} <= {event["name"] for event in traces.of_track(events, "range faults")}
    callbacks = traces.of_track(events, "callbacks")
    assert callbacks
    for track in ("CPU operations", "invalidations", "device faults", "DMA maps", "callbacks"):
        assert f"{track}: MainThread" in traces.rows(events).values()


def test_an_invalidation_tells_event_guarantee_interval_and_sequence(mm: pm.AddressSpace, path: Path) -> None:
    with Driver(mm), mm.mmap(4 * PAGE) as buf, pm.Trace(path, mm):
        mm.madvise(buf.addr, 2 * PAGE, MADV_DONTNEED)
        last = mm.notifiers.history()[-1]
    (event,) = traces.of_track(traces.load(path), "invalidations")
    assert event["name"] == "CLEAR"
    assert event["args"] == {
        "start": hex(buf.addr),
        "end": hex(buf.addr + 2 * PAGE),
        "guarantee": "before",
        "blockable": True,
        "seq": last.seq,
    }


def test_what_the_kernel_tells_is_on_the_dispatchers_row(mm: pm.AddressSpace, path: Path) -> None:
    needs("uffd_events")
    with Driver(mm), mm.mmap(4 * PAGE) as buf, pm.Trace(path):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        mm.sync()
        assert buf.size
    events = traces.load(path)
    told = [event for event in traces.of_track(events, "invalidations") if "told_us_ago" in event["args"]]
    assert [event["name"] for event in told] == ["PROTECTION_PAGE"]
    rows = traces.rows(events)
    assert rows[told[0]["pid"], told[0]["tid"]] == "invalidations: pymirror-dispatch"


def test_a_retry_is_an_instant(mm: pm.AddressSpace, path: Path) -> None:
    with pm.Mirror(mm) as mirror, mm.mmap(PAGE) as buf, mirror.range(buf.addr, buf.addr + PAGE) as rng:
        mm.madvise(buf.addr, PAGE, MADV_DONTNEED)
        with pm.Trace(path), pytest.raises(pm.MirrorError):
            rng.fault()
    (event,) = traces.of_track(traces.load(path), "retries")
    assert event["ph"] == "i"
    assert event["name"] == "fault: invalid"


def test_pins_and_migrations_have_rows(mm: pm.AddressSpace, path: Path) -> None:
    needs("io_uring", "uffd_kernel", "uffd_events", "move", "pagemap")
    dev = pm.Device("d0")
    with mm.mmap(4 * PAGE) as buf, pm.DeviceMemory(dev, 4 * PAGE) as vram, pm.Trace(path):
        with pm.pin_user_pages(mm, buf.addr, 2):
            pass
        pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)
        pm.migrate_to_system(mm, buf.addr, buf.addr + buf.size, vram)
    events = traces.load(path)
    assert [event["name"] for event in traces.of_track(events, "pins")] == [
        "pin_user_pages",
        "unpin_user_pages",
    ]
    assert [event["name"] for event in traces.of_track(events, "migrations")] == [
        "migrate_to_device",
        "migrate_to_system",
    ]


def test_a_failed_call_has_its_errno(mm: pm.AddressSpace, path: Path) -> None:
    with mm.mmap(PAGE) as buf, pm.Trace(path), pytest.raises(pm.MirrorError):
        mm.mremap(buf.addr, PAGE, 1 << 46)
    (event,) = traces.of_track(traces.load(path), "CPU operations")
    assert event["args"]["error"] == "ENOMEM"


def test_one_address_space_alone(mm: pm.AddressSpace, path: Path) -> None:
    with pm.AddressSpace() as other, pm.Trace(path, other):
        run_everything(mm)
        other.mmap(PAGE).close()
    assert len(traces.of_track(traces.load(path), "CPU operations")) == 2


def test_it_is_complete_after_an_exception(mm: pm.AddressSpace, path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), pm.Trace(path), mm.invalidate(0x1000, 0x2000):
        raise KeyboardInterrupt
    (event,) = traces.of_track(traces.load(path), "invalidations")
    assert event["args"]["error"] == "KeyboardInterrupt"
    assert json.loads(path.read_text())["otherData"]["dropped"] == 0


def test_what_is_not_over_is_a_begin_without_an_end(mm: pm.AddressSpace, path: Path) -> None:
    written = pm.Trace(path)
    with mm.invalidate(0x1000, 0x2000):
        written.close()
    (event,) = traces.of_track(traces.load(path), "invalidations")
    assert event["ph"] == "B"


@pytest.mark.parametrize("struck", [signal.SIGKILL, signal.SIGINT])
def test_the_file_parses_after_a_signal(path: Path, struck: signal.Signals) -> None:
    program = """
import sys, pymirror as pm
with pm.AddressSpace() as mm, pm.Trace(sys.argv[1]) as trace:
    while trace.events < 1000:
        mm.mmap(4096).close()
    print("on", flush=True)
    while True:
        mm.mmap(4096).close()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"on\n"
        child.send_signal(struck)
        child.wait(30)
    assert len(traces.spans(traces.load(path))) >= 500


def test_a_limit_of_bytes_drops_and_counts(mm: pm.AddressSpace, path: Path) -> None:
    with pm.Trace(path, limit=4096) as written:
        for _ in range(100):
            mm.mmap(PAGE).close()
    assert path.stat().st_size < 4096 + 256
    assert written.dropped > 0
    other = json.loads(path.read_text())["otherData"]
    assert (other["dropped"], other["events"]) == (written.dropped, written.events)
    traces.load(path)


def test_a_full_disk_ends_the_trace_and_nothing_else(
    mm: pm.AddressSpace, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room, really = 1 << 12, os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if at >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(fd, data[: room - at], at)

    with pm.Trace(path) as written:
        monkeypatch.setattr(os, "pwrite", pwrite)
        while written._file.error is None:
            mm.mmap(PAGE).close()
    assert "No space left" in caplog.text
    assert json.loads(path.read_text())["traceEvents"] == []


def test_a_disk_that_is_gone_ends_the_trace_and_nothing_else(
    mm: pm.AddressSpace, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with pm.Trace(path) as written, monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        while written._file.error is None:
            trace.instant(Track.RETRY, "lost", mm)
        mm.mmap(PAGE).close()
    assert "Input/output error" in caplog.text


def test_ctrl_c_in_a_write_loses_its_events_and_no_comma(
    mm: pm.AddressSpace, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(*_: object) -> int:
        raise KeyboardInterrupt

    with pm.Trace(path) as written:
        trace.instant(Track.RETRY, "lost", mm)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", pwrite)
            with pytest.raises(KeyboardInterrupt):
                written._file.flush()
        trace.instant(Track.RETRY, "kept", mm)
        written._file.flush()
        trace.instant(Track.RETRY, "kept", mm)
    kept = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert kept == ["kept", "kept"]


def test_only_one_at_a_time(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    with pm.Trace(path), pytest.raises(pm.MirrorError) as refused:
        pm.Trace(other)
    assert refused.value.errno == errno.EBUSY
    assert not other.exists()
    pm.Trace(other).close()


def test_a_file_that_cannot_be_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Is a directory"):
        pm.Trace(tmp_path)
    with pytest.raises(pm.MirrorError) as refused:
        pm.Trace("/dev/null")
    assert refused.value.errno == errno.EINVAL
    assert trace.active is None


def test_a_forked_child_writes_nothing(mm: pm.AddressSpace, path: Path) -> None:
    with pm.Trace(path) as written:
        mm.mmap(PAGE).close()
        pid = os.fork()
        if pid == 0:
            ok = trace.active is None
            with pm.AddressSpace() as own:
                own.mmap(PAGE).close()
            written.close()
            os._exit(0 if ok else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert len(traces.of_track(traces.load(path), "CPU operations")) == 2


def test_a_span_that_a_fork_falls_into_ends_in_the_child_too(mm: pm.AddressSpace, path: Path) -> None:
    """Also where another thread was writing at that moment."""
    writing, go = threading.Event(), threading.Event()

    def write() -> None:
        with written._file._lock:
            writing.set()
            go.wait(0.3)

    with pm.Trace(path) as written:
        writer = threading.Thread(target=write)
        writer.start()
        writing.wait(10)
        with trace.span(Track.OPERATION, "fork", mm):
            pid = os.fork()
            if pid == 0:
                signal.alarm(10)
            else:
                go.set()
        if pid == 0:
            written.close()
            os._exit(0)
        writer.join()
        assert os.waitpid(pid, 0)[1] == 0
    assert [event["name"] for event in traces.spans(traces.load(path))] == ["fork"]


def test_threads_have_rows_of_their_own(mm: pm.AddressSpace, path: Path) -> None:
    def work() -> None:
        for _ in range(20):
            with mm.mmap(PAGE) as buf:
                np.frombuffer(buf, np.uint8)[0] = 1

    with pm.Trace(path):
        threads = [threading.Thread(target=work, name=f"worker-{i}") for i in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    events = traces.load(path)
    assert {f"CPU operations: worker-{i}" for i in range(3)} <= set(traces.rows(events).values())
    assert len(traces.of_track(events, "CPU operations")) == 3 * 20 * 2


@pytest.mark.parametrize(
    "command",
    [("replay", str(GOLDEN), "--show", "p3"), ("demo", "--size", "32M", "--seconds", "0.2")],
    ids=lambda command: command[0],
)
def test_of_a_command(command: tuple[str, ...], path: Path) -> None:
    needs("pagemap", "populate")
    done = subprocess.run(
        [sys.executable, "-m", "pymirror.cli", *command, "--trace", str(path)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    events = traces.load(path)
    assert traces.of_track(events, "CPU operations")
    assert traces.of_track(events, "invalidations")
