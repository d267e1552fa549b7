"""doctor: what it calls unavailable is made so here, and what it tells to do is done where it can be."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import shlex
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import confined
import pytest
from racing import eventually

import pymirror as pm
from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, EXIT_REFUSED
from pymirror.doctor import Report, Status, examine, kernel
from pymirror.doctor.system import Privileges
from pymirror.features import DISABLE_VARIABLE, FEATURES, probe

pytestmark = pytest.mark.usefixtures("nothing_switched_off")

NAMES = [feature.name for feature in FEATURES]
RUN = (sys.executable, "-m", "pymirror.cli", "doctor")
NOBODY = 65534
USERFAULTFD, IO_URING_SETUP, PROCESS_VM_WRITEV, MADVISE, IOCTL = 323, 425, 311, 28, 16
USERFAULTFD_IOC_NEW, UFFDIO_WRITEPROTECT, UFFDIO_MOVE = 0xAA00, 0xC018AA06, 0xC028AA05
PAGEMAP_SCAN, PROCMAP_QUERY = 0xC0606610, 0xC0686611
THP = "/sys/kernel/mm/transparent_hugepage/enabled"
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"


def run(*command: str, code: int | None = EXIT_OK, **environment: str) -> dict[str, Any]:
    """The report of a doctor in a process of its own."""
    done = subprocess.run(
        [*command], capture_output=True, text=True, timeout=50, env={**os.environ, **environment}
    )
    assert done.stderr == ""
    assert code is None or done.returncode == code, done.stdout
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (EXIT_OK if report["ok"] else EXIT_FAILURE)
    return report


def confine(code: int | None = EXIT_OK, **confinement: Any) -> dict[str, Any]:
    return run(*confined.command(confinement, *RUN, "--json"), code=code)


def check(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in report["checks"] if one["name"] == name]
    return found


def missing(report: dict[str, Any]) -> set[str]:
    return {one["name"] for one in report["checks"] if one["status"] == "missing"}


def complete(one: dict[str, Any]) -> bool:
    """Says what is lost, why, and what to do."""
    return all(one[key] for key in ("value", "lost", "why", "command"))


def as_root(command: str) -> str:
    """A command as the doctor gives it, for a shell that is root already."""
    return command.replace("sudo ", "").partition("   #")[0]


def in_process(name: str, report: Report) -> Any:
    (found,) = [one for one in report.checks if one.name == name]
    return found


# Features that are switched off.


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_that_is_switched_off_is_missing_until_it_is_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = in_process(name, examine()).status
    monkeypatch.setenv(DISABLE_VARIABLE, name)
    found = in_process(name, examine())
    assert found.status is Status.MISSING
    assert DISABLE_VARIABLE in found.why
    assert found.lost == next(feature.lost for feature in FEATURES if feature.name == name)
    assert found.command.startswith(f"unset {DISABLE_VARIABLE}")
    monkeypatch.delenv(DISABLE_VARIABLE)
    assert in_process(name, examine()).status is before


@pytest.mark.parametrize("name", ["pagemap", "process_vm"])
def test_what_mirroring_cannot_do_without_makes_the_exit_code_1(name: str) -> None:
    report = run(*RUN, "--json", code=EXIT_FAILURE, **{DISABLE_VARIABLE: name})
    assert "mirroring" in report["does_not"]
    assert check(report, name)["status"] == "missing"
    assert report["best_command"].startswith(f"unset {DISABLE_VARIABLE}")


def test_what_mirroring_can_do_without_does_not() -> None:
    needed = ("pagemap", "process_vm")
    optional = ",".join(name for name in NAMES if name not in needed)
    report = run(*RUN, "--json", code=EXIT_OK, **{DISABLE_VARIABLE: optional})
    assert "mirroring" in report["works"]
    assert missing(report) >= set(optional.split(","))


def test_a_wrong_name_is_an_error_and_no_report() -> None:
    done = subprocess.run(
        [*RUN, "--json"],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, DISABLE_VARIABLE: "nonsense"},
    )
    assert (done.returncode, done.stdout) == (EXIT_REFUSED, "")
    assert "nonsense" in done.stderr


# A seccomp filter that refuses.

REFUSALS = {
    "uffd": [[USERFAULTFD, errno.EPERM], [IOCTL, errno.EPERM, 1, USERFAULTFD_IOC_NEW]],
    "wp_async": [[IOCTL, errno.EINVAL, 1, UFFDIO_WRITEPROTECT]],
    "move": [[IOCTL, errno.ENOTTY, 1, UFFDIO_MOVE]],
    "pagemap_scan": [[IOCTL, errno.ENOTTY, 1, PAGEMAP_SCAN]],
    "procmap_query": [[IOCTL, errno.ENOTTY, 1, PROCMAP_QUERY]],
    "populate": [[MADVISE, errno.EINVAL, 2, 22], [MADVISE, errno.EINVAL, 2, 23]],
    "process_vm": [[PROCESS_VM_WRITEV, errno.EPERM]],
    "io_uring": [[IO_URING_SETUP, errno.EPERM]],
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_what_a_filter_refuses_is_missing_and_is_there_without_it(name: str) -> None:
    if name not in probe():
        pytest.skip(f"not on this kernel: {name}")
    refused = confine(code=None, seccomp=REFUSALS[name])
    one = check(refused, name)
    assert one["status"] == "missing"
    assert complete(one)
    assert one["data"]["errno"] == REFUSALS[name][0][1]
    assert check(refused, "seccomp")["command"]
    if one["data"]["errno"] == errno.EPERM:
        assert "seccomp filter is on" in one["why"]
    dependent = {feature.name for feature in FEATURES if feature.needs == name}
    assert missing(refused) >= dependent
    assert name not in missing(run(*RUN, "--json", code=None))


def test_without_any_userfaultfd_pages_are_mirrored_still() -> None:
    report = confine(code=EXIT_OK, seccomp=REFUSALS["uffd"])
    assert "mirroring" in report["works"]
    assert "moving pages" in report["does_not"]


# Privileges that are dropped, and given back by what the doctor says.


@pytest.mark.root
def test_dropped_capabilities_are_named() -> None:
    report = confine(drop=True)
    assert {"pfn", "event_fork"} <= missing(report)
    assert "CAP_SYS_ADMIN is not held" in check(report, "pfn")["why"]
    assert "CAP_SYS_PTRACE is not held" in check(report, "event_fork")["why"]
    assert check(report, "capabilities")["data"]["capabilities"] == []
    assert complete(check(report, "pfn"))


@pytest.mark.root
def test_an_ordinary_user_is_told_what_grants_the_rest_and_it_does() -> None:
    report = confine(user=NOBODY)
    assert {"pfn", "event_fork", "uffd_kernel"} <= missing(report)
    assert check(report, "uffd")["value"] == "from user-mode-only"
    command = report["best_command"]
    assert command == check(report, "pfn")["command"]
    # The interpreter of the tests may be in root's home: then it takes one more to start it at all.
    command = as_root(command).replace("$USER", str(NOBODY)).replace("--init-groups", "--clear-groups")
    command = command.replace("+sys_ptrace", "+sys_ptrace,+dac_read_search")
    granted = run("sh", "-c", command.replace("...", "-m pymirror.cli doctor --json"))
    assert not {"pfn", "event_fork", "uffd_kernel"} & missing(granted)
    assert check(granted, "capabilities")["data"]["uid"] == NOBODY


@pytest.mark.root
def test_capabilities_in_a_user_namespace_do_not_count() -> None:
    rootless = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    report = run(*rootless, *RUN, "--json")
    assert "sys_admin" in check(report, "capabilities")["data"]["capabilities"]
    assert check(report, "user_namespace")["status"] == "info"
    assert "in this user namespace only" in check(report, "pfn")["why"]
    assert "outside of every user namespace" in check(report, "pfn")["command"]
    assert check(report, "memlock")["data"]["pinnable_bytes"] is not None


def grant_by_acl(path: str, uid: int) -> None:
    """setfacl -m u:UID:rw PATH: owner rw, that user rw, group and others nothing, mask rw."""
    entries = [(1, 6, 0xFFFFFFFF), (2, 6, uid), (4, 0, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)]
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)


@pytest.mark.root
def test_access_to_the_device_node_is_a_userfaultfd_of_the_kernel_kind(node_of_others: str) -> None:
    mounts = {"/dev/userfaultfd": node_of_others}
    refused = confine(user=NOBODY, mounts=mounts)
    one = check(refused, "uffd_kernel")
    assert one["status"] == "missing"
    assert f"closed to uid {NOBODY}" in one["why"]
    assert one["command"].startswith("sudo setfacl -m u:$USER:rw /dev/userfaultfd")
    grant_by_acl(node_of_others, NOBODY)
    granted = confine(user=NOBODY, mounts=mounts)
    assert check(granted, "uffd")["value"] == "from /dev/userfaultfd"
    assert "uffd_kernel" not in missing(granted)


@pytest.fixture
def unprivileged_userfaultfd() -> Iterator[Path]:
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if not switch.exists():
        pytest.skip("not on this kernel: vm.unprivileged_userfaultfd")
    with switch.open() as opened:
        # Another run of these tests may be under way on this machine.
        fcntl.flock(opened, fcntl.LOCK_EX)
        before = switch.read_text()
        yield switch
        switch.write_text(before)


@pytest.mark.root
@pytest.mark.changes_machine
def test_the_sysctl_gives_everybody_a_userfaultfd_of_the_kernel_kind(unprivileged_userfaultfd: Path) -> None:
    unprivileged_userfaultfd.write_text("0")
    refused = check(confine(user=NOBODY), "uffd_kernel")
    _, _, alternative = refused["command"].partition("# or: sudo ")
    assert alternative == "sysctl -w vm.unprivileged_userfaultfd=1"
    unprivileged_userfaultfd.write_text(alternative.rpartition("=")[2])
    granted = confine(user=NOBODY)
    assert check(granted, "uffd")["value"] == "from system call"
    assert "uffd_kernel" not in missing(granted)


@pytest.mark.root
@pytest.mark.parametrize(
    ("disabled", "command"),
    [
        ("1", "sudo sysctl -w kernel.io_uring_group=$(id -g)"),
        ("2", "sudo sysctl -w kernel.io_uring_disabled=0"),
    ],
)
def test_io_uring_that_a_sysctl_forbids(disabled: str, command: str, tmp_path: Path) -> None:
    switch = tmp_path / "io_uring_disabled"
    switch.write_text(disabled)
    report = confine(
        user=NOBODY,
        mounts={"/proc/sys/kernel/io_uring_disabled": str(switch)},
        seccomp=REFUSALS["io_uring"],
    )
    one = check(report, "io_uring")
    assert f"kernel.io_uring_disabled is {disabled}" in one["why"]
    assert one["command"].startswith(command)


# /proc that is not there.


@pytest.mark.root
def test_without_proc_the_rest_is_told_and_mounting_it_is_what_helps() -> None:
    report = confine(code=EXIT_FAILURE, umount=["/proc"])
    assert {"trial", "pagemap", "pfn", "pagemap_scan", "procmap_query"} <= missing(report)
    assert "/proc is not mounted" in check(report, "pagemap")["why"]
    for name in ("capabilities", "max_map_count", "overcommit", "swap", "blocked_sigbus"):
        assert check(report, name)["status"] == "unknown"
        assert check(report, name)["command"]
    assert all(
        "/proc/sys is not there" in one["value"] for one in report["checks"] if one["name"] == "sysctl"
    )
    assert report["best_command"].startswith("sudo mount -t proc proc /proc")
    remedy = as_root(report["best_command"])
    shell = f"{remedy} && {shlex.join([*RUN, '--json'])}; umount /proc"
    mounted = run(*confined.command({"umount": ["/proc"]}, "sh", "-c", shell), code=None)
    assert mounted["ok"]
    assert not {"trial", "pagemap", "pfn"} & missing(mounted)


# Limits that are lowered.


def test_little_memory_to_be_pinned_is_named_with_the_limit() -> None:
    one = check(confine(drop=True, limits={"MEMLOCK": 1 << 20}), "memlock")
    assert one["status"] == "limited"
    assert one["data"] == {"soft": 1 << 20, "hard": 1 << 20, "pinnable_bytes": (1 << 20) - 8192}
    assert "1 MiB" in one["value"]
    assert complete(one)


PIN = """
import ctypes, errno, mmap, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
size = int(sys.argv[1])
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
ring = libc.syscall(425, 1, ctypes.create_string_buffer(120))
buffer = struct.pack("=QQ", ctypes.addressof(ctypes.c_char.from_buffer(memory)), size)
refused = libc.syscall(427, ring, 0, buffer, 1)
print(errno.errorcode[ctypes.get_errno()] if refused else "pinned")
"""


@pytest.mark.root
def test_what_it_says_can_be_pinned_can_be_and_what_is_beyond_the_limit_can_not() -> None:
    found = check(confine(user=54321, limits={"MEMLOCK": 1 << 20}), "memlock")["data"]
    # Users of their own each: the kernel takes a charge back some time after a ring's end.
    sizes = {54322: (found["pinnable_bytes"], "pinned"), 54323: (found["soft"] + 4096, "ENOMEM")}
    for user, (size, outcome) in sizes.items():
        confinement = {"user": user, "limits": {"MEMLOCK": 1 << 20}}
        command = confined.command(confinement, sys.executable, "-c", PIN, str(size))
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
        assert done.stdout == f"{outcome}\n"


@pytest.mark.root
def test_without_a_byte_to_pin_there_is_no_io_uring_and_raising_the_limit_gives_it_back() -> None:
    none = {"MEMLOCK": [0, 1 << 20]}
    report = confine(drop=True, limits=none)
    assert {"io_uring", "memlock"} <= missing(report)
    assert "pinning" in report["does_not"]
    command = check(report, "io_uring")["command"]
    assert command == check(report, "memlock")["command"]
    inner = confined.command({"drop": True}, *RUN, "--json")
    raised = f"{as_root(command)} && {shlex.join(inner)}"
    granted = run(*confined.command({"limits": none}, "sh", "-c", raised))
    assert not {"io_uring", "memlock"} & missing(granted)


def test_too_few_descriptors_are_named_and_more_of_them_help() -> None:
    report = confine(code=EXIT_FAILURE, limits={"NOFILE": 8})
    one = check(report, "nofile")
    assert one["status"] == "missing"
    assert complete(one)
    assert "mirroring" in report["does_not"]
    soft_only = f"ulimit -Sn 8; {shlex.join([*RUN, '--json'])}"
    low = check(run("sh", "-c", soft_only, code=EXIT_FAILURE), "nofile")
    assert low["command"].startswith("ulimit -n ")
    raised = run("sh", "-c", f"ulimit -Sn 8; {low['command']}; {shlex.join([*RUN, '--json'])}")
    assert check(raised, "nofile")["status"] == "ok"


# What belongs to the machine, seen through files put in the place of the kernel's.

COVERED = {
    "thp": ({THP: "always madvise [never]"}, "limited"),
    "hugetlb": ({f"{POOL}/free_hugepages": "0", f"{POOL}/nr_overcommit_hugepages": "0"}, "missing"),
    "max_map_count": ({"/proc/sys/vm/max_map_count": "1000"}, "limited"),
    "overcommit": ({"/proc/sys/vm/overcommit_memory": "2"}, "limited"),
}


@pytest.mark.root
@pytest.mark.parametrize("name", list(COVERED))
def test_what_the_machine_lacks_is_named_and_the_command_writes_where_it_is_read(
    name: str, tmp_path: Path
) -> None:
    files, status = COVERED[name]
    mounts = {}
    for number, (path, text) in enumerate(files.items()):
        if not os.path.exists(path):
            pytest.skip(f"not on this kernel: {path}")
        cover = tmp_path / str(number)
        cover.write_text(text + "\n")
        mounts[path] = str(cover)
    one = check(confine(mounts=mounts), name)
    assert one["status"] == status
    assert complete(one)
    # What the kernel makes of "madvise" in that file is "[madvise]"; a plain file keeps what is written.
    remedy = as_root(one["command"]).replace("echo madvise", "echo '[madvise]'")
    shell = f"{remedy} >/dev/null && {shlex.join([*RUN, '--json'])}"
    mended = run(*confined.command({"mounts": mounts}, "sh", "-c", shell))
    assert check(mended, name)["status"] == "ok"


@pytest.mark.root
def test_swap_is_a_fact(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename Type Size Used Priority\n/dev/zram0 partition 2097148 0 100\n")
    report = confine(mounts={"/proc/swaps": str(swaps)})
    assert check(report, "swap")["data"]["bytes"] == 2097148 << 10


def test_the_test_device_of_the_kernel_is_an_oracle_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for nodes, status in (([], Status.INFO), (["/dev/hmm_dmirror0"], Status.OK)):
        monkeypatch.setattr(kernel.glob, "glob", lambda _, nodes=nodes: nodes)
        oracle = in_process("hmm_dmirror", examine())
        assert (oracle.status, oracle.data) == (status, {"nodes": nodes})
        assert nodes or "test_hmm" in oracle.command


@pytest.mark.root
def test_how_the_kernel_was_built_is_read_where_it_is_told(tmp_path: Path) -> None:
    if not os.path.exists("/proc/config.gz"):
        pytest.skip("not on this kernel: /proc/config.gz")
    config = tmp_path / "config.gz"
    mounts = {"/proc/config.gz": str(config)}
    config.write_bytes(
        gzip.compress(b"CONFIG_USERFAULTFD=y\n# CONFIG_IO_URING is not set\nCONFIG_TEST_HMM=m\n")
    )
    report = confine(mounts=mounts)
    one = check(report, "config")
    assert one["status"] == "limited"
    assert complete(one)
    assert "CONFIG_IO_URING=y" in one["command"]
    assert "CONFIG_USERFAULTFD" not in one["command"]
    assert check(report, "hmm_dmirror")["command"] == "sudo modprobe test_hmm"
    config.write_bytes(b"not gzip")
    assert check(confine(mounts=mounts), "config")["status"] in ("unknown", "ok", "limited")


def test_yama_is_told_of_where_it_hides_system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    who = Privileges(1000, frozenset(), no_new_privs=False, seccomp=False, user_namespace=False)
    monkeypatch.setattr(kernel, "sysctl", lambda _: 1)
    (one,) = [found for found in kernel.checks(who) if found.name == "ptrace_scope"]
    assert one.status is Status.LIMITED
    assert one.command.startswith("sudo sysctl -w kernel.yama.ptrace_scope=0")
    monkeypatch.setattr(kernel, "sysctl", lambda _: None)
    assert all(found.name != "ptrace_scope" for found in kernel.checks(who))


# Threads that block SIGBUS.


def test_threads_that_block_sigbus_are_named_until_they_do_not() -> None:
    one = check(confine(block=["SIGBUS"]), "blocked_sigbus")
    assert one["status"] == "limited"
    assert complete(one)
    assert one["data"]["blocking"]
    assert check(run(*RUN, "--json", code=None), "blocked_sigbus")["status"] == "ok"


def test_the_threads_of_another_process_are_looked_at() -> None:
    ready, end = threading.Event(), threading.Event()
    tid = 0

    def block() -> None:
        nonlocal tid
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
        tid = threading.get_native_id()
        ready.set()
        end.wait()

    thread = threading.Thread(target=block)
    thread.start()
    try:
        assert ready.wait(10)
        one = check(run(*RUN, "--json", "--pid", str(os.getpid()), code=None), "blocked_sigbus")
        assert tid in [found["tid"] for found in one["data"]["blocking"]]
        assert str(os.getpid()) in one["value"]
    finally:
        end.set()
        thread.join()


def test_threads_of_pymirror_block_all_signals_and_are_not_counted() -> None:
    def holds() -> bool:
        before = in_process("blocked_sigbus", examine()).data
        with pm.AddressSpace() as mm, pm.Mirror(mm) as mirror:
            region = mm.mmap(4096)
            with mirror.range(region.addr, region.addr + 4096):
                now = in_process("blocked_sigbus", examine()).data
                tasks = len(os.listdir("/proc/self/task"))
                return now["blocking"] == before["blocking"] and now["threads"] == tasks > before["threads"]

    # A thread that an earlier test has joined may be in /proc a moment longer.
    eventually(holds)


def test_a_process_that_is_not_there() -> None:
    done = subprocess.run(
        [*RUN, "--pid", str(2**22 + 1)], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (EXIT_REFUSED, "")
    assert "ESRCH" in done.stderr


# The text.


def text_of(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=50).stdout.splitlines()


def test_the_text_ends_with_a_verdict_of_two_lines_and_is_plain_when_piped() -> None:
    works, does_not = text_of(*confined.command({"seccomp": REFUSALS["io_uring"]}, *RUN))[-2:]
    assert works.startswith("Works here: mirroring;")
    assert does_not.startswith("Does not: ")
    assert "pinning" in does_not
    assert "What helps most: " in does_not
    assert "\x1b" not in works + does_not


def test_the_text_has_every_check_with_what_to_do() -> None:
    lines = text_of(*confined.command({"seccomp": REFUSALS["populate"]}, *RUN))
    for name in NAMES:
        assert any(line.split()[1:2] == [name] for line in lines), name
    at = next(number for number, line in enumerate(lines) if line.split()[1:2] == ["populate"])
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["lost:", "why:", "do:"]


def test_checks_leave_nothing_and_may_be_made_beside_an_open_address_space() -> None:
    with pm.AddressSpace():
        assert examine().ok == examine().ok
