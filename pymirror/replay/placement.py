# SPDX-License-Identifier: MIT
"""Where mappings of files stood in the recordings.

Fault-around maps the aligned 64 KiB around a touch, so what a read brings in depends on where the mapping
stands. A run of the recorder had all its mappings end at one place in such a block, and the kernel puts what
mremap() moves right below what it was. Every scenario that shows it agrees.
"""

from __future__ import annotations

PAGE = 4096

# From this scenario on, in each file: the page of its 64 KiB at which the mapping ends.
_ENDS = {"p": ((0, 14),), "r": ((0, 6), (140, 15)), "c": ((0, 14),)}


def mapping_end(scenario: str) -> int:
    """The address, modulo 64 KiB, at which a mapping of a file ends in a scenario of that id."""
    runs = _ENDS.get(scenario[:1], _ENDS["p"])
    number = int(scenario[1:]) if scenario[1:].isdecimal() else 0
    return next(end for first, end in reversed(runs) if number >= first) * PAGE
