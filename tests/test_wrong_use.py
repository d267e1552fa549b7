"""Calls where they may not be made: the errno, what it says, and nothing changed."""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Iterator

import pytest
from calls import CALLS, OK, VALUES, Call, World, world
from mirroring import PAGE
from notifying import interval
from racing import in_child
from seams import foreign, needs

import pymirror as pm

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def made(nothing_left_behind: None) -> Iterator[World]:
    with world() as made:
        yield made


def outcome(call: Call, made: World) -> int:
    """0 or the errno; and a refusal is one of the library's, that says what to do."""
    refusal: pm.MirrorError | None = None
    try:
        call.run(made)
    except pm.MirrorError as error:
        refusal = error
    if refusal is None:
        return OK
    assert refusal.hint, call.name
    assert f"; do: {refusal.hint}" in str(refusal), call.name
    return refusal.errno or -1


def test_the_table_has_every_public_method() -> None:
    classes = [name for name in pm.__all__ if inspect.isclass(getattr(pm, name)) and name not in VALUES]
    plain = {dir_name for base in (object, OSError, int, str) for dir_name in dir(base)}
    public = {
        f"{name}.{method}"
        for name in classes
        if not issubclass(getattr(pm, name), (OSError, int, str))
        for method in dir(getattr(pm, name))
        if not method.startswith("_") and method not in plain
    }
    assert public <= {call.name for call in CALLS}
    functions = {name for name in pm.__all__ if inspect.isroutine(getattr(pm, name))}
    assert functions <= {call.name for call in CALLS}


class TestWhere:
    def test_in_a_callback(self, made: World) -> None:
        found: dict[str, int] = {}
        elsewhere = made.mm.mmap(PAGE)

        def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            for call in CALLS:
                found[call.name] = outcome(call, made)
            return True

        sub = interval(made.mm, elsewhere.addr, 1, take)
        before = made.state()
        with made.mm.invalidate(elsewhere.addr, elsewhere.addr + PAGE):
            pass
        after = made.state()
        sub.remove()
        assert found == {call.name: call.callback for call in CALLS}
        before["invalidate_seq"] = after["invalidate_seq"]
        assert after == before

    def test_in_a_callback_of_the_dispatcher(self, made: World) -> None:
        needs("uffd_events")
        found: dict[str, int] = {}
        victim = made.mm.mmap(PAGE)

        def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> bool:
            sub.set_seq(seq)
            for call in CALLS:
                found[call.name] = outcome(call, made)
            return True

        sub = interval(made.mm, victim.addr, 1, take)
        foreign.munmap(victim.addr, PAGE)
        made.mm.sync()
        sub.remove()
        assert found == {call.name: call.callback for call in CALLS}

    def test_under_a_driver_lock(self, made: World) -> None:
        refused = [call for call in CALLS if call.locked != OK]
        before = made.state()
        with made.lock:
            assert {call.name: outcome(call, made) for call in refused} == {
                call.name: call.locked for call in refused
            }
        assert made.state() == before

    def test_what_may_be_called_under_a_driver_lock(self, made: World) -> None:
        for call in (call for call in CALLS if call.locked == OK):
            with world() as fresh, fresh.lock:
                assert outcome(call, fresh) == OK, call.name

    def test_after_close(self, made: World) -> None:
        made.mm.close()
        for call in CALLS:
            if call.name != "Region.close":
                assert outcome(call, made) == call.closed, call.name
        assert bytes(made.buf) == made.content
        made.buf.close()

    def test_after_close_the_answers_are_those_of_the_dead(self, made: World) -> None:
        made.mm.close()
        assert not made.rng.valid
        assert made.rng.wait_until_valid() is False
        assert made.rng.read_retry(made.seq)
        assert made.sub.read_retry(made.sub_seq)
        assert made.table.map(made.rng, made.seq) is False
        assert not made.driver.mm_is_alive()
        assert made.driver.hmm.dead
        assert not made.whole.registered

    def test_in_a_forked_child(self, made: World) -> None:
        def child() -> None:
            for call in CALLS:
                found = outcome(call, made)
                assert found == call.child, f"{call.name}: {errno.errorcode.get(found, found)}"
            assert bytes(made.buf) == made.content

        before = made.state()
        assert in_child(child) == 0
        made.mm.sync()
        after = made.state()
        # The fork itself has invalidated.
        for name in ("invalidate_seq", "entries", "table"):
            before[name] = after[name]
        assert after == before

    def test_in_a_child_of_a_closed_one(self, made: World) -> None:
        made.mm.close()
        for call in CALLS:
            if call.name != "Region.close":
                assert in_child(lambda call=call: outcome(call, made)) == 0, call.name  # type: ignore[misc]

    @pytest.mark.parametrize(
        "call", [call for call in CALLS if call.child == errno.ESRCH], ids=lambda call: call.name
    )
    def test_a_refusal_in_a_child_says_whose_it_is(self, made: World, call: Call) -> None:
        read, write = os.pipe()

        def child() -> None:
            with pytest.raises(pm.MirrorError) as refused:
                call.run(made)
            os.write(write, str(refused.value).encode())

        assert in_child(child) == 0
        text = os.read(read, 4096).decode()
        os.close(read)
        os.close(write)
        assert "belongs to " in text
        assert "process" in text
        assert "open a new AddressSpace" in text
