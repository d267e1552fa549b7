# SPDX-License-Identifier: MIT
"""Every public method and function, each system call of it failed once: refused, and it works afterwards."""

from __future__ import annotations

import errno
import threading
from functools import partial

import pytest
import tally
from calls import CALLS, OK, Call, World, world
from injecting import ERRORS, apart, errors_at
from seams import inject, needs

import pymirror as pm
from pymirror._shim import lib

KIND = "fault injection, every public call"
MOST = 1000
#: What a call may say besides the errno of what failed in it: it says what that means to its caller.
MEANINGS = frozenset({errno.EBUSY, errno.EAGAIN, errno.ENOMEM, errno.EFAULT, errno.EINVAL})


@pytest.fixture(autouse=True)
def features() -> None:
    needs("uffd_events", "pagemap", "move")


def undisturbed(call: Call) -> tuple[int, list[str]]:
    """What it gives, and the kinds of calls that it makes."""
    with world() as made:
        before = {kind: lib.pm_sys_calls(getattr(lib, f"PM_SYS_{kind}")) for kind in ERRORS}
        outcome = refusal_of(call, made)
        made_calls = (
            kind for kind, n in before.items() if lib.pm_sys_calls(getattr(lib, f"PM_SYS_{kind}")) > n
        )
        return outcome, list(made_calls)


def refusal_of(call: Call, made: World) -> int:
    try:
        call.run(made)
    except pm.MirrorError as error:
        return error.errno or -1
    return OK


def intact(made: World) -> bool:
    return made.buf.closed or bytes(made.buf) == made.content


def attempt(call: Call, outcome: int, kind: str, number: int, nth: int) -> bool:
    what = f"{call.name}: {kind} {nth} {errno.errorcode[number]}"
    with world() as made:
        before = made.state()
        with inject(kind, nth, number, tid=threading.get_native_id()) as injection:
            refusal = refusal_of(call, made)
        assert refusal in MEANINGS | {OK, outcome, number}, (
            f"{what} gave {errno.errorcode.get(refusal, refusal)}"
        )
        if refusal != outcome:
            assert injection.struck, f"{what}: a refusal of itself"
            assert intact(made), what
            assert made.state()["left"] == before["left"], what
            assert made.table.verify(made.start, made.end) is None, what
            assert not made.mm.errors, what
            again = refusal_of(call, made)
            assert again == outcome, f"{what}, and then {errno.errorcode.get(again, again)}"
        return injection.struck > 0


@pytest.mark.root
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_one_call_that_fails(call: Call) -> None:
    tally.add(KIND, operations=1)
    with tally.timed(KIND):
        outcome, kinds = undisturbed(call)
        for kind in kinds:
            nth = 1
            while True:
                tried = [
                    apart(kind, partial(attempt, call, outcome, kind, number, nth))
                    for number in errors_at(call.name, kind, nth)
                ]
                tally.add(KIND, faults_injected=sum(tried))
                if not any(tried):
                    break
                nth += 1
                assert nth < MOST
