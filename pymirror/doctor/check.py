# SPDX-License-Identifier: MIT
"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """``limited``: it works, less than it could; ``unknown``: not to be found out; ``info``: a fact only."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"
    UNKNOWN = "unknown"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Check:
    """What was found: ``value`` in words, ``data`` as numbers (bytes, counts).

    Unless all is well: ``lost`` is what cannot be done, ``why`` the reason, ``command`` what grants it.
    """

    area: str
    name: str
    status: Status
    value: str
    lost: str = ""
    why: str = ""
    command: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        return self.status in (Status.MISSING, Status.LIMITED)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
