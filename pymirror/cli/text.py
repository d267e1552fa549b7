# SPDX-License-Identifier: MIT
"""Lines of text for people: colour on a terminal only, never wrapped, so that commands can be copied."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text


def console(stderr: bool = False) -> Console:
    """A console that writes escapes on a terminal only, and none where NO_COLOR is set."""
    return Console(
        stderr=stderr, highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto"
    )


class Lines:
    """Collects lines and writes them in one piece: rich answers a closed pipe with an exit of its own."""

    def __init__(self) -> None:
        self._lines: list[Text] = []

    def add(self, text: str = "", style: str = "") -> None:
        self._lines.append(Text(text, style))

    def pair(self, name: str, text: str, style: str = "", width: int = 14) -> None:
        """`name  text`, with the name in this style."""
        self._lines.append(Text(f"  {name:{width}} ", style).append(text, "default"))

    def write(self) -> None:
        out = console()
        with out.capture() as capture:
            for line in self._lines:
                out.print(line, soft_wrap=True)
        sys.stdout.write(capture.get())
