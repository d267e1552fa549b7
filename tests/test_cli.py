"""The frame of the command line: help, exit codes, and no traceback for what is not a bug."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

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
def test_help_of_a_command_is_its_docstring_with_examples(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"examples:\n  pymirror {name}" in done.stdout
    assert "exit codes" in done.stdout
    assert ("--json" in done.stdout) == (name != "completion")


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
        ("doctor", "--pid", "me"),
        ("inspect",),
        ("inspect", "0"),
        ("inspect", "1", "--watch", "nan"),
        ("inspect", "1", "--after", "-1"),
        ("completion", "csh"),
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


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name, code, number in (
        ("binary", cli.EXIT_USAGE, "EINVAL"),
        ("absent", cli.EXIT_REFUSED, "ENOENT"),
        ("", cli.EXIT_REFUSED, "EISDIR"),
    ):
        done = run("replay", str(tmp_path / name))
        assert (done.returncode, done.stdout) == (code, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"pymirror replay: {number}: ")
        assert "; do: give " in done.stderr
        assert str(tmp_path / name) in done.stderr


def test_an_unknown_scenario_is_wrong_usage() -> None:
    done = run("replay", str(Path(__file__).parent / "golden" / "cpu.jsonl"), "--show", "9999")
    assert (done.returncode, done.stdout) == (cli.EXIT_USAGE, "")
    assert "ENOENT: no scenario 9999" in done.stderr
    assert "; do: " in done.stderr


def test_more_than_a_process_can_map_is_wrong_usage() -> None:
    for text in ("128T", "1e30"):
        done = run("demo", "--size", text)
        assert done.returncode == cli.EXIT_USAGE
        assert "more than a process can map" in done.stderr


@pytest.mark.parametrize("command", ["demo", "study"])
def test_more_than_the_machine_has_is_wrong_usage(command: str) -> None:
    done = run(command, "--size", "100T")
    assert done.returncode == cli.EXIT_USAGE
    assert "more than this machine has" in done.stderr


def test_an_error_names_its_errno_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_failing(monkeypatch, pm.MirrorError(errno.EFAULT, "no such thing", hint="go home"))
    assert capsys.readouterr().err == "pymirror demo: EFAULT: no such thing; do: go home\n"


def test_a_full_disk_is_one_line() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*RUN, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment
        )
    assert (done.returncode, done.stderr) == (cli.EXIT_REFUSED, "pymirror: ENOSPC: No space left on device\n")


# A module of this name comes before numpy: what it does happens while the package is being imported.


def launch(tmp_path: Path, numpy: str, *args: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "numpy.py").write_text(numpy)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import _pymirror_cli"
    return subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit(_pymirror_cli.main())", *args],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_ctrl_c_while_the_package_is_imported_ends_it_as_it_ends_any_process(tmp_path: Path) -> None:
    done = launch(tmp_path, "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(30)")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    numpy = "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise ImportError('still here')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = launch(tmp_path, numpy)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (cli.EXIT_REFUSED, "pymirror: still here\n")


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    done = launch(tmp_path, "raise ImportError('no numpy here')", "doctor")
    assert (done.returncode, done.stdout) == (cli.EXIT_REFUSED, "")
    assert done.stderr == "pymirror: no numpy here\n"


def test_ctrl_c_in_a_command_is_a_line_and_130(tmp_path: Path) -> None:
    program = """
import os, signal, sys, _pymirror_cli, pymirror.cli.demo
pymirror.cli.demo.DemoCommand.run = lambda self, args: os.kill(os.getpid(), signal.SIGINT)
sys.exit(_pymirror_cli.main())
"""
    done = subprocess.run([sys.executable, "-c", program, "demo"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (cli.EXIT_INTERRUPTED, "pymirror demo: interrupted\n")


def coloured(*args: str, **environment: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [*RUN, *args], stdout=theirs, stderr=theirs, env={**clean, "TERM": "xterm-256color", **environment}
    )
    os.close(theirs)
    seen = b""
    # The other side's last close is EIO.
    with suppress(OSError):
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    process.wait(60)
    return seen.decode()


def test_colour_is_for_terminals_and_not_for_those_who_decline_it() -> None:
    assert "\x1b[" in coloured("doctor")
    assert "\x1b[" not in coloured("doctor", NO_COLOR="1")
    assert "\x1b" not in run("doctor").stdout


def test_json_on_a_terminal_is_plain() -> None:
    assert json.loads(coloured("doctor", "--json"))["checks"]


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
