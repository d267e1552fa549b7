"""The two-step API: IOVAs first, pieces linked one by one, the kernel's rules on offsets and alignment."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from dma_memory import PAGE, pages, refuses

import pymirror as pm
from pymirror.dma.engine import IommuFaultError


@pytest.fixture
def device() -> Iterator[pm.Device]:
    with pm.Device("d0") as device:
        yield device
        assert device.release() == []


def allocated(device: pm.Device, size: int, phys: int = 0) -> pm.DmaIovaState:
    state = pm.dma_iova_try_alloc(device, size, phys)
    assert state is not None
    assert pm.dma_use_iova(state)
    return state


def test_pieces_from_here_and_there_are_one_run_of_iovas(device: pm.Device) -> None:
    one, other = pages(2), pages(3)
    state = allocated(device, 4 * PAGE)
    pm.dma_iova_link(device, state, one, 0, 2 * PAGE, pm.DMA_TO_DEVICE)
    pm.dma_iova_link(device, state, other, 2 * PAGE, PAGE, pm.DMA_TO_DEVICE, at=2 * PAGE)
    pm.dma_iova_link(device, state, other, 3 * PAGE, 100, pm.DMA_TO_DEVICE)
    pm.dma_iova_sync(device, state, 0, 3 * PAGE + 100)
    want = one.tobytes() + other[2 * PAGE :].tobytes() + other[:100].tobytes()
    assert device.dma_read(state.addr, 3 * PAGE + 100) == want
    assert state.linked == 3 * PAGE + 100
    pm.dma_iova_destroy(device, state, 3 * PAGE + 100, pm.DMA_TO_DEVICE)
    assert not pm.dma_use_iova(state)
    assert device.domain.iova_stats()["live"] == 0


def test_the_first_piece_may_begin_within_a_page(device: pm.Device) -> None:
    memory = pages(2)
    start = memory.ctypes.data + 1000
    state = allocated(device, 2 * PAGE - 1000, start)
    assert state.addr % PAGE == 1000
    pm.dma_iova_link(device, state, memory, 0, PAGE - 1000, pm.DMA_TO_DEVICE, at=1000)
    pm.dma_iova_link(device, state, memory, PAGE - 1000, PAGE, pm.DMA_TO_DEVICE, at=PAGE)
    pm.dma_iova_sync(device, state, 0, 2 * PAGE - 1000)
    assert device.dma_read(state.addr, 2 * PAGE - 1000) == memory[1000:].tobytes()
    pm.dma_iova_destroy(device, state, 2 * PAGE - 1000, pm.DMA_TO_DEVICE)


def test_nothing_is_reached_before_the_sync(device: pm.Device) -> None:
    state = allocated(device, PAGE)
    pm.dma_iova_link(device, state, pages(1), 0, PAGE, pm.DMA_TO_DEVICE)
    with pytest.raises(IommuFaultError):
        device.dma_read(state.addr, 1)
    pm.dma_iova_sync(device, state, 0, PAGE)
    pm.dma_iova_sync(device, state, 0, PAGE)
    device.dma_read(state.addr, 1)
    pm.dma_iova_destroy(device, state, PAGE, pm.DMA_TO_DEVICE)


@pytest.mark.parametrize("strict", [True, False])
def test_an_unlinked_piece_is_gone_and_the_others_are_not(strict: bool) -> None:
    with pm.Device("d0", iommu=pm.IommuDomain(strict=strict)) as device:
        memory, fresh = pages(3), pages(1, fill=9)
        state = allocated(device, 3 * PAGE)
        for i in range(3):
            pm.dma_iova_link(device, state, memory, i * PAGE, PAGE, pm.DMA_TO_DEVICE, at=i * PAGE)
        pm.dma_iova_sync(device, state, 0, 3 * PAGE)
        device.dma_read(state.addr, 3 * PAGE)
        pm.dma_iova_unlink(device, state, PAGE, PAGE, pm.DMA_TO_DEVICE)
        with pytest.raises(IommuFaultError):
            device.dma_read(state.addr + PAGE, 1)
        assert device.dma_read(state.addr + 2 * PAGE, PAGE) == memory[2 * PAGE :].tobytes()
        pm.dma_iova_link(device, state, fresh, PAGE, PAGE, pm.DMA_TO_DEVICE)
        pm.dma_iova_sync(device, state, PAGE, PAGE)
        assert device.dma_read(state.addr + PAGE, 1) == b"\x09"
        pm.dma_iova_unlink(device, state, 0, 3 * PAGE, pm.DMA_TO_DEVICE)
        pm.dma_iova_free(device, state)
        pm.dma_iova_free(device, state)
        assert device.domain.iova_stats()["live"] == 0
        assert not device.dma_errors


def test_directions_are_the_pieces_own(device: pm.Device) -> None:
    read, written = pages(1), pages(1, fill=0)
    state = allocated(device, 2 * PAGE)
    pm.dma_iova_link(device, state, read, 0, PAGE, pm.DMA_TO_DEVICE)
    pm.dma_iova_link(device, state, written, PAGE, PAGE, pm.DMA_FROM_DEVICE)
    pm.dma_iova_sync(device, state, 0, 2 * PAGE)
    with pytest.raises(IommuFaultError, match="direction"):
        device.dma_write(state.addr, b"x")
    device.dma_write(state.addr + PAGE, b"x")
    assert written[0] == ord("x")
    pm.dma_iova_unlink(device, state, 0, PAGE, pm.DMA_TO_DEVICE)
    pm.dma_iova_unlink(device, state, PAGE, PAGE, pm.DMA_FROM_DEVICE)
    pm.dma_iova_free(device, state)
    assert not device.dma_errors


class TestRules:
    def test_a_later_piece_begins_at_a_page_of_iovas(self, device: pm.Device) -> None:
        state = allocated(device, 2 * PAGE)
        with refuses(errno.EIO):
            pm.dma_iova_link(device, state, pages(1), 100, 10, pm.DMA_TO_DEVICE, at=100)
        pm.dma_iova_free(device, state)

    def test_memory_lies_in_its_page_as_the_iova_does(self, device: pm.Device) -> None:
        state = allocated(device, PAGE)
        with refuses(errno.EINVAL):
            pm.dma_iova_link(device, state, pages(1), 0, 10, pm.DMA_TO_DEVICE, at=1)
        pm.dma_iova_free(device, state)

    @pytest.mark.parametrize(("offset", "size"), [(0, PAGE + 1), (PAGE, 1), (-PAGE, PAGE), (0, 0), (0, -1)])
    def test_everything_is_within_the_iovas(self, device: pm.Device, offset: int, size: int) -> None:
        state = allocated(device, PAGE)
        memory = bytearray(4 * PAGE)
        with refuses(errno.EINVAL):
            pm.dma_iova_link(device, state, memory, offset, size, pm.DMA_TO_DEVICE)
        with refuses(errno.EINVAL):
            pm.dma_iova_sync(device, state, offset, size)
        with refuses(errno.EINVAL):
            pm.dma_iova_unlink(device, state, offset, size, pm.DMA_TO_DEVICE)
        memory.append(0)
        pm.dma_iova_free(device, state)

    def test_a_piece_is_unlinked_whole(self, device: pm.Device) -> None:
        state = allocated(device, 2 * PAGE)
        pm.dma_iova_link(device, state, pages(2), 0, 2 * PAGE, pm.DMA_TO_DEVICE)
        for offset in (0, PAGE):
            with refuses(errno.EINVAL):
                pm.dma_iova_unlink(device, state, offset, PAGE, pm.DMA_TO_DEVICE)
        assert state.linked == 2 * PAGE
        pm.dma_iova_destroy(device, state, 2 * PAGE, pm.DMA_TO_DEVICE)

    def test_freed_iovas_are_of_no_use(self, device: pm.Device) -> None:
        state = allocated(device, PAGE)
        pm.dma_iova_free(device, state)
        with refuses(errno.EINVAL):
            pm.dma_iova_link(device, state, pages(1), 0, PAGE, pm.DMA_TO_DEVICE)

    def test_no_size_and_no_room(self) -> None:
        with pm.Device("d0", iommu=pm.IommuDomain(last=5 * PAGE - 1)) as device:
            with refuses(errno.EINVAL):
                pm.dma_iova_try_alloc(device, 0)
            assert pm.dma_iova_try_alloc(device, 8 * PAGE) is None

    def test_read_only_memory_is_not_written_to(self, device: pm.Device) -> None:
        state = allocated(device, PAGE)
        with refuses(errno.EFAULT):
            pm.dma_iova_link(device, state, bytes(PAGE), 0, PAGE, pm.DMA_BIDIRECTIONAL)
        pm.dma_iova_free(device, state)
