"""Interval notifiers by the ten thousand, on pages far apart."""

from __future__ import annotations

import random
from pathlib import Path

import pymirror as pm

PAGE = 4096
MAX_MAP_COUNT = int(Path("/proc/sys/vm/max_map_count").read_text())


def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, cur_seq: int) -> bool:
    sub.set_seq(cur_seq)
    return True


def test_notifiers_on_scattered_pages_do_not_use_the_vmas_up() -> None:
    count = MAX_MAP_COUNT // 2 + 1000
    with pm.AddressSpace() as mm:
        region = mm.mmap(2 * count * PAGE)
        places = list(range(count))
        random.Random(1).shuffle(places)
        for place in places:
            pm.IntervalNotifier(mm, region.addr + 2 * place * PAGE, PAGE, invalidate)
        stats = mm.stats()
        assert stats["subs"] == count
        assert stats["watched_bytes"] >= count * PAGE
        assert sum(1 for _ in mm.vmas()) < MAX_MAP_COUNT // 4
