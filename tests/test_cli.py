"""The frame of the command line: help, exit codes, and no traceback for what is not a bug."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys

import pytest

import pymirror as pm
from pymirror.cli import main as cli

RUN = (sys.executable, "-m", "pymirror.cli")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *args], capture_output=True, text=True, timeout=60)


def run_failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a subcommand that raises."""

    class Failing:
        def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
            pass

        def run(self, args: argparse.Namespace) -> int:
            raise error

    monkeypatch.setattr("pymirror.cli.demo.DemoCommand", Failing)
    return cli.main(["demo"])


def test_version_is_the_package_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"pymirror {pm.__version__}\n")


def test_the_console_script_is_the_same_program() -> None:
    script = os.path.join(os.path.dirname(sys.executable), "pymirror")
    if not os.path.exists(script):
        pytest.skip("pymirror is not installed beside this interpreter")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"pymirror {pm.__version__}\n"


def test_help_lists_every_command_and_the_exit_codes() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in (*cli.COMMANDS, "exit codes", "130"):
        assert word in done.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_a_command_is_its_docstring(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("no-such-command",),
        ("demo", "--no-such-option"),
        ("demo", "--size", "much"),
        ("demo", "--size", "-1M"),
        ("demo", "--size", "1M"),
        ("demo", "--size", "nan"),
        ("demo", "--seconds", "-1"),
        ("demo", "--seconds", "nan"),
        ("demo", "--threads", "0"),
        ("demo", "--seed", "-1"),
        ("replay",),
    ],
)
def test_wrong_usage_is_exit_2_and_no_traceback(args: tuple[str, ...]) -> None:
    done = run(*args)
    assert done.returncode == cli.EXIT_USAGE
    assert "Traceback" not in done.stderr
    assert "pymirror" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (cli.CommandError("no such thing"), cli.EXIT_FAILURE),
        (cli.CommandError("no such thing", cli.EXIT_USAGE), cli.EXIT_USAGE),
        (pm.MirrorError(errno.EFAULT, "no such thing"), cli.EXIT_REFUSED),
        (MemoryError("no such thing"), cli.EXIT_REFUSED),
        (FileNotFoundError(errno.ENOENT, "no such thing", "x"), cli.EXIT_REFUSED),
    ],
)
def test_an_error_with_a_message_for_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    assert run_failing(monkeypatch, error) == code
    complaint = capsys.readouterr().err
    assert complaint.startswith("pymirror demo: ")
    assert "no such thing" in complaint


def test_ctrl_c_is_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_failing(monkeypatch, KeyboardInterrupt()) == cli.EXIT_INTERRUPTED


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_failing(monkeypatch, ZeroDivisionError())


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*RUN, "demo", "--size", "32M", "--seconds", "0", "--json"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (cli.EXIT_BROKEN_PIPE, "")


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("4096", 4096), ("64K", 1 << 16), ("256M", 1 << 28), ("1.5GiB", 3 << 29), ("2gb", 2 << 30)],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert cli.size(text) == bytes_
