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


#: Methods by what they are called with that has to be an integer, one at a time.
METHODS: dict[str, Callable[[World, Any], object]] = {
    "AddressSpace.find_vma(addr)": lambda w, wrong: w.mm.find_vma(wrong),
    "AddressSpace.vma_lookup(addr)": lambda w, wrong: w.mm.vma_lookup(wrong),
    "AddressSpace.vmas(start)": lambda w, wrong: w.mm.vmas(wrong),
    "AddressSpace.vmas(end)": lambda w, wrong: w.mm.vmas(0, wrong),
    "AddressSpace.mmap(size)": lambda w, wrong: w.mm.mmap(wrong),
    "AddressSpace.mmap(fd)": lambda w, wrong: w.mm.mmap(PAGE, fd=wrong),
    "AddressSpace.munmap(size)": lambda w, wrong: w.mm.munmap(w.start, wrong),
    "AddressSpace.mremap(new_size)": lambda w, wrong: w.mm.mremap(w.start, PAGE, wrong),
    "AddressSpace.mremap(flags)": lambda w, wrong: w.mm.mremap(w.start, PAGE, PAGE, flags=wrong),
    "AddressSpace.watch(start)": lambda w, wrong: w.mm.watch(wrong, w.end),
    "Mirror.range(start)": lambda w, wrong: w.driver.range(wrong, w.end),
    "PageTable.entries(end)": lambda w, wrong: w.table.entries(w.start, wrong),
    "PageTable.clear(start)": lambda w, wrong: w.table.clear(wrong, w.end),
    "PageTable.who_mapped(addr)": lambda w, wrong: w.table.who_mapped(wrong),
    "Device.dma_read(daddr)": lambda w, wrong: w.device.dma_read(wrong, 8),
    "Device.dma_read(size)": lambda w, wrong: w.device.dma_read(w.daddr, wrong),
    "Device.dma_write(daddr)": lambda w, wrong: w.device.dma_write(wrong, b"x"),
    "DeviceMemory.holds(start)": lambda w, wrong: w.vram.holds(wrong, w.end),
    "DeviceMemory(size)": lambda w, wrong: pm.DeviceMemory(w.device, wrong),
    "Device.read(addr)": lambda w, wrong: w.device.read(w.mm, wrong, 8),
    "Device.atomic_add(addr)": lambda w, wrong: w.device.atomic_add(w.mm, wrong, 1),
    "PinnedPages.read(offset)": lambda w, wrong: w.pin.read(wrong, 8),
    "PinnedPages.write(offset)": lambda w, wrong: w.pin.write(wrong, b"x"),
    "AddressSpace.madvise(advice)": lambda w, wrong: w.mm.madvise(w.start, PAGE, wrong),
    "AddressSpace.mprotect(prot)": lambda w, wrong: w.mm.mprotect(w.start, PAGE, wrong),
    "FaultBuffer(size)": lambda w, wrong: pm.FaultBuffer(wrong),
    "HmmDmaMap.entries(start)": lambda w, wrong: w.dma_map.entries(wrong, w.end),
    "IommuDomain(first)": lambda w, wrong: pm.IommuDomain(first=wrong),
    "IommuDomain.mapping_of(cookie)": lambda w, wrong: w.domain.mapping_of(wrong),
    "Device(mask)": lambda w, wrong: pm.Device("d1", dma_mask=wrong),
    "AddressSpace(queue_length)": lambda w, wrong: pm.AddressSpace(queue_length=wrong),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_number_for_a_method(made: World, name: str) -> None:
    place = name[name.index("(") + 1 : -1]
    for wrong in ("wrong", object(), [1], 2.5):
        with pytest.raises(TypeError, match=f" {place}=.* cannot be interpreted as an integer"):
            METHODS[name](made, wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w.mm.sync(timeout="soon"),
        lambda w: w.sub.read_begin(timeout="soon"),
        lambda w: w.whole.unregister(timeout="soon"),
        lambda w: pm.DeviceMemory(w.device, PAGE, timeslice="soon"),
    ],
    ids=["sync", "read_begin", "unregister", "timeslice"],
)
def test_no_time(made: World, call: Callable[[World], object]) -> None:
    with pytest.raises(TypeError, match=r" (timeout|timeslice)='soon'"):
        call(made)


class TestSpans:
    def test_pages_that_device_memory_holds(self, made: World) -> None:
        """No array is made for an interval that is none, whether the memory serves an mm or not."""
        for vram in (made.vram, pm.DeviceMemory(made.device, PAGE)):
            for start, end in ((-PAGE, PAGE), (PAGE, 0), (0, 1 << 70), (1, PAGE)):
                with pytest.raises(pm.MirrorError) as refused:
                    vram.holds(start, end)
                assert refused.value.errno == errno.EINVAL
