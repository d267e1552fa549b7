"""The functions of the DMA API, each called once with what it needs and undone: for the table in calls.py."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pymirror as pm

TO, PAGE, SRCH = pm.DMA_TO_DEVICE, 4096, errno.ESRCH
Run = Callable[[Any], object]


def _mapped(w: Any, addr: int) -> int:
    """A driver's check of what it was given."""
    if not pm.dma_mapping_error(w.device, addr):
        return addr
    raise pm.MirrorError(errno.ENOMEM, "DMA_MAPPING_ERROR", hint="see what the log says of it")


def _single(call: Run | None = None) -> Run:
    """Between map and unmap of a buffer."""

    def run(w: Any) -> None:
        addr = _mapped(w, pm.dma_map_single(w.device, w.content, 8, TO))
        if call is not None:
            call((w.device, addr))
        pm.dma_unmap_single(w.device, addr, 8, TO)

    return run


def _page(w: Any) -> None:
    addr = _mapped(w, pm.dma_map_page(w.device, w.held, 0, 8, TO))
    pm.dma_unmap_page(w.device, addr, 8, TO)


def _sg(call: Run | None = None) -> Run:
    def run(w: Any) -> None:
        if pm.dma_map_sg(w.device, w.sgl, 1, TO) != 1:
            raise pm.MirrorError(errno.ENOMEM, "dma_map_sg: 0", hint="see what the log says of it")
        if call is not None:
            call(w)
        pm.dma_unmap_sg(w.device, w.sgl, 1, TO)

    return run


def _sgtable(w: Any) -> None:
    pm.dma_map_sgtable(w.device, w.sgl, TO)
    pm.dma_unmap_sgtable(w.device, w.sgl, TO)


def _coherent(w: Any) -> None:
    pm.dma_free_coherent(w.device, 8, *pm.dma_alloc_coherent(w.device, 8))


def _linked(free: Run) -> Run:
    """IOVAs, a buffer linked and made reachable, and taken away again in one way or the other."""

    def run(w: Any) -> None:
        state = pm.dma_iova_try_alloc(w.device, 8, w.start)
        if not pm.dma_use_iova(state):
            raise pm.MirrorError(errno.ENOMEM, "dma_iova_try_alloc", hint="map page by page")
        assert state is not None
        try:
            pm.dma_iova_link(w.device, state, w.buf, 0, 8, TO)
        except pm.MirrorError:
            pm.dma_iova_free(w.device, state)
            raise
        try:
            pm.dma_iova_sync(w.device, state, 0, 8)
        except pm.MirrorError:
            pm.dma_iova_destroy(w.device, state, 8, TO)
            raise
        free((w.device, state))

    return run


def _unlink_and_free(what: Any) -> None:
    device, state = what
    pm.dma_iova_unlink(device, state, 0, 8, TO)
    pm.dma_iova_free(device, state)


def _gup_map(w: Any) -> None:
    pm.gup_range_dma_map(w.other_pin, w.device)
    pm.gup_range_dma_unmap(w.other_pin, w.device)


def _unmap_last_page(w: Any) -> None:
    pfns = w.rng.pfns.copy()
    pm.hmm_range_dma_unmap(w.rng, w.device, start=w.end - PAGE, end=w.end)
    w.rng.pfns = pfns


def _dma_map(w: Any) -> None:
    pm.hmm_dma_map_free(w.device, pm.hmm_dma_map_alloc(w.device, w.sub, w.start, 4))


def _dma_map_pfn(w: Any) -> None:
    pm.hmm_dma_map_pfn(w.device, w.dma_map, 0, seq=w.sub_seq)


