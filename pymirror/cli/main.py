"""The frame of the command line: parser, dispatch, exit codes.

A subcommand is a small class in a module of its own. Its docstring is its help; `prepare_parser` declares its
options and `run` does the work and returns the exit code. Nothing here knows what a subcommand does.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import math
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from pymirror import MirrorError, __version__
from pymirror.errors import errno_name

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

DESCRIPTION = "Linux HMM for user space: mirror real process memory in a software device."

EPILOG = """\
examples:
  pymirror doctor                       what can be done here, and what would help
  pymirror demo                         the main job, on real memory
  pymirror study                        mirror or pin? figures of this machine
  pymirror inspect 4242                 a process that hangs
  pymirror COMMAND --help               more of each

exit codes:
  0    done, and all is well
  1    done, and something is wrong: a checksum, a stale access, a scenario that differs, a process that
       hangs, a machine on which nothing can be mirrored
  2    wrong usage
  3    could not be done here: the system refused (the message names what is missing)
  130  Ctrl-C (143: SIGTERM); what was mapped, forked or started has been cleaned up
"""

COMMANDS = {
    "doctor": ("pymirror.cli.doctor", "DoctorCommand"),
    "inspect": ("pymirror.cli.inspect", "InspectCommand"),
    "demo": ("pymirror.cli.demo", "DemoCommand"),
    "replay": ("pymirror.cli.replay", "ReplayCommand"),
    "study": ("pymirror.cli.study", "StudyCommand"),
    "bench": ("pymirror.cli.bench", "BenchCommand"),
    "completion": ("pymirror.cli.completion", "CompletionCommand"),
}


class Command(Protocol):
    """What a subcommand offers to the frame."""

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class CommandError(Exception):
    """Ends a subcommand with a message for its user, without a traceback, and an exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def size(text: str) -> int:
    """Bytes from `300M`, `2G`, `64KiB`, `1T` or a plain number, below 2**47; an argparse type."""
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    unit = units.get(number[-1:], 1)
    digits = number[:-1] if unit > 1 else number
    try:
        value = int(float(digits) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: write 256M, 2G or a number of bytes"
        ) from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"a size must be positive, not {text!r}")
    if value >= 1 << 47:
        raise argparse.ArgumentTypeError(f"{text!r} is more than a process can map, 128T")
    return value


def memory_size(text: str) -> int:
    """A size that this machine's memory has room for; an argparse type."""
    value, total = size(text), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if value > total:
        raise argparse.ArgumentTypeError(f"{text!r} is more than this machine has, {total >> 20}M")
    return value


def seconds(text: str) -> float:
    """A finite number of seconds, 0 or more; an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def positive_int(text: str) -> int:
    """An argparse type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pymirror",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pymirror {__version__}")
    subparsers = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for name in COMMANDS:
        _add_command(subparsers, name)
    return parser


def _add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    module, attribute = COMMANDS[name]
    command: Command = getattr(importlib.import_module(module), attribute)()
    text = inspect.getdoc(command) or ""
    parser = subparsers.add_parser(
        name,
        help=text.partition("\n")[0],
        description=text,
        epilog="exit codes: see pymirror --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.prepare_parser(parser)
    parser.set_defaults(command=command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pymirror` with these arguments (default: sys.argv) and return the exit code."""
    return run(build_parser(), argv)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """The same with the parser that build_parser() made."""
    name = ""
    try:
        try:
            args = parser.parse_args(argv)
            name = args.name
            return int(args.command.run(args))
        finally:
            sys.stdout.flush()
    except CommandError as error:
        return _complain(name, error, error.exit_code)
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _complain(name, _text(error), EXIT_REFUSED)
    except MemoryError as error:
        return _complain(name, f"out of memory: {error}", EXIT_REFUSED)
    except KeyboardInterrupt:
        return _complain(name, "interrupted", EXIT_INTERRUPTED)


def _complain(name: str, what: object, code: int) -> int:
    print(f"pymirror {name}: {what}" if name else f"pymirror: {what}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()
    return code


def _text(error: OSError) -> str:
    """The errno by name, as what pymirror raises has it, and for a file what to do."""
    text = error.strerror or str(error)
    if isinstance(error, MirrorError) or error.errno is None:
        return text
    text = f"{errno_name(error.errno)}: {text}"
    return text if error.filename is None else f"{text}: {error.filename}; do: {_for_a_file(error.errno)}"


def _for_a_file(number: int) -> str:
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give a file that this user may use so, or run as who may"
    if number == errno.ENOSPC:
        return "make room on that file system, or give another"
    return "give the path of a file, in a folder that is there"


def _silence_stdout() -> None:
    """The interpreter flushes stdout once more at exit, and would complain about the pipe or the disk."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
