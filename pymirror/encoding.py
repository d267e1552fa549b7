# SPDX-License-Identifier: MIT
"""How the entries of ``Range.pfns`` are written: in the driver's own bits, or one for a huge page.

Native code works on modern HMM pfns, one a 4 KiB page. A range that wants other bits, or an entry for each 2
MiB page, has its entries translated before and after each walk.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import MirrorError
from .pfn import HMM_PFN_ERROR, HMM_PFN_FLAGS, HMM_PFN_VALID, HMM_PFN_WRITE

if TYPE_CHECKING:
    from .pfn import PfnArray

_ALL = (1 << 64) - 1

#: Indices into `flags` (enum hmm_pfn_flag_e) and `values` (enum hmm_pfn_value_e) of the 5.1 API.
FLAG_VALID, FLAG_WRITE, FLAG_DEVICE_PRIVATE = range(3)
VALUE_ERROR, VALUE_NONE, VALUE_SPECIAL = range(3)


@dataclass(frozen=True)
class PfnEncoding:
    """A driver's own pfns, as ``struct hmm_range`` of 5.1 describes them.

    ``flags``: the bits for valid, write and device-private. ``values``: the whole entries for an error, for
    nothing there, and for a special page; error and special may be the same. ``pfn_shift``: where the PFN
    stands.
    """

    flags: tuple[int, int, int]
    values: tuple[int, int, int]
    pfn_shift: int

    def __post_init__(self) -> None:
        """EINVAL when entries could not be told apart."""
        valid, write, private = self.flags
        if not 0 < self.pfn_shift < 64:
            self._refuse(f"pfn_shift {self.pfn_shift} is not in 1..63")
        if not all(0 <= number <= _ALL for number in (*self.flags, *self.values)):
            self._refuse("flags and values are 64-bit numbers")
        if valid == 0 or write == 0 or valid & write or (valid | write) & private:
            self._refuse("the flags for valid and write must be bits of their own")
        if (valid | write | private) >> self.pfn_shift:
            self._refuse("the flags must lie below the PFN")
        none = self.values[VALUE_NONE]
        if none in (self.values[VALUE_ERROR], self.values[VALUE_SPECIAL]) or none & valid:
            self._refuse("the value for nothing must differ from all others and must not look valid")

    def requests(self, entries: PfnArray) -> PfnArray:
        """The HMM requests that entries in these bits stand for."""
        native = np.zeros_like(entries)
        native[(entries & np.uint64(self.flags[FLAG_VALID])) != 0] |= np.uint64(HMM_PFN_VALID)
        native[(entries & np.uint64(self.flags[FLAG_WRITE])) != 0] |= np.uint64(HMM_PFN_WRITE)
        return native

    def results(self, native: PfnArray) -> PfnArray:
        """Entries in these bits for HMM pfns."""
        valid = (native & np.uint64(HMM_PFN_VALID)) != 0
        entries = (native & np.uint64(HMM_PFN_FLAGS ^ _ALL)) << np.uint64(self.pfn_shift)
        entries |= np.uint64(self.flags[FLAG_VALID])
        entries[(native & np.uint64(HMM_PFN_WRITE)) != 0] |= np.uint64(self.flags[FLAG_WRITE])
        entries[~valid] = self.values[VALUE_NONE]
        entries[(native & np.uint64(HMM_PFN_ERROR)) != 0] = self.values[VALUE_ERROR]
        return entries

    def to_pfns(self, entries: PfnArray) -> npt.NDArray[np.int64]:
        """The PFNs of entries, -1 where an entry holds none."""
        found = (entries >> np.uint64(self.pfn_shift)).astype(np.int64)
        found[(entries & np.uint64(self.flags[FLAG_VALID])) == 0] = -1
        for value in self.values:
            found[entries == np.uint64(value)] = -1
        return found

    def from_pfns(self, pfns: PfnArray) -> PfnArray:
        """Valid entries for PFNs."""
        return (pfns << np.uint64(self.pfn_shift)) | np.uint64(self.flags[FLAG_VALID])

    def _refuse(self, wrong: str) -> None:
        raise MirrorError(
            errno.EINVAL,
            f"PfnEncoding: {wrong}; given are flags={self.flags}, values={self.values},"
            f" pfn_shift={self.pfn_shift}",
            hint="as in flags=(1, 2, 4), values=(8, 0, 16), pfn_shift=12: bits of their own, below the PFN",
        )


class EntryForm:
    """What the driver sees as ``pfns``, over the array that native code works on."""

    __slots__ = ("default_flags", "encoding", "pages", "per_entry", "pfn_flags_mask", "pfns")

    def __init__(self, pages: PfnArray, per_entry: int, encoding: PfnEncoding | None) -> None:
        self.pages = pages
        self.per_entry = per_entry
        self.encoding = encoding
        self.pfns: PfnArray = np.zeros(pages.size // per_entry, np.uint64)
        self.default_flags = 0
        self.pfn_flags_mask = _ALL

    def to_native(self) -> None:
        """Before a walk: requests."""
        asked = (self.pfns & np.uint64(self.pfn_flags_mask)) | np.uint64(self.default_flags)
        if self.encoding is not None:
            asked = self.encoding.requests(asked)
        self.pages[:] = asked if self.per_entry == 1 else np.repeat(asked, self.per_entry)

    def from_native(self) -> None:
        """After a walk, one that failed too: results. The first page of a huge one speaks for all."""
        found = self.pages[:: self.per_entry]
        self.pfns[:] = found if self.encoding is None else self.encoding.results(found)

    def special(self, first: int, last: int) -> None:
        """Of the 4 KiB pages [first, last) of the range, those that hold no PFN are of a special vma."""
        if self.encoding is None:
            return
        absent = (self.pages[first : last : self.per_entry] & np.uint64(HMM_PFN_VALID)) == 0
        entries = self.pfns[first // self.per_entry : last // self.per_entry]
        entries[absent] = self.encoding.values[VALUE_SPECIAL]


def encoding_of(
    flags: Sequence[int] | None, values: Sequence[int] | None, pfn_shift: int | None
) -> PfnEncoding | None:
    """The encoding that a range was given; None for the modern one. EINVAL when a part of it is missing."""
    if flags is None and values is None and pfn_shift is None:
        return None
    if flags is None or values is None or pfn_shift is None or len(flags) != 3 or len(values) != 3:
        raise MirrorError(
            errno.EINVAL,
            "range: an encoding is flags (valid, write, device private), values (error, none, special) and"
            f" pfn_shift, not {flags=}, {values=}, {pfn_shift=}",
            hint="give all three, as in flags=(1, 2, 4), values=(8, 0, 16), pfn_shift=12, or none of them",
        )
    return PfnEncoding((flags[0], flags[1], flags[2]), (values[0], values[1], values[2]), pfn_shift)
