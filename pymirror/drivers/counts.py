# SPDX-License-Identifier: MIT
"""Counts: what drivers count, and what callbacks leave for later, from any thread."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, fields
from typing import TypeVar

_T = TypeVar("_T")


@dataclass
class Counts:
    """The base of dataclasses of int fields, which begin at 0."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add to fields by name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, int]:
        """Field by name, as of one moment."""
        with self._lock:
            return {field.name: getattr(self, field.name) for field in fields(self)}


def take(left: deque[_T]) -> _T | None:
    """The oldest of what callbacks left, None if there is none: other threads take too."""
    try:
        return left.popleft()
    except IndexError:
        return None
