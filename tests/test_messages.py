"""What is said of a mistake: the errno by name, the address, the vma that is there, and what to do."""

from __future__ import annotations

import ast
import errno
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import World, world
from mistakes import ADDRESS, HOLE, MISTAKES, NOTHING, PLACE, VMA, Mistake
from seams import inject, needs

import pymirror as pm
from pymirror.errors import errno_name

PACKAGE = Path(pm.__file__).parent


@pytest.fixture
def made(nothing_left_behind: None) -> Iterator[World]:
    needs("uffd_events", "pagemap", "io_uring")
    with world() as made:
        yield made


def said_of(mistake: Mistake, made: World) -> pm.MirrorError:
    with pytest.raises(pm.MirrorError) as refused:
        mistake.make(made)
    return refused.value


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake(made: World, mistake: Mistake) -> None:
    error = said_of(mistake, made)
    text = str(error)
    assert errno_name(error.errno or 0) == errno_name(mistake.number), text
    assert text.startswith(f"[Errno {mistake.number}] {errno_name(mistake.number)}: "), text
    assert error.hint
    assert text.endswith(f"; do: {error.hint}")
    kinds = {VMA: {VMA}, HOLE: {HOLE}, PLACE: {VMA, HOLE}, ADDRESS: {ADDRESS}, NOTHING: {NOTHING}}
    assert named_by(error) in kinds[mistake.names], text


def named_by(error: pm.MirrorError) -> str:
    """What the text names; the attributes say the same."""
    text = str(error)
    if error.addr is None:
        assert error.vma is None
        return NOTHING
    assert re.search(rf"{error.addr:#x}(?![0-9a-f])", text), text
    if error.vma is not None:
        assert f"; vma: {error.vma}; do: " in text
        return VMA
    return HOLE if "(in no vma)" in text else ADDRESS


def test_each_errno_is_provoked_once_at_least() -> None:
    page = (PACKAGE.parent / "docs" / "api.md").read_text()
    told = set(re.findall(r"^\| (E[A-Z]+) \|", page, re.MULTILINE))
    assert told
    assert told <= {errno_name(mistake.number) for mistake in MISTAKES}


def test_who_calls_in_a_callback_is_told_in_which(made: World) -> None:
    mistake = next(one for one in MISTAKES if one.name == "munmap_in_a_callback")
    addr = made.held.addr
    assert f"invalidate of <IntervalNotifier {addr:#x}-" in str(said_of(mistake, made))


def test_a_float_is_no_address(made: World) -> None:
    """As of Python's own functions: buf.addr + buf.size / 2 is a common slip."""
    half = made.start + (made.end - made.start) / 2
    for call in (
        lambda: made.driver.range(made.start, half),
        lambda: made.mm.munmap(half, 4096),
        lambda: made.device.read(made.mm, half, 8),
        lambda: made.table.clear(made.start, half),
        lambda: made.mm.watch(made.start, half),
        lambda: pm.IntervalNotifier(made.mm, half, 4096, print),
    ):
        with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
            call()


@pytest.mark.parametrize("kind", [pm.MmuNotifier, pm.Mirror, pm.IntervalNotifier])
def test_a_forgotten_super_init_is_told(kind: type) -> None:
    class Forgets(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            self.mine = 1

    made = Forgets()
    with pytest.raises(AttributeError, match=r"'mm': .*; do: call super\(\).__init__\(mm, ...\) in Forgets"):
        made.mm  # noqa: B018
    assert made.mine == 1


def test_other_missing_attributes_are_as_ever(mm: pm.AddressSpace) -> None:
    for notifier in (pm.Mirror(mm), pm.IntervalNotifier(mm, 0, 4096, print)):
        with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
            notifier.nothing  # noqa: B018


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ENOSYS])
def test_what_nobody_expects_has_a_remedy_too(made: World, number: int) -> None:
    # What earlier tests left in cycles unmaps memory too, when it is collected.
    gc.collect()
    with inject("MUNMAP", err=number), pytest.raises(pm.MirrorError) as refused:
        made.mm.munmap(made.start, 4096)
    assert refused.value.hint
    assert named_by(refused.value) == VMA


def test_every_error_that_is_raised_has_a_hint() -> None:
    """In the source: none can be forgotten."""
    without = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if getattr(node.func, "id", "") == "MirrorError" and "hint" not in {
                word.arg for word in node.keywords
            }:
                without.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert without == []
