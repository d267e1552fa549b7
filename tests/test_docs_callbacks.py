"""The table of what a callback may call (docs/api.md), row by row: each call is made in a callback."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from inspect import getattr_static

import pytest
from calls import CALLS, OK, Call, world
from docpages import ROOT
from notifying import interval
from test_wrong_use import outcome

import pymirror as pm

#: What the library calls, and a driver overrides.
CALLBACKS = {
    *(f"IntervalNotifier.{name}" for name in ("invalidate", "invalidate_start", "invalidate_finish")),
    *(f"{cls}.{name}" for cls in ("MmuNotifier", "Mirror") for name in ("invalidate_range_start", "release")),
    *(f"{cls}.invalidate_range_end" for cls in ("MmuNotifier", "Mirror")),
    "Mirror.sync_cpu_device_pagetables",
    "PageTable.access",
}
SET_SEQ = "IntervalNotifier.set_seq"
BY_NAME = {call.name: call for call in CALLS if call.name not in CALLBACKS}


@dataclass(frozen=True)
class Row:
    text: str
    verdict: str

    @property
    def names(self) -> list[str]:
        found: list[str] = []
        owner = ""
        for name in re.findall(r"`([^`]+)`", self.text):
            if "." in name:
                owner = name.partition(".")[0]
            elif owner and hasattr(getattr(pm, owner), name):
                name = f"{owner}.{name}"
            found.append(name)
        return found


def table() -> list[Row]:
    text = (ROOT / "docs" / "api.md").read_text()
    lines = text.partition("| call | in a callback |")[2].partition("\n\n")[0].splitlines()[2:]
    return [Row(*(cell.strip() for cell in line.split("|")[1:3])) for line in lines]


def is_attribute(name: str) -> bool:
    owner, _, member = name.partition(".")
    if not member:
        return False
    found = getattr_static(getattr(pm, owner), member, None)
    return not callable(found) and not isinstance(found, (classmethod, staticmethod))


ROWS = table()
EXACT = {name for row in ROWS for name in row.names if "*" not in name}


def calls_of(row: Row) -> list[Call]:
    if row.text.startswith("every attribute"):
        assert all(is_attribute(name) for name in row.names)
        return [call for name, call in BY_NAME.items() if is_attribute(name)]
    patterns = [name for name in row.names if "*" in name]
    found = [name for name in row.names if "*" not in name]
    for pattern in patterns:
        matching = [name for name in BY_NAME if fnmatch(name, pattern) and not is_attribute(name)]
        assert matching, pattern
        found += [name for name in matching if name not in EXACT]
    # In the order in which they leave the others something.
    return sorted((BY_NAME[name] for name in found), key=CALLS.index)


def test_every_call_stands_in_one_row() -> None:
    named = [call.name for row in ROWS for call in calls_of(row)]
    assert sorted(named) == sorted(BY_NAME)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_a_row(row: Row, nothing_left_behind: None) -> None:
    wanted = {"yes": OK, "`EDEADLK`": errno.EDEADLK}[row.verdict]
    found: dict[str, int] = {}

    def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
        sub.set_seq(seq)
        found[SET_SEQ] = OK
        for call in calls_of(row):
            if call.name != SET_SEQ:
                found[call.name] = outcome(call, made)
        return True

    with world() as made:
        victim = made.mm.mmap(4096)
        sub = interval(made.mm, victim.addr, 1, take)
        with made.mm.invalidate(victim.addr, victim.addr + 4096):
            pass
        sub.remove()
        assert not made.mm.errors
    assert {call.name: found[call.name] for call in calls_of(row)} == dict.fromkeys(
        (call.name for call in calls_of(row)), wanted
    )


def test_the_rows_tell_yes_from_no() -> None:
    assert {row.verdict for row in ROWS} == {"yes", "`EDEADLK`"}
