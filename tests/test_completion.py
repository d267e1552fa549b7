"""Completion: the scripts are what the shells take, and offer what the parser has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pymirror.cli.main import COMMANDS

RUN = (sys.executable, "-m", "pymirror.cli")
SHELLS = ("bash", "zsh", "fish")
HERE = [shell for shell in SHELLS if shutil.which(shell)]


def script(shell: str) -> str:
    return subprocess.run(
        [*RUN, "completion", shell], capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "pymirror.bash"
    path.write_text(script("bash"))
    return path


def offered(bash: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    program = (
        'source "$1"; shift; compopt() { echo "files"; }; '
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _pymirror; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program, "bash", str(bash), "pymirror", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", HERE)
def test_the_shell_takes_the_script(shell: str, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(script(shell))
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_in_the_script(shell: str) -> None:
    text = script(shell)
    for name in COMMANDS:
        assert name in text
    for option in ("watch", "seconds", "verbose"):
        assert option in text


def test_commands_are_offered_first(bash: Path) -> None:
    assert set(COMMANDS) <= set(offered(bash, ""))
    assert offered(bash, "ins") == ["inspect"]
    assert offered(bash, "--v") == ["--version"]


def test_options_are_those_of_the_command(bash: Path) -> None:
    assert offered(bash, "inspect", "--w") == ["--watch"]
    assert offered(bash, "demo", "--w") == []
    assert offered(bash, "demo", "--size", "1G", "--se") == ["--seconds", "--seed"]


def test_values_are_offered_where_they_are_known(bash: Path) -> None:
    assert set(offered(bash, "completion", "")) >= set(SHELLS)
    assert offered(bash, "completion", "z") == ["zsh"]
    assert offered(bash, "demo", "--size", "") == []
    assert offered(bash, "replay", "tests/") == ["files"]
    assert offered(bash, "replay", "--sh") == ["--show"]


@pytest.mark.parametrize("line", ["pymirror in", "pymirror inspect --w", "pymirror completion f"])
def test_fish_offers_the_same(line: str, tmp_path: Path) -> None:
    if "fish" not in HERE:
        assert "complete -c pymirror -n" in script("fish")
        return
    path = tmp_path / "pymirror.fish"
    path.write_text(script("fish"))
    program = f"source {path}; complete -C '{line}'"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["fish", "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    (offer,) = done.stdout.splitlines()
    expected = {"in": "inspect", "--w": "--watch", "f": "fish"}[line.split()[-1]]
    assert offer.split("\t")[0] == expected
