"""The blocks of a documentation page, and how each is run.

Five kinds there are, and a block of any other kind is an error:

    ```python    a program; those of a page run in order in one fresh process, as one namespace
    ```text      after a python block: what that block prints
    ```c         statements: the body of a function of a C program over native/
    ```drawing   no program: it is checked that Python cannot read it
    (indented)   `$ command` lines with what they print. `...` stands for any number of lines, and a command
                 under which nothing is shown only has to succeed

Run as a program with a page as its argument, this is the fresh process: it prints, as JSON, what each block
printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]

#: What differs from run to run, and machine to machine; all else that is shown must be what is printed.
RULES = (
    (r"\b0x[0-9a-f]+\b", "0xADDRESS"),
    (r"\b[0-9a-f]{8,}-[0-9a-f]{8,}(?= [r-][w-][x-][ps] )", "ADDRESS-ADDRESS"),  # a vma's
    (r"\b\d+(\.\d+)? (s|ms|µs|ns)\b", "TIME"),
    (r"\bLinux \d+\.\d+[^\s,]*", "Linux VERSION"),
)
_FENCE = re.compile(r"^```(.*)$")
_SHELL = "shell"


@dataclass(frozen=True)
class Block:
    """``kind`` is the info string of a fence, or "shell"; ``line`` that of the block's first line of text."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


@dataclass(frozen=True)
class Command:
    where: str
    command: str
    shown: list[str]


def name_of(page: Path) -> str:
    """As seen from the root of the project."""
    return str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page)


def blocks(page: Path) -> list[Block]:
    found = []
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if fence:
            end = lines.index("```", at + 1)
            found.append(Block(page, at + 2, fence[1], "\n".join(lines[at + 1 : end]) + "\n"))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(line[4:] for line in lines[at:end]).rstrip("\n") + "\n"
            found.append(Block(page, at + 1, _SHELL, text))
            at = end
        else:
            at += 1
    return found


def commands(block: Block) -> list[Command]:
    found: list[Command] = []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if line.startswith("$ "):
            command = line.removeprefix("$ ").partition(" # ")[0].rstrip()
            found.append(Command(f"{name_of(block.page)}:{number}", command, []))
        else:
            assert found, f"{block.where}: an indented block begins with `$ command`"
            found[-1].shown.append(line)
    for one in found:
        while one.shown and not one.shown[-1]:
            one.shown.pop()
    return found


def expected_outputs(page: Path) -> Iterator[tuple[Block, str]]:
    """Each python block of a page under which its output is shown."""
    before: Block | None = None
    for block in blocks(page):
        if block.kind == "text":
            assert before is not None, f"{block.where}: nothing is before it"
            assert before.kind == "python", f"{block.where}: not after a python block"
            yield before, block.text
        before = block


def normalised(line: str) -> str:
    for pattern, name in RULES:
        line = re.sub(pattern, name, line)
    return line.rstrip()


def assert_shows(shown: list[str], printed: str) -> None:
    """Line by line; `...` leaves out as many lines as it takes to find the next one shown."""
    lines = [normalised(line) for line in printed.splitlines()]
    at, gap = 0, False
    for wanted in map(normalised, shown):
        if wanted.strip() == "...":
            gap = True
            continue
        if gap:
            assert wanted in lines[at:], f"{wanted!r} is not printed:\n{printed}"
            at = lines.index(wanted, at)
        assert at < len(lines), f"{wanted!r} is not printed:\n{printed}"
        assert wanted == lines[at]
        at, gap = at + 1, False
    assert gap or at == len(lines), f"printed, not shown: {lines[at:]}"


def run_page(page: Path) -> dict[int, str]:
    """Run the page's python blocks here; what each printed, by its line."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = {}
    for block in blocks(page):
        if block.kind != "python":
            continue
        # The empty lines make a traceback name the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, name_of(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, namespace)
        printed[block.line] = out.getvalue()
    return printed


if __name__ == "__main__":
    print(json.dumps(run_page(Path(sys.argv[1]))))
