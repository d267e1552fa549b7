"""inspect: a process that is well, hung or stopped is told apart from outside, with nothing asked of it."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import confined
import pytest
from seams import needs

import pymirror as pm
from pymirror._shim import ffi, lib
from pymirror.cli.main import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED
from pymirror.inspection import Look, Thread, Watch, diagnose, look_at
from pymirror.inspection import pages as pages_module
from pymirror.inspection.procfs import Process
from pymirror.inspection.status import Invalidation, Space, Wait

RUN = (sys.executable, "-m", "pymirror.cli", "inspect")
TARGET = Path(__file__).parent / "inspected.py"
WAIT_S = 20.0
SOON_S = 0.05


class Target:
    """The process, and what it told of itself."""

    def __init__(self, process: subprocess.Popen[str], told: list[int]) -> None:
        self.process = process
        self.pid = process.pid
        self.told = told

    def until(self, wanted: Callable[[Look, str], bool]) -> tuple[Look, str]:
        """The first look, with its diagnosis as text, that is wanted."""
        deadline = time.monotonic() + WAIT_S
        watch = Watch()
        while True:
            look = look_at(self.pid, watch)
            found = "\n".join(f"{one}; do: {one.do}" for one in diagnose(look, SOON_S))
            if wanted(look, found):
                return look, found
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    def cli(self, *args: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [*RUN, str(self.pid), "--json", "--after", str(SOON_S), *args],
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)


@contextmanager
def target(mode: str) -> Iterator[Target]:
    process = subprocess.Popen([sys.executable, str(TARGET), mode], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        word, *told = process.stdout.readline().split()
        assert word == "ready"
        yield Target(process, [int(one) for one in told])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def healthy() -> Iterator[Target]:
    with target("healthy") as one:
        yield one


def complaint(pid: object, *before: str) -> tuple[int, str]:
    done = subprocess.run([*before, *RUN, str(pid)], capture_output=True, text=True, timeout=50)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    return done.returncode, done.stderr


# What is well.


def test_a_process_that_is_well_has_no_problem(healthy: Target) -> None:
    code, report = healthy.cli("--after", "2")
    assert (code, report["problems"]) == (EXIT_OK, [])
    (space,) = report["spaces"]
    assert space["state"] == "open"
    assert space["version"] == pm.__version__
    assert space["device_lock"] is None
    assert space["invalidations"] == []
    assert space["inherited_from"] is None
    assert space["notifiers"] == 1
    assert space["table_entries"] == 3
    assert report["pid"] == healthy.pid


def test_the_threads_of_pymirror_have_names(healthy: Target) -> None:
    needs("uffd_events")
    _, report = healthy.cli()
    names = {one["thread"] for one in report["where"].values()}
    assert {"pymirror-mon", "pymirror-disp"} <= names
    (space,) = report["spaces"]
    assert report["where"][str(space["monitor"]["tid"])]["thread"] == "pymirror-mon"
    assert report["where"][str(space["dispatcher"]["tid"])]["thread"] == "pymirror-disp"
    assert space["monitor"]["round_age_s"] < WAIT_S


def test_pages_are_counted_by_state(healthy: Target) -> None:
    needs("uffd_events", "pagemap_scan")
    pages = look_at(healthy.pid).pages
    assert pages.to_json() == {
        "total": 8,
        "looked_at": 8,
        "present": 5,
        "zero": 2,
        "absent": 3,
        "huge": 0,
        "swapped": 0,
        "file": 0,
        "why": "",
    }


def test_pages_are_counted_on_older_kernels_too(healthy: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("uffd_events")
    monkeypatch.setattr(pages_module, "_PAGEMAP_SCAN", 0xC0606600)
    pages = look_at(healthy.pid).pages
    assert (pages.total, pages.present, pages.absent) == (8, 5, 3)
    assert pages.zero is pages.huge is None
    assert pages.why == ""


def test_a_count_that_takes_too_long_says_what_it_has_seen(healthy: Target) -> None:
    needs("uffd_events")
    watched = look_at(healthy.pid).spaces[0].watched
    pages = pages_module.count(healthy.pid, watched, limit_s=0)
    assert pages.total == 8
    assert "in time" in pages.why


def test_every_address_space_is_shown() -> None:
    with target("two") as one:
        code, report = one.cli()
        assert code == EXIT_OK
        assert len(report["spaces"]) == 2


def test_pinned_memory_is_counted() -> None:
    needs("io_uring")
    with target("pinned") as one:
        _, report = one.cli()
        assert report["pinned_bytes"] == 8 * 4096


def test_the_text_starts_with_the_diagnosis(healthy: Target) -> None:
    done = subprocess.run([*RUN, str(healthy.pid)], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_OK
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"process {healthy.pid} (")
    assert lines[1] == "no problem seen"
    assert "\x1b" not in done.stdout
    for word in ("device lock    free", "monitor", "dispatcher", "watched", "pages of watched memory"):
        assert word in done.stdout


def test_watch_looks_again_until_ctrl_c(healthy: Target) -> None:
    process = subprocess.Popen(
        [*RUN, str(healthy.pid), "--json", "--watch", "0.01"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    looks = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert {look["pid"] for look in looks} == {healthy.pid}
    assert (process.returncode, errors) == (EXIT_INTERRUPTED, "pymirror inspect: interrupted\n")


# What hangs.


def test_a_callback_of_a_kernel_event_that_does_not_return() -> None:
    needs("uffd_events")
    with target("event_callback") as one:
        look, found = one.until(lambda _, found: "event of the kernel" in found)
        assert "HUNG: a callback for an event of the kernel has been running" in found
        assert f"pymirror-disp ({look.spaces[0].dispatch_tid})" in found
        code, report = one.cli()
        assert code == EXIT_FAILURE
        assert report["spaces"][0]["dispatcher"]["callback_age_s"] > 0
        assert report["spaces"][0]["events"]["oldest_age_s"] > 0


def test_a_callback_of_an_operation_that_does_not_return() -> None:
    with target("api_callback") as one:
        (tid,) = one.told
        look, found = one.until(lambda _, found: "a callback for UNMAP" in found)
        assert f"({tid})" in found
        assert look.spaces[0].invalidations[0].undelivered
        assert f"thread {tid}" in found
        _, report = one.cli()
        (running,) = report["spaces"][0]["invalidations"]
        assert (running["event"], running["tid"], running["callbacks_run"]) == ("UNMAP", tid, True)
        assert running["end"] - running["start"] == 4096


def test_the_mmap_lock_names_who_holds_it_and_who_waits() -> None:
    with target("mmap_lock") as one:
        reader, writer = one.told
        _, found = one.until(lambda _, found: "mmap lock" in found)
        assert f"({writer}) has waited for the lock 'mmap lock (read)'" in found
        assert f"held by python ({reader}) for" in found
        _, report = one.cli()
        (wait,) = report["locks"]
        assert (wait["tid"], wait["holder_tid"]) == (writer, reader)
        assert wait["held_s"] >= wait["age_s"] > 0


def test_a_callback_that_waits_for_a_driver_lock_names_who_holds_it() -> None:
    with target("driver_lock") as one:
        holder, waiter = one.told
        _, found = one.until(lambda _, found: "has waited for the lock" in found)
        assert f"({waiter}) has waited for the lock 'Locking" in found
        assert f"({holder}) for" in found
        assert "a callback for UNMAP" in found


def test_a_change_that_takes_long_is_slow_and_its_callbacks_have_returned() -> None:
    with target("operation") as one:
        _, found = one.until(lambda _, found: found.startswith("SLOW"))
        assert "its callbacks have returned" in found
        assert f"({one.told[0]})" in found


def test_a_gil_that_is_held_in_native_code() -> None:
    with target("gil") as one:
        look, found = one.until(lambda _, found: "for the GIL" in found)
        assert "HUNG: the dispatcher" in found
        assert f"it is one of: python ({one.pid})" in found.replace(look.process.name, "python")
        assert f"py-spy dump --native --pid {one.pid}" in found
        code, report = one.cli()
        assert code == EXIT_FAILURE
        assert report["where"][str(one.pid)]["where"]
        assert look.process.state == "S"


def test_a_device_lock_that_is_held_names_holder_and_waiters() -> None:
    needs("uffd_events")
    with target("lock") as one:
        look, found = one.until(lambda _, found: "device lock" in found and "userfaultfd" in found)
        monitor = look.spaces[0].monitor_tid
        assert (
            f"held for {look.age_s(look.spaces[0].lock_since_ns):.1f} s by pymirror-mon ({monitor})" in found
        )
        assert f"worker ({one.told[0]})" in found or f"({one.told[0]}) waits for userfaultfd" in found
        assert "an event that nobody reads" in found
        code, report = one.cli()
        assert code == EXIT_FAILURE
        assert report["spaces"][0]["device_lock"]["tid"] == monitor
        assert [waiting["tid"] for waiting in report["waiting"]] == one.told


def test_the_monitor_that_does_not_go_round() -> None:
    needs("uffd_events")
    with target("lock") as one:
        _, found = one.until(lambda _, found: "the monitor (" in found)
        assert "has not gone round for" in found
        assert "holds the device lock" in found


def test_a_device_access_that_is_stuck() -> None:
    with target("access") as one:
        _, found = one.until(lambda _, found: "device access" in found)
        assert f"({one.told[0]})" in found


def test_a_page_fault_that_nobody_serves() -> None:
    needs("uffd")
    with target("fault") as one:
        tid, fd = one.told
        look, found = one.until(lambda _, found: "page fault" in found)
        assert f"({tid}) waits for userfaultfd: a page fault that nobody serves" in found
        assert {one.fd: (one.pending, one.total) for one in look.userfaultfds}[fd] == (1, 1)


def test_how_long_a_fault_waits_grows_from_look_to_look() -> None:
    needs("uffd")
    with target("fault") as one:
        watch = Watch()
        one.until(lambda look, _: bool(look.asleep))
        (first,) = look_at(one.pid, watch).asleep.values()
        (second,) = look_at(one.pid, watch).asleep.values()
        assert first == second


def test_a_stopped_process_is_told_to_be_stopped_and_nothing_else(healthy: Target) -> None:
    os.kill(healthy.pid, signal.SIGSTOP)
    try:
        _, found = healthy.until(lambda look, _: look.process.state == "T")
        assert found == (
            "STOPPED: a signal has stopped the process; nothing in it runs; do: kill -CONT "
            + str(healthy.pid)
        )
        code, report = healthy.cli()
        assert code == EXIT_FAILURE
        assert [one["kind"] for one in report["problems"]] == ["STOPPED"]
    finally:
        os.kill(healthy.pid, signal.SIGCONT)
    healthy.until(lambda look, _: look.process.state != "T")


# No look possible.


def test_no_such_process() -> None:
    code, text = complaint(2**22 + 1)
    assert code == EXIT_REFUSED
    assert "ESRCH" in text
    assert "there is no process" in text


def test_a_zombie_is_named_so() -> None:
    process = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        code, text = complaint(process.pid)
    finally:
        process.wait()
    assert code == EXIT_REFUSED
    assert "zombie" in text


@pytest.mark.parametrize("mode", ["closed", None])
def test_no_address_space(mode: str | None) -> None:
    if mode is None:
        process = subprocess.Popen(["sleep", "60"])
        try:
            code, text = complaint(process.pid)
        finally:
            process.kill()
            process.wait()
    else:
        with target(mode) as one:
            code, text = complaint(one.pid)
    assert code == EXIT_REFUSED
    assert "ENOENT" in text
    assert "has no address space of pymirror open" in text


@contextmanager
def a_page(**values: int) -> Iterator[None]:
    """A descriptor of this process that looks like a status page."""
    status = ffi.new("struct pm_status *", {"magic": struct.unpack("<Q", b"mirror01")[0], **values})
    fd = os.memfd_create("pymirror-status")
    try:
        os.write(fd, bytes(ffi.buffer(status)).ljust(4096, b"\0"))
        yield
    finally:
        os.close(fd)


def test_a_status_page_of_another_layout() -> None:
    with a_page(layout=lib.PM_STATUS_LAYOUT + 1):
        code, text = complaint(os.getpid())
    assert code == EXIT_REFUSED
    assert "EPROTO" in text
    assert f"layout {lib.PM_STATUS_LAYOUT + 1}" in text
    assert "of the version that the process uses" in text


def test_a_torn_page_does_not_mislead(nothing_left_behind: None) -> None:
    torn = {"layout": lib.PM_STATUS_LAYOUT, "pid": os.getpid(), "state": 77, "monitor_state": 88}
    with a_page(**torn, watched_ranges=2**32 - 1, dispatch_state=99):
        (space,) = look_at(os.getpid()).spaces
    assert space.state == "?"
    assert len(space.watched) == lib.PM_STATUS_WATCHED


def test_the_page_of_the_parent_is_not_taken_for_ones_own() -> None:
    with target("clone") as one:
        (child,) = one.told
        (space,) = look_at(child).spaces
        assert space.inherited_from == one.pid
        assert diagnose(look_at(child), 0) == []


@pytest.mark.root
def test_another_users_process_is_refused_with_the_command(healthy: Target) -> None:
    code, text = complaint(healthy.pid, *confined.command({"user": 65534}))
    assert code == EXIT_REFUSED
    assert "EACCES" in text
    assert f"do: sudo {sys.executable} -m pymirror.cli inspect {healthy.pid}" in text


@pytest.mark.root
def test_numbers_in_a_pid_namespace_are_those_of_the_outside(healthy: Target) -> None:
    inner = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, str(TARGET), "api_callback"]
    process = subprocess.Popen(inner, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        _, told = process.stdout.readline().split()
        (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        one = Target(process, [])
        one.pid = child
        look, found = one.until(lambda _, found: "a callback for UNMAP" in found)
        outside = next(thread.tid for thread in look.threads if thread.ns_tid == int(told))
        assert outside != int(told)
        assert f"({outside})" in found
        assert not look.spaces[0].inherited_from
    finally:
        process.kill()
        process.communicate()


# The diagnosis of what cannot be brought about.


def a_thread(tid: int, name: str, **more: Any) -> Thread:
    found: dict[str, Any] = {"ns_tid": tid, "state": "S", "wchan": "", "syscall": (), "stack": ()}
    return Thread(tid=tid, name=name, **{**found, "switches": 0, "blocks_sigbus": False, **more})


def a_space(**more: Any) -> Space:
    zero: dict[str, Any] = {name: 0 for name, kind in Space.__annotations__.items() if kind in ("int", int)}
    return Space(
        **{
            **zero,
            "version": "0",
            "state": "open",
            "invalidations": (),
            "events": {},
            "watched": (),
            "waits": (),
            **more,
        }
    )


def a_look(space: Space, *threads: Thread, state: str = "S", tracer: int = 0) -> Look:
    process = Process(pid=1, ns_pid=1, name="x", uid=0, state=state, tracer=tracer, threads=len(threads))
    return Look(process, 10**10, [space], list(threads), [], pages_module.Pages(), {})


def test_a_monitor_that_has_ended_is_found() -> None:
    space = a_space(monitor_tid=7, monitor_state=1, monitor_loop_ns=10**10)
    (found,) = diagnose(a_look(space, a_thread(1, "main")))
    assert "the monitor thread has ended" in found.text
    assert diagnose(a_look(space, a_thread(7, "pymirror-mon"))) == []
    assert diagnose(a_look(space, a_thread(7, "another"))) != []


def test_a_dispatcher_that_waits_for_the_device_lock_does_not_wait_for_the_gil() -> None:
    away = {
        "dispatch_tid": 7,
        "dispatch_state": lib.PM_DISPATCH_AWAY,
        "dispatch_since_ns": 1,
        "lock_addr": 64,
    }
    waits = a_thread(7, "pymirror-disp", syscall=(202, 64, 0, 0, 0, 0, 0))
    assert diagnose(a_look(a_space(**away), waits)) == []
    (found,) = diagnose(a_look(a_space(**away), a_thread(7, "pymirror-disp")))
    assert "GIL" in found.text
    assert diagnose(a_look(a_space(**away), a_thread(7, "someone-else"))) == []


def test_a_wait_of_a_thread_that_has_ended_is_no_wait() -> None:
    wait = Wait("d0", tid=7, since_ns=1, holder_tid=8, held_since_ns=1)
    space = a_space(waits=(wait,))
    assert diagnose(a_look(space, a_thread(8, "holder"))) == []
    (found,) = diagnose(a_look(space, a_thread(7, "waiter"), a_thread(8, "holder")))
    assert found.text == "waiter (7) has waited for the lock 'd0' for 10.0 s, held by holder (8) for 10.0 s"


def test_a_debugger_is_named() -> None:
    (found,) = diagnose(a_look(a_space(), state="t", tracer=42))
    assert "process 42 traces it" in found.text


def test_nothing_is_a_problem_before_its_time() -> None:
    one = Invalidation(0, 4096, "UNMAP", "before", since_ns=9 * 10**9, tid=1, undelivered=True)
    look = a_look(a_space(invalidations=(one,)), a_thread(1, "main"))
    assert diagnose(look, after_s=2.0) == []
    assert len(diagnose(look, after_s=0.5)) == 1
