"""All pages come home from device memory when it, its address space or the interpreter ends."""

from __future__ import annotations

import errno
import mmap
import subprocess
import sys

import numpy as np
import pytest
from migrating import PAGES, intact, pattern, patterned, to_device
from mirroring import PAGE, every_delivery
from seams import errno_of, needs

import pymirror as pm
from pymirror.device_memory import NEEDS

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


mm = every_delivery


class TestEnds:
    def test_closing_the_memory(self, mm: pm.AddressSpace) -> None:
        vram = pm.DeviceMemory(pm.Device("d7"), pm.MiB)
        buf = patterned(mm)
        to_device(buf, vram)
        vram.close()
        vram.close()
        assert mm.stats()["device_to_system"] == PAGES
        assert intact(buf)
        assert errno_of(to_device, buf, vram) == errno.EINVAL

    @pytest.mark.parametrize("delivery", ["thread", "inline"])
    def test_closing_the_address_space(self, delivery: str) -> None:
        needs(*NEEDS[delivery])
        vram = pm.DeviceMemory(pm.Device("d8"), pm.MiB)
        mm = pm.AddressSpace(fault_delivery=delivery)
        buf = patterned(mm)
        view = np.frombuffer(buf, np.uint8)
        to_device(buf, vram)
        mm.close()
        assert vram.used == 0
        assert np.array_equal(view, pattern(PAGES))
        vram.close()

    @pytest.mark.parametrize("delivery", ["thread", "inline"])
    @pytest.mark.parametrize("touched", [True, False])
    def test_closing_the_address_space_where_pages_do_not_move(self, touched: bool, delivery: str) -> None:
        needs(*NEEDS[delivery])
        vram = pm.DeviceMemory(pm.Device("d9"), pm.MiB)
        mm = pm.AddressSpace(fault_delivery=delivery)
        buf = patterned(mm, 1) if touched else mm.mmap(PAGE)
        view = np.frombuffer(buf, np.uint8)
        assert to_device(buf, vram) == 1
        if touched:
            mm.mprotect(buf.addr, PAGE, mmap.PROT_READ)
        mm.close()
        assert vram.used == 0
        assert np.array_equal(view, pattern(1) if touched else np.zeros(PAGE, np.uint8))
        vram.close()

    @pytest.mark.parametrize("delivery", ["thread", "inline"])
    @pytest.mark.parametrize("ending", ["pass", "import os; os._exit(0)", "raise SystemExit(0)"])
    def test_the_interpreters_exit(self, ending: str, delivery: str) -> None:
        needs(*NEEDS[delivery])
        program = (
            "import pymirror as pm\n"
            f"mm = pm.AddressSpace(fault_delivery={delivery!r})\n"
            "buf = mm.mmap(1 << 20)\n"
            "vram = pm.DeviceMemory(pm.Device('d'), 1 << 20)\n"
            "assert pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram) == 256\n" + ending
        )
        done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_child_in_a_pid_namespace_of_its_own() -> None:
    """Its parent has no number there, and is alive all the same."""
    needs(*NEEDS["thread"])
    program = (
        "import ctypes, os\n"
        "import numpy as np, pymirror as pm\n"
        "with pm.AddressSpace() as mm, pm.DeviceMemory(pm.Device('d'), 64 * pm.MiB) as vram:\n"
        "    buf = mm.mmap(64 * pm.MiB)\n"
        "    np.frombuffer(buf, np.uint8)[:] = 7\n"
        "    pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)\n"
        "    assert ctypes.CDLL(None).unshare(0x20000000) == 0\n"
        "    if (pid := os.fork()) == 0:\n"
        "        os._exit(ctypes.string_at(buf.addr + buf.size - 1, 1)[0])\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
