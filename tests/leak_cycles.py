# SPDX-License-Identifier: MIT
"""Open, make one public call, close, for all of them: LeakSanitizer looks when the interpreter ends."""

from __future__ import annotations

import gc
import logging
from contextlib import suppress

from calls import CALLS, world

import pymirror as pm


def main() -> None:
    logging.disable()
    for call in CALLS:
        with world() as made, suppress(pm.MirrorError):
            call.run(made)
        gc.collect(1)
    print(f"leak check: {len(CALLS)} open-close cycles, {len(CALLS)} calls")


if __name__ == "__main__":
    main()
