"""Every code block of the README and of docs/ is run, and what is shown beside it is what it prints."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import docpages
import pytest
from conftest import CAP_SYS_ADMIN, has_capability
from docpages import PAGES, ROOT, Block, Command
from seams import needs, needs_all, switched_off

from pymirror.features import probe

TESTS = Path(__file__).parent
BIN = Path(sys.executable).parent
WAIT_S = 150
#: What would take too long, or run this very test: what is run in its place.
_SMALL = "--scale 256 --rounds 2"
STANDS_IN = {
    "make test": "make -n test",
    "make demo": "make demo DEMO_ARGS='--seconds 0.5'",
    "make bench": f"make bench BENCH_ARGS='{_SMALL}'",
    'make bench BENCH_ARGS="fault-warm --rounds 400"': f"make bench BENCH_ARGS='fault-warm {_SMALL}'",
    ".venv/bin/pymirror study --html build/study.html": (
        "pymirror study --html build/study.html --size 1M --chunk 16K --rounds 1"
    ),
    ".venv/bin/pymirror bench '*dma*' --json": f"pymirror bench '*dma*' --json {_SMALL}",
    ".venv/bin/pymirror bench 'fault-*' --json": f"pymirror bench 'fault-*' --json {_SMALL}",
}
#: What has to be set up first: the test that does, and compares.
ELSEWHERE = {
    ("docs/doctor.md", ".venv/bin/pymirror doctor"): "test_docs_doctor.py::test_doctor_as_an_ordinary_user",
    ("docs/doctor.md", "pymirror inspect 4242"): "test_docs_doctor.py::test_inspect_of_a_process_that_hangs",
}
#: Features that a page's programs are about.
PAGE_NEEDS = {
    "device-memory.md": ("uffd_kernel", "uffd_events", "move", "pagemap"),
    "dma.md": ("pagemap", "io_uring"),
    "drivers.md": ("uffd_kernel", "uffd_events", "move", "pagemap"),
    "pinning.md": ("pagemap", "io_uring"),
}
KINDS = {"python", "text", "c", "drawing", "shell"}
#: Prepended to the statements of a C block; they run with memory that is mirrored, at `addr`, `len`.
C_FRAME = (TESTS / "docpages_frame.c").read_text()

BLOCKS = [block for page in PAGES for block in docpages.blocks(page)]
COMMANDS = [
    pytest.param(block, command, id=command.where)
    for block in BLOCKS
    if block.kind == "shell" and block.text.startswith("$ ")
    for command in docpages.commands(block)
]


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


def may_compare() -> bool:
    """Outputs are shown as root sees them."""
    return has_capability(CAP_SYS_ADMIN) and "pfn" in probe()


def environment() -> dict[str, str]:
    """As in a shell of one's own: a make that runs this test hands its options down."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return env | {"PATH": f"{BIN}:{env['PATH']}", "COLUMNS": "120"}


@functools.cache
def run(command: str) -> subprocess.CompletedProcess[str]:
    """Once, however many pages show it."""
    return subprocess.run(
        ["bash", "-c", command.replace(".venv/bin/", f"{BIN}/")],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=ROOT,
        env=environment(),
        check=False,
    )


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert [block.where for block in BLOCKS if block.kind not in KINDS] == []
    sessions = [block for block in BLOCKS if block.kind == "shell"]
    assert [block.where for block in sessions if not block.text.startswith("$ ")] == []
    for page in PAGES:
        list(docpages.expected_outputs(page))


@pytest.mark.parametrize("block", of_kind("drawing"), ids=lambda block: block.where)
def test_a_drawing_is_no_program(block: Block) -> None:
    with pytest.raises(SyntaxError):
        compile(block.text, block.where, "exec")


@pytest.mark.parametrize(
    "page", sorted({block.page for block in of_kind("python")}), ids=lambda page: page.name
)
def test_python(page: Path) -> None:
    needs(*PAGE_NEEDS.get(page.name, ()))
    done = subprocess.run(
        [sys.executable, str(TESTS / "docpages.py"), str(page)],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    if not may_compare() or switched_off():
        return
    for block, shown in docpages.expected_outputs(page):
        docpages.assert_shows(shown.splitlines(), printed[str(block.line)])


@pytest.mark.timeout(WAIT_S + 10)
@pytest.mark.parametrize(("block", "command"), COMMANDS)
def test_a_command(block: Block, command: Command, request: pytest.FixtureRequest) -> None:
    key = (docpages.name_of(block.page), command.command)
    if key in ELSEWHERE:
        name, _, function = ELSEWHERE[key].partition("::")
        text = (TESTS / name).read_text()
        assert f"def {function}(" in text
        assert f'shown_after("{command.command}")' in text
        return
    if command.shown or "bench" in command.command:
        needs_all()
    if command.shown and not may_compare():
        pytest.skip("what is shown is what root sees")
    if "bench" in command.command and os.geteuid() != 0:
        pytest.skip("an ordinary user's benchmarks leave some out, and say so by their exit code")
    if "replay" in command.command or "bench" in command.command:
        request.getfixturevalue("hugepages")
    done = run(STANDS_IN.get(command.command, command.command))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    if command.shown:
        docpages.assert_shows(command.shown, done.stdout)


def test_what_stands_in_is_in_the_pages() -> None:
    named = {param.values[1].command for param in COMMANDS}  # type: ignore[attr-defined]
    assert set(STANDS_IN) <= named
    assert {command for _, command in ELSEWHERE} <= named


@pytest.mark.parametrize("block", of_kind("c"), ids=lambda block: block.where)
def test_c(block: Block, tmp_path: Path) -> None:
    needs("uffd_events", "pagemap")
    source = tmp_path / "block.c"
    before, after = C_FRAME.split("    /* block */\n")
    source.write_text(f'{before}#line {block.line} "{block.page.name}"\n{block.text}{after}')
    library = sorted(ROOT.glob("native/*.c"))
    program = tmp_path / "block"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'native'}"]
    subprocess.run(
        ["cc", *flags, '-DPM_VERSION_STRING="docs"', "-o", str(program), str(source), *map(str, library)],
        check=True,
        timeout=50,
    )
    subprocess.run([str(program)], check=True, timeout=20)


class TestThisItself:
    """That a block which is wrong is found."""

    def page(self, tmp_path: Path, text: str) -> Path:
        page = tmp_path / "page.md"
        page.write_text(text)
        return page

    def test_a_program_that_fails_names_its_line(self, tmp_path: Path) -> None:
        page = self.page(
            tmp_path, "Text.\n\n```python\nx = 1\n```\n\nMore.\n\n```python\nprint(x)\nassert x == 2\n```\n"
        )
        done = subprocess.run(
            [sys.executable, str(TESTS / "docpages.py"), str(page)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert re.search(r'page\.md", line 11', done.stderr)

    def test_what_is_shown_must_be_printed(self) -> None:
        docpages.assert_shows(["a 0x1234", "...", "d after 3 s"], "a 0xffee\nb\nc\nd after 0.2 s\n")
        for shown in (["a"], ["b", "a"], ["a", "b", "c"], ["...", "c"], ["a", "...", "a"]):
            with pytest.raises(AssertionError):
                docpages.assert_shows(shown, "a\nb\n")

    def test_blocks_are_found(self, tmp_path: Path) -> None:
        text = (
            "x\n\n    $ true\n    $ echo a  # a\n    a\n\n    b\n\n* item\n    more of it\n```c\nf();\n```\n"
        )
        found = docpages.blocks(self.page(tmp_path, text))
        assert [(block.kind, block.line) for block in found] == [("shell", 3), ("c", 12)]