#: Of the driver's own memory: where no callback may wait for an mm, these need not.
OWN_MEMORY: dict[str, Run] = {
    "dma_map_single": _single(),
    "dma_unmap_single": _single(),
    "dma_mapping_error": _single(),
    "dma_need_sync": _single(lambda one: pm.dma_need_sync(*one)),
    "dma_sync_single_for_cpu": _single(lambda one: pm.dma_sync_single_for_cpu(*one, 8, TO)),
    "dma_sync_single_for_device": _single(lambda one: pm.dma_sync_single_for_device(*one, 8, TO)),
    "dma_map_page": _page,
    "dma_unmap_page": _page,
    "dma_map_sg": _sg(),
    "dma_unmap_sg": _sg(),
    "dma_sync_sg_for_cpu": _sg(lambda w: pm.dma_sync_sg_for_cpu(w.device, w.sgl, 1, TO)),
    "dma_sync_sg_for_device": _sg(lambda w: pm.dma_sync_sg_for_device(w.device, w.sgl, 1, TO)),
    "dma_map_sgtable": _sgtable,
    "dma_unmap_sgtable": _sgtable,
    "dma_alloc_coherent": _coherent,
    "dma_free_coherent": _coherent,
    "dma_iova_try_alloc": _linked(_unlink_and_free),
    "dma_use_iova": _linked(_unlink_and_free),
    "dma_iova_link": _linked(_unlink_and_free),
    "dma_iova_sync": _linked(_unlink_and_free),
    "dma_iova_unlink": _linked(_unlink_and_free),
    "dma_iova_free": _linked(_unlink_and_free),
    "dma_iova_destroy": _linked(lambda one: pm.dma_iova_destroy(*one, 8, TO)),
}
#: What a device is and can.
PARAMETERS: dict[str, Run] = {
    "DMA_BIT_MASK": lambda w: pm.DMA_BIT_MASK(64),
    "sg_list": lambda w: pm.sg_list(w.content),
    "sg_dma_address": lambda w: pm.sg_dma_address(w.sgl[0]),
    "sg_dma_len": lambda w: pm.sg_dma_len(w.sgl[0]),
    "dma_get_mask": lambda w: pm.dma_get_mask(w.device),
    "dma_get_required_mask": lambda w: pm.dma_get_required_mask(w.device),
    "dma_get_max_seg_size": lambda w: pm.dma_get_max_seg_size(w.device),
    "dma_get_seg_boundary": lambda w: pm.dma_get_seg_boundary(w.device),
    "dma_addressing_limited": lambda w: pm.dma_addressing_limited(w.device),
    "dma_max_mapping_size": lambda w: pm.dma_max_mapping_size(w.device),
    "dma_set_mask": lambda w: pm.dma_set_mask(w.device, pm.dma_get_mask(w.device)),
    "dma_set_coherent_mask": lambda w: pm.dma_set_coherent_mask(w.device, pm.dma_get_mask(w.device)),
    "dma_set_mask_and_coherent": lambda w: pm.dma_set_mask_and_coherent(w.device, pm.dma_get_mask(w.device)),
    "dma_set_max_seg_size": lambda w: pm.dma_set_max_seg_size(w.device, pm.dma_get_max_seg_size(w.device)),
    "dma_set_seg_boundary": lambda w: pm.dma_set_seg_boundary(w.device, pm.dma_get_seg_boundary(w.device)),
}
#: Of pages of an mm: with the outcomes after close(), and in a forked child.
RANGES: dict[str, tuple[Run, int, int]] = {
    "gup_range_dma_map": (_gup_map, SRCH, SRCH),
    "gup_range_dma_unmap": (lambda w: pm.gup_range_dma_unmap(w.other_pin, w.device), 0, 0),
    "hmm_range_dma_unmap": (_unmap_last_page, 0, SRCH),
    "hmm_dma_map_alloc": (_dma_map, SRCH, SRCH),
    "hmm_dma_map_free": (_dma_map, SRCH, SRCH),
    "hmm_dma_map_pfn": (_dma_map_pfn, errno.EBUSY, SRCH),
    "hmm_dma_map_pfns": (
        lambda w: pm.hmm_dma_map_pfns(w.device, w.dma_map, 0, 2, seq=w.sub_seq),
        errno.EBUSY,
        SRCH,
    ),
    "hmm_dma_unmap_pfns": (lambda w: pm.hmm_dma_unmap_pfns(w.device, w.dma_map, 0, 2), 0, SRCH),
    "hmm_dma_unmap_pfn": (lambda w: pm.hmm_dma_unmap_pfn(w.device, w.dma_map, 0), 0, SRCH),
}
