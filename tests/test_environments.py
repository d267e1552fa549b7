"""Where less is to be had - an ordinary user, a container, a sandbox - each use works or says what it lacks.

Each environment is made here, each use is tried in it (environment_trials.py), and the doctor is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import confined
import pytest
from conftest import CAP_SYS_ADMIN
from environment_trials import TRIALS
from seams import needs
from test_doctor import NOBODY, REFUSALS, check, complete, confine, grant_by_acl

from pymirror.features import DISABLE_VARIABLE, FEATURES

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("nothing_switched_off")]

API = Path(__file__).parent.parent / "docs" / "api.md"
PROGRAM = Path(__file__).with_name("environment_trials.py")
CAP_SYS_PTRACE = 19
LOST = "lost"
BY_THREAD = (
    "device memory",
    "coherent memory",
    "huge page on a device",
    "copies of a file",
    "system call",
    "exclusive",
)
NO_PFNS = {"PFNs": LOST, "coherent memory": "pfn"}
NO_UFFD_KERNEL = dict.fromkeys(BY_THREAD, "uffd_kernel")
UNWATCHED = {"foreign change": LOST, "present at a fork": LOST}
NO_EVENTS = dict.fromkeys((*BY_THREAD, "device memory, inline"), "uffd_events") | UNWATCHED
NO_UFFD = NO_UFFD_KERNEL | {"device memory, inline": "sigbus"} | UNWATCHED
ALL_BUT_PINS = [name for name in TRIALS if name != "pin"]
#: What is lost with a feature off, by trial: the feature that a refusal names, or LOST without a refusal.
LOSSES: dict[str, dict[str, str]] = {
    "uffd": NO_UFFD,
    "uffd_kernel": NO_UFFD_KERNEL,
    "wp_async": {"present at a fork": LOST, "copies of a file": LOST},
    "wp_unpopulated": {},
    "uffd_events": NO_EVENTS,
    "event_fork": {},
    "move": {"coherent memory": "move", "huge page on a device": LOST},
    "sigbus": {"device memory, inline": "sigbus"},
    "pagemap": dict.fromkeys(ALL_BUT_PINS, "pagemap"),
    "pfn": NO_PFNS,
    "pagemap_scan": {"huge pages": LOST, "huge page on a device": LOST},
    "procmap_query": {},
    "populate": {},
    "process_vm": {"mirror": "process_vm"},
    "io_uring": {"pin": "io_uring"},
    "guard": {"copies of a file": LOST},
    "pfn,pagemap_scan": {**NO_PFNS, "huge pages": LOST, "huge page on a device": LOST},
    "move,pagemap_scan,procmap_query,wp_async,io_uring,pfn": {
        **NO_PFNS,
        "huge pages": LOST,
        "huge page on a device": LOST,
        "present at a fork": LOST,
        "copies of a file": LOST,
        "pin": "io_uring",
    },
    "populate,process_vm": {"mirror": "process_vm", "foreign change": "populate", "exclusive": "populate"},
}


class Environment(NamedTuple):
    """``refused``: by trial, the feature that it lacks; all other trials go well. ``told``: in the doctor's
    command for each feature that is missing.
    """

    confinement: dict[str, Any]
    refused: dict[str, str]
    told: dict[str, str]


ENVIRONMENTS = {
    "root": Environment({}, {}, {}),
    "an ordinary user": Environment(
        {"user": NOBODY},
        NO_UFFD_KERNEL | {"PFNs": LOST},
        {"uffd_kernel": "setfacl", "pfn": "setpriv", "event_fork": "setpriv"},
    ),
    "a container without CAP_SYS_PTRACE": Environment(
        {"drop": [CAP_SYS_PTRACE]}, {}, {"event_fork": "--cap-add=SYS_PTRACE"}
    ),
    "a container without CAP_SYS_ADMIN": Environment(
        {"drop": [CAP_SYS_ADMIN]}, NO_PFNS, {"pfn": "--cap-add=SYS_ADMIN"}
    ),
    "a user in a container": Environment(
        {"user": NOBODY, "drop": [CAP_SYS_PTRACE, CAP_SYS_ADMIN]},
        NO_UFFD_KERNEL | {"PFNs": LOST},
        {"pfn": "--cap-add=SYS_ADMIN", "event_fork": "--cap-add=SYS_PTRACE"},
    ),
    "a filter that refuses userfaultfd": Environment(
        {"seccomp": REFUSALS["uffd"]}, NO_UFFD, {"uffd": "seccomp=unconfined", "sigbus": "seccomp=unconfined"}
    ),
    "a filter that refuses io_uring": Environment(
        {"seccomp": REFUSALS["io_uring"]}, {"pin": "io_uring"}, {"io_uring": "io_uring_setup()"}
    ),
    "a filter that refuses process_vm_writev": Environment(
        {"seccomp": REFUSALS["process_vm"]},
        {"mirror": "process_vm"},
        {"process_vm": "process_vm_writev()"},
    ),
    "a container with its default filter": Environment(
        {
            "drop": [CAP_SYS_PTRACE, CAP_SYS_ADMIN],
            "seccomp": REFUSALS["uffd"] + REFUSALS["io_uring"],
        },
        {**NO_UFFD, "PFNs": LOST, "pin": "io_uring"},
        {"uffd": "seccomp=unconfined", "io_uring": "seccomp=unconfined", "pfn": "--cap-add=SYS_ADMIN"},
    ),
}


def tried(off: str = "", **confinement: Any) -> dict[str, Any]:
    done = subprocess.run(
        confined.command(confinement, sys.executable, str(PROGRAM)),
        capture_output=True,
        text=True,
        timeout=55,
        env=os.environ | {DISABLE_VARIABLE: off},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    outcomes: dict[str, Any] = json.loads(done.stdout)
    return outcomes


def refusals(outcomes: dict[str, Any]) -> dict[str, str]:
    return {trial: found if found == LOST else found["feature"] for trial, found in outcomes.items() if found}


def test_the_losses_are_those_of_every_feature_and_the_table_has_them() -> None:
    assert [name for name in LOSSES if "," not in name] == [feature.name for feature in FEATURES]
    table = "\n".join(f"| `{feature.name}` | {feature.lost} |" for feature in FEATURES)
    assert f"| feature | without it |\n| --- | --- |\n{table}\n" in API.read_text()


@pytest.mark.parametrize("off", LOSSES)
def test_without_a_feature_its_loss_is_all_that_is_lost(off: str) -> None:
    needs(*(feature.name for feature in FEATURES))
    assert refusals(tried(off)) == LOSSES[off]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_use_works_or_names_what_it_lacks_and_so_does_the_doctor(name: str) -> None:
    needs(*(feature.name for feature in FEATURES))
    confinement, refused, told = ENVIRONMENTS[name]
    outcomes = tried(**confinement)
    assert set(outcomes) == set(TRIALS)
    assert refusals(outcomes) == refused
    report = confine(code=None, **confinement)
    for found in outcomes.values():
        if found in (None, LOST):
            continue
        one = check(report, found["feature"])
        assert one["status"] == "missing"
        assert one["data"]["errno"] == found["errno"]
        assert complete(one)
        assert found["command"]
    for feature, words in told.items():
        assert words in check(report, feature)["command"], feature


def test_the_device_node_gives_an_ordinary_user_device_memory(node_of_others: str) -> None:
    mounts = {"/dev/userfaultfd": node_of_others}
    assert refusals(tried(user=NOBODY, mounts=mounts)) == NO_UFFD_KERNEL | {"PFNs": LOST}
    grant_by_acl(node_of_others, NOBODY)
    assert refusals(tried(user=NOBODY, mounts=mounts)) == NO_PFNS


def test_what_the_doctor_says_of_a_container_without_a_capability_is_what_gives_it() -> None:
    lacking = confine(drop=[CAP_SYS_PTRACE, CAP_SYS_ADMIN])
    one = check(lacking, "event_fork")
    assert "nor in the bounding set: nothing in here gives it" in one["why"]
    assert one["command"] == check(lacking, "pfn")["command"] == lacking["best_command"]
    assert one["command"].startswith("docker run --cap-add=SYS_ADMIN --cap-add=SYS_PTRACE ...")
    assert check(confine(drop=[CAP_SYS_ADMIN]), "event_fork")["status"] == "ok"
    assert check(confine(drop=[CAP_SYS_PTRACE]), "pfn")["status"] == "ok"
