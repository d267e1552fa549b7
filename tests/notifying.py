"""Notifiers that write down what they are told, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pymirror as pm

PAGE = 4096
WHOLE = 1 << 64
SOMEWHERE = 0x1000_0000_0000


class Recorder(pm.MmuNotifier):
    """A whole-mm notifier that writes down what it is told."""

    def __init__(self, mm: pm.AddressSpace, log: list[Any] | None = None, name: str = "whole") -> None:
        self.log = [] if log is None else log
        self.name = name
        super().__init__(mm)

    def invalidate_range_start(self, range: pm.MmuNotifierRange) -> Any:
        self.log.append((self.name, "start", range.event.name, range.start, range.end))

    def invalidate_range_end(self, range: pm.MmuNotifierRange) -> None:
        self.log.append((self.name, "end", range.event.name, range.start, range.end))

    def release(self) -> None:
        self.log.append((self.name, "release"))


def keeps_the_rules(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
    sub.set_seq(cur_seq)
    return True


def interval(
    mm: pm.AddressSpace, start: int, pages: int = 1, invalidate: Callable[..., Any] = keeps_the_rules
) -> pm.IntervalNotifier:
    return pm.IntervalNotifier(mm, start, pages * PAGE, invalidate)


def invalidate(mm: pm.AddressSpace, start: int, pages: int = 1, **how: Any) -> None:
    with mm.invalidate(start, start + pages * PAGE, **how):
        pass


@contextmanager
def interval_recorder(
    mm: pm.AddressSpace, start: int, pages: int = 1
) -> Iterator[tuple[pm.IntervalNotifier, list[pm.MmuNotifierRange]]]:
    seen: list[pm.MmuNotifierRange] = []

    def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
        sub.set_seq(cur_seq)
        seen.append(range)
        return True

    sub = interval(mm, start, pages, take)
    yield sub, seen
    sub.remove()
