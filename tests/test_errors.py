"""Errors and features: what a refusal says, and what would grant what is missing."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys

import pytest
from seams import errno_of

import pymirror as pm
from pymirror import features
from pymirror.errors import check, errno_name, error

PAGE = 4096


def test_an_error_is_an_oserror_that_names_its_number(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    with pytest.raises(OSError, match="EBUSY") as failed:
        check(-errno.EBUSY, "hmm_range_fault", addr=region.addr, mm=mm)
    found = failed.value
    assert isinstance(found, pm.MirrorError)
    assert found.errno == errno.EBUSY
    assert (found.addr, found.vma) == (region.addr, mm.vma_lookup(region.addr))
    assert found.hint
    assert str(found) == (
        f"[Errno 16] EBUSY: hmm_range_fault at {region.addr:#x}; vma: {found.vma}; do: {found.hint}"
    )


def test_a_hole_is_called_one(mm: pm.AddressSpace) -> None:
    assert "at 0x1000 (in no vma); do:" in str(error(errno.EFAULT, "read", addr=PAGE, mm=mm))
    assert check(5, "read") == 5
    assert check(0, "read") == 0


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.EDEADLK, "EDEADLK"),
        (errno.EAGAIN, "EAGAIN"),
        (errno.EOPNOTSUPP, "EOPNOTSUPP"),
        (133, "EHWPOISON"),
        (9999, "9999"),
    ],
)
def test_numbers_have_the_names_of_the_kernel(number: int, name: str) -> None:
    assert errno_name(number) == name


def test_errors_travel_between_processes(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    for one in (
        error(errno.EFAULT, "read", addr=region.addr, mm=mm),
        pm.FeatureError("pfn", "refused", "sudo true", what="snapshot", errno=errno.EPERM),
    ):
        copy = pickle.loads(pickle.dumps(one))
        assert type(copy) is type(one)
        assert str(copy) == str(one)
        assert vars(copy) == vars(one)


def test_every_feature_says_what_is_lost_and_what_grants_it() -> None:
    names = [feature.name for feature in features.FEATURES]
    assert len(set(names)) == len(names) == pm._lib.PM_FEAT_COUNT
    found = features.probe(names)
    assert found.have == frozenset()
    assert [one.feature for one in found.all_missing()] == names
    for one in found.all_missing():
        assert one.lost
        assert one.reason
        assert "PYMIRROR_DISABLE" in one.command


@pytest.mark.parametrize("why", [errno.EPERM, errno.ENOSYS])
def test_the_reason_decides_the_command(why: int) -> None:
    found = features.Features(frozenset({"pagemap"}), {"pfn": why}, frozenset(), 0, "", 0)
    with pytest.raises(pm.FeatureError) as failed:
        found.require("pfn", "snapshot")
    lost = failed.value
    assert (lost.feature, lost.errno) == ("pfn", why)
    assert lost.command == lost.hint
    assert str(lost).startswith(f"[Errno {why}] {errno_name(why)}: snapshot: feature 'pfn' is missing: ")
    expected = "sudo setpriv --reuid=$USER" if why == errno.EPERM else "boot Linux 4.2 or newer"
    assert lost.command.startswith(expected)


def test_a_feature_that_lacks_what_it_needs_says_so() -> None:
    found = features.Features(frozenset(), {"pagemap": errno.EPERM}, frozenset(), 0, "", 0)
    lost = found.missing("pfn")
    assert lost.errno == errno.EPERM
    assert lost.reason.startswith("it needs 'pagemap', which is missing too: refused: EPERM")
    assert lost.command == found.missing("pagemap").command
    assert lost.lost != found.missing("pagemap").lost


def test_features_are_switched_off_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMIRROR_DISABLE", raising=False)
    with pm.AddressSpace(disable=["pfn", "procmap_query"]) as mm:
        assert "pfn" not in mm.features
        assert mm.features.disabled == {"pfn", "procmap_query"}
        assert next(mm.vmas()).start > 0
        assert errno_of(mm.features.require, "pfn") == errno.EOPNOTSUPP
    assert errno_of(pm.AddressSpace, disable=["pfns"]) == errno.EINVAL


def test_the_environment_switches_features_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMIRROR_DISABLE", "pagemap_scan, io_uring")
    with pm.AddressSpace(disable=["pfn"]) as mm:
        assert mm.features.disabled == {"pagemap_scan", "io_uring", "pfn"}
    monkeypatch.setenv("PYMIRROR_DISABLE", "everything")
    with pytest.raises(pm.MirrorError, match=r"no feature is called 'everything'; do: .*PYMIRROR_DISABLE"):
        pm.AddressSpace()


@pytest.mark.parametrize(
    "options", [{"fault_delivery": "later"}, {"queue_length": 0}, {"queue_length": 1 << 21}]
)
def test_wrong_options_are_einval(options: dict[str, object]) -> None:
    assert errno_of(pm.AddressSpace, **options) == errno.EINVAL


@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_both_fault_deliveries_are_taken(delivery: str) -> None:
    with pm.AddressSpace(fault_delivery=delivery) as mm:
        assert mm.fault_delivery == delivery


def test_a_shim_of_another_version_is_an_import_error() -> None:
    program = (
        "import sys, types\n"
        "version = types.ModuleType('pymirror._version'); version.__version__ = '0.0.0'\n"
        "sys.modules['pymirror._version'] = version\n"
        "import pymirror\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the native shim is of version" in done.stderr
    assert "run: make build" in done.stderr
