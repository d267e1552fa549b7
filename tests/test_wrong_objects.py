"""Every public function with an object of another kind in each of its places is refused by name."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from calls import World, world
from mirroring import FAULT, PAGE

import pymirror as pm


@pytest.fixture(scope="module")
def made() -> Iterator[World]:
    with world() as made:
        yield made
        made.device.release()


#: By the name of a parameter: what is right, and by the same name what refusals say.
OBJECTS: dict[str, Callable[[World], object]] = {
    "mm": lambda w: w.mm,
    "dev": lambda w: w.device,
    "device": lambda w: w.device,
    "vram": lambda w: w.vram,
    "sub": lambda w: w.sub,
    "notifier": lambda w: w.sub,
    "rng": lambda w: w.rng,
    "map": lambda w: w.dma_map,
    "pin": lambda w: w.other_pin,
    "args": lambda w: w.migrated,
    "state": lambda w: pm.dma_iova_try_alloc(w.device, 8),
    "sgl": lambda w: w.sgl,
    "sg": lambda w: w.sgl[0],
}
NUMBERS: dict[str, Callable[[World], int]] = {
    "start": lambda w: w.start,
    "end": lambda w: w.end,
    "addr": lambda w: w.start,
    "length": lambda w: PAGE,
    "npages": lambda w: 1,
    "nr_entries": lambda w: 4,
    "n": lambda w: 1,
    "idx": lambda w: 0,
    "first": lambda w: 0,
    "offset": lambda w: 0,
    "size": lambda w: 8,
    "nents": lambda w: 1,
    "mask": lambda w: pm.DMA_BIT_MASK(64),
    "mapped_len": lambda w: 8,
    "dma_handle": lambda w: w.daddr,
    "phys": lambda w: 0,
}
OTHERS: dict[str, Callable[[World], object]] = {
    "direction": lambda w: pm.DMA_TO_DEVICE,
    "seq": lambda w: w.seq,
    "pfns": lambda w: np.zeros(4, np.uint64),
    "pfn": lambda w: w.vram.pfns.start,
    "entry": lambda w: w.rng.pfns,
    "owner": lambda w: w.device,
    "buffer": lambda w: w.content,
    "ptr": lambda w: w.content,
    "page": lambda w: w.own,
    "cpu": lambda w: memoryview(w.content),
    "default_flags": lambda w: FAULT,
}
RIGHT: dict[str, Callable[[World], object]] = OBJECTS | NUMBERS | OTHERS
FUNCTIONS = {
    name: value for name in pm.__all__ if inspect.isroutine(value := getattr(pm, name)) and name != "sg_list"
}
CLASSES = {"MmuNotifier": pm.MmuNotifier, "Mirror": pm.Mirror, "IntervalNotifier": pm.IntervalNotifier}


def parameters(call: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(call).parameters)


def places(kind: dict[str, Any]) -> list[tuple[str, str]]:
    """(function, parameter) of these."""
    every = (FUNCTIONS | CLASSES).items()
    return [(name, one) for name, call in every for one in parameters(call) if one in kind]


def call_with(made: World, name: str, place: str, wrong: object) -> None:
    call = (FUNCTIONS | CLASSES)[name]
    positional, named = [], {}
    for one in parameters(call).values():
        if one.name == place:
            value = wrong
        elif one.default is not one.empty:
            continue
        else:
            value = RIGHT[one.name](made)
        if one.kind is one.KEYWORD_ONLY:
            named[one.name] = value
        else:
            positional.append(value)
    call(*positional, **named)


def may_be_none(name: str, place: str) -> bool:
    given: object = parameters((FUNCTIONS | CLASSES)[name])[place].default
    return given is None or (name, place) == ("dma_use_iova", "state")


def half_built(kind: type) -> object:
    return kind.__new__(kind)


WRONG: dict[str, object] = {
    "None": None,
    "text": "wrong",
    "object": object(),
    "array": np.zeros(3, np.float32),
    "half-built mm": half_built(pm.AddressSpace),
    "half-built device": half_built(pm.Device),
}


@pytest.mark.parametrize(("name", "place"), places(OBJECTS))
def test_another_kind_of_object(made: World, name: str, place: str) -> None:
    for wrong in WRONG.values():
        if wrong is None and may_be_none(name, place):
            continue
        if isinstance(wrong, np.ndarray | str) and place == "sgl":
            continue
        with pytest.raises(pm.MirrorError) as refused:
            call_with(made, name, place, wrong)
        assert refused.value.errno == errno.EINVAL, str(refused.value)
        assert refused.value.hint


@pytest.mark.parametrize(("name", "place"), places(NUMBERS))
def test_no_number(made: World, name: str, place: str) -> None:
    for wrong in ("wrong", object(), [1], 2.5):
        with pytest.raises(TypeError, match=f" {place}=.* cannot be interpreted as an integer"):
            call_with(made, name, place, wrong)


def test_every_parameter_is_known() -> None:
    """So that a new function is tried as well."""
    needed = {
        one.name
        for call in (FUNCTIONS | CLASSES).values()
        for one in parameters(call).values()
        if one.default is one.empty
    }
    assert needed <= set(RIGHT)


class TestSpans:
    def test_pages_that_device_memory_holds(self, made: World) -> None:
        """No array is made for an interval that is none, whether the memory serves an mm or not."""
        for vram in (made.vram, pm.DeviceMemory(made.device, PAGE)):
            for start, end in ((-PAGE, PAGE), (PAGE, 0), (0, 1 << 70), (1, PAGE)):
                with pytest.raises(pm.MirrorError) as refused:
                    vram.holds(start, end)
                assert refused.value.errno == errno.EINVAL
