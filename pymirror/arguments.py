# SPDX-License-Identifier: MIT
"""Arguments of a wrong kind are refused where they are given, by name: objects with EINVAL and what to give.

An object is known by an attribute that only those of the kind have, once they are whole: a half-built one is
refused too.
"""

from __future__ import annotations

import errno
import operator
from typing import TYPE_CHECKING

from .errors import MirrorError

if TYPE_CHECKING:
    from typing import Any


def check_is(what: str, name: str, value: object, attribute: str, wanted: str) -> None:
    if not hasattr(value, attribute):
        raise wrong(what, name, value, wanted)


def check_mm(what: str, mm: object) -> None:
    check_is(what, "mm", mm, "notifiers", "an AddressSpace")


def check_device(what: str, device: object) -> None:
    check_is(what, "device", device, "dma_debug", "a Device")


def device_call(device: Any, call: str) -> str:
    """`device: call`, with which messages begin."""
    check_device(call, device)
    return f"{device.name}: {call}"


def integer(what: str, name: str, value: Any) -> int:
    """As Python refuses it: TypeError, with the name."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{what}: {name}={shown(value)}: {error}") from None


def seconds(what: str, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}: {name}={shown(value)}: {error}") from None


def wrong(what: str, name: str, value: object, wanted: str) -> MirrorError:
    return MirrorError(errno.EINVAL, f"{what}: {name}={shown(value)}", hint=f"give {wanted}")


def shown(value: object) -> str:
    """Its repr; that of a half-built object fails."""
    try:
        return repr(value)
    except Exception:
        return f"<half-built {type(value).__name__}>"
