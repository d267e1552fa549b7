# SPDX-License-Identifier: MIT
"""What another thread held at a fork, and what Ctrl-C or a refusal left half done, is in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from seams import Background

import pymirror as pm
from pymirror import hmm_mirror
from pymirror.event import WHOLE_MM_END

PAGE = 4096


def in_child(body: Callable[[], object]) -> None:
    """Fork, and have the child end within 10 s."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    until = time.monotonic() + 10
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.001)


def test_a_child_waits_for_no_lock_of_a_thread_that_it_has_not(mm: pm.AddressSpace) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with mm._mmap_lock._lock, mm.notifiers._lock, hmm_mirror._instances_lock:
            held.set()
            go.wait(30)

    def child(reading: object) -> None:
        mm._mmap_lock._release_read(0)
        mm.notifiers.drop(driver, reading)  # type: ignore[arg-type]
        with pm.AddressSpace() as own, pm.Mirror(own):
            pass

    driver = pm.MmuNotifier(mm)
    holder = Background(hold)
    assert held.wait(10)
    try:
        in_child(lambda: child(object()))
    finally:
        go.set()
        holder.result()
    driver.unregister()


def test_ctrl_c_before_a_callback_leaves_its_notifier_removable(
    mm: pm.AddressSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = mm.mmap(PAGE)
    sub = pm.IntervalNotifier(mm, 0, WHOLE_MM_END, lambda sub, range, seq: sub.set_seq(seq))
    driver = pm.MmuNotifier(mm)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for call in "_first_pass", "_invoke", "_judge":
        with monkeypatch.context() as patch:
            patch.setattr(f"pymirror.delivery.Delivery.{call}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                mm.madvise(region.addr, PAGE, 4)
    sub.remove(timeout=1)
    driver.unregister(timeout=1)


@pytest.mark.parametrize(
    "make",
    [
        pm.MmuNotifier,
        lambda mm: pm.IntervalNotifier(mm, 0, PAGE, lambda sub, range, seq: sub.set_seq(seq)),
    ],
)
def test_without_a_thread_there_is_no_notifier(
    mm: pm.AddressSpace, make: Callable[[pm.AddressSpace], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="thread"):
            make(mm)
    stats = mm.stats()
    assert (stats["subs"], stats["mmu_notifiers"], stats["interval_notifiers"]) == (0, 0, 0)


_ONE_CANNOT_CLOSE = """
import threading, pymirror as pm, pymirror.mm
pymirror.mm._EXIT_TIMEOUT = 0.2
class Driver(pm.MmuNotifier):
    def release(self): print(self.name, "released", flush=True)
mms = [pm.AddressSpace() for _ in range(3)]
for i, mm in enumerate(mms):
    Driver(mm).name = i
inside = threading.Event()
def hold():
    with mms[1].read_lock():
        inside.set()
        threading.Event().wait(60)
threading.Thread(target=hold, daemon=True).start()
inside.wait(10)
"""


def test_at_exit_one_that_cannot_be_closed_keeps_no_other_open() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ONE_CANNOT_CLOSE], capture_output=True, text=True, timeout=60, check=False
    )
    assert sorted(done.stdout.split()) == ["0", "2", "released", "released"]
