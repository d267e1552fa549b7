"""docs/doctor.md shows what the programs print: line by line, but for numbers, addresses and paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import confined
import pytest
from test_inspect import RUN as INSPECT
from test_inspect import target

from pymirror.cli.inspect import InspectCommand
from pymirror.inspection import diagnosis

PAGE = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text()


def shown_after(command: str) -> list[str]:
    """The indented block that begins with `$ command`; a line `...` stands for any number of lines."""
    block = re.search(rf"^    \$ {re.escape(command)}\n((?:    .*\n|\n)+?)(?=^\S)", PAGE, re.MULTILINE)
    assert block, command
    return [plain(line[4:]) for line in block[1].rstrip("\n").split("\n")]


def plain(line: str) -> str:
    line = re.sub(r"\S*/bin/python[\d.]*", "PYTHON", line)
    line = re.sub(r"(?<=Linux )\S+(?=, x86)", "N", line)
    line = re.sub(r"python[\d.]* \(", "python (", line)
    return re.sub(r"0x[0-9a-f]+|\d[\d,.:]*(?<![,.:])", "N", line)


def assert_shows(shown: list[str], printed: str) -> None:
    lines = [plain(line) for line in printed.splitlines()]
    at, gap = 0, False
    for line in shown:
        if line == "...":
            gap = True
            continue
        if gap:
            assert line in lines[at:], line
            at = lines.index(line, at)
        assert line == lines[at]
        at, gap = at + 1, False
    assert gap or at == len(lines)


@pytest.mark.root
@pytest.mark.hugetlb
@pytest.mark.usefixtures("nothing_switched_off")
def test_doctor_as_an_ordinary_user() -> None:
    command = confined.command({"user": 65534, "limits": {"MEMLOCK": 8 << 20}}, sys.executable)
    done = subprocess.run(
        [*command, "-m", "pymirror.cli", "doctor"], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0
    assert_shows(shown_after(".venv/bin/pymirror doctor"), done.stdout)


@pytest.mark.root
def test_inspect_of_a_process_that_hangs() -> None:
    with target("driver_lock") as one:
        one.until(lambda _, found: "has waited for the lock" in found and "a callback for" in found)
        done = subprocess.run(
            [*INSPECT, str(one.pid), "--after", "0.05"], capture_output=True, text=True, timeout=50
        )
    assert_shows(shown_after("pymirror inspect 4242"), done.stdout)


def test_the_table_has_every_kind_of_finding() -> None:
    source = Path(diagnosis.__file__).read_text()
    kinds = set(re.findall(r'"(HUNG|STOPPED|SLOW)"', source))
    assert kinds == set(re.findall(r"^\| ([A-Z]+)", PAGE, re.MULTILINE))
    for word in ("device lock", "GIL", "monitor", "userfaultfd", "device access"):
        assert re.search(rf"^\| HUNG.*{word}", PAGE, re.MULTILINE)
        assert word in source


def test_exit_codes_are_those_of_the_help() -> None:
    for name in ("ESRCH", "ENOENT", "EACCES", "EPROTO"):
        assert name in PAGE
    assert "exit codes" in (InspectCommand.__doc__ or "")
